"""What `activation_memory.py` measures: a stack of MLPs, and the train step of a decoder."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import optax
from tpu_compiler import lowered_for

import lowrank_optax as lro
from lowrank_optax.activations import few_bit
from lowrank_optax.layers import Sketch, randomize, randomized_linear
from lowrank_optax.models import Decoder, decoder_config
from lowrank_optax.planning import SavedResidualsReport, saved_residuals

Function = Callable[[jax.Array], jax.Array]


class Measured(NamedTuple):
    """Bytes of one variant."""

    kept: int
    temporary: int
    by_name: dict[str, int]


class Variant(NamedTuple):
    """One row.

    Attributes:
      measure: Takes the device to compile for and the command's arguments.
      against: The row that it is compared with; None for those that others are compared with.
    """

    measure: Callable[[Any, Any], Measured]
    against: str | None = None


@jax.custom_vjp
def _gelu_of_input(x: jax.Array) -> jax.Array:
    """GELU that keeps its input alone."""
    return jax.nn.gelu(x)


_gelu_of_input.defvjp(lambda x: (jax.nn.gelu(x), x), lambda x, g: jax.vjp(jax.nn.gelu, x)[1](g))


class Stack(NamedTuple):
    """``x + act(x A) B``, scanned: the activation, and how the layer is run.

    Attributes:
      activation: Of the hidden values.
      bits: Of it, where backward keeps only so many.
      frozen: Whether B is not trained.
      sketch: Of the inputs of both products.
      recomputed: Whether all but ``x A`` is computed again.
    """

    activation: Function = jax.nn.gelu
    bits: int | None = None
    frozen: bool = False
    sketch: Sketch | None = None
    recomputed: bool = False

    def loss(self, trained: dict[str, Any], fixed: dict[str, Any], x: jax.Array) -> jax.Array:
        """Of the whole stack."""
        weights = trained | fixed
        layers = weights["a"].shape[0]
        keys = jax.random.split(jax.random.key(0), (layers, 2))
        fn = self.activation if self.bits is None else few_bit(self.activation, self.bits)

        def layer(x: jax.Array, given: Any) -> tuple[jax.Array, None]:
            a, b, keys = given
            hidden = fn(checkpoint_name(self.product(x, a, keys[0]), "hidden"))
            return x + self.product(hidden, b, keys[1]), None

        if self.recomputed:
            policy = jax.checkpoint_policies.save_only_these_names("hidden")
            layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)
        y, _ = jax.lax.scan(layer, x, (weights["a"], weights["b"], keys))
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    def product(self, x: jax.Array, weight: jax.Array, key: jax.Array) -> jax.Array:
        """Dense or randomized."""
        if self.sketch is None:
            return x @ weight
        return randomized_linear(x, weight, key=key, sketch=self.sketch)

    def measure(self, device: Any, args: Any) -> Measured:
        """Of the gradient, in bfloat16."""
        of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        layers, width, hidden = args.mlp_layers, args.mlp_width, 4 * args.mlp_width
        a, b = {"a": of(layers, width, hidden)}, {"b": of(layers, hidden, width)}
        trained, fixed = (a, b) if self.frozen else (a | b, {})
        return _measured(
            saved_residuals(self.loss, trained, fixed, of(args.mlp_tokens, width), device=device)
        )


def _measured(report: SavedResidualsReport, temporary: int | None = None) -> Measured:
    temporary = report.temporary_bytes if temporary is None else temporary
    assert temporary is not None  # compiled by XLA, which says
    return Measured(report.total_bytes, temporary, report.bytes_by_name())


def mlp_variants() -> dict[str, Variant]:
    """The stack's rows by name."""
    sketches = {kind: Sketch(kind, fraction=1 / 8) for kind in ("stratified", "rademacher")}
    trained = {
        "plain": Stack(),
        "checkpoint(gelu)": Stack(jax.checkpoint(jax.nn.gelu)),
        "gelu of its kept input": Stack(_gelu_of_input),
        "remat, x A saved": Stack(recomputed=True),
        "relu": Stack(jax.nn.relu),
        **{f"{bits} bits": Stack(bits=bits) for bits in (1, 2, 3, 4)},
    }
    frozen = {
        "B frozen": Stack(frozen=True),
        "B frozen, remat, x A saved": Stack(frozen=True, recomputed=True),
        **{f"B frozen, {bits} bits": Stack(bits=bits, frozen=True) for bits in (3, 4)},
    }
    sketched = {
        f"{kind} 1/8{name}": Stack(bits=bits, sketch=sketch)
        for kind, sketch in sketches.items()
        for name, bits in (("", None), (", 4 bits", 4))
    }
    against = {"plain": trained | sketched, "B frozen": frozen}
    return {
        name: Variant(stack.measure, None if name == base else base)
        for base, stacks in against.items()
        for name, stack in stacks.items()
    }


class Step(NamedTuple):
    """A train step of a decoder: AdamW, bfloat16, everything that it replaces donated.

    Attributes:
      remat: Of the decoder.
      bits: Of its activations.
      sketch: Of its linear layers.
      adapter: What is trained in the place of the weights.
    """

    remat: Any = None
    bits: int | None = None
    sketch: Sketch | None = None
    adapter: Any = None

    def model(self, args: Any) -> Decoder:
        """The model."""
        overrides = {} if args.layers is None else {"num_hidden_layers": args.layers}
        model = Decoder(
            decoder_config(args.model, **overrides),
            rngs=nnx.Rngs(0),
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
            remat=self.remat,
            activation_bits=self.bits,
        )
        if self.sketch is not None:
            randomize(model, self.sketch, rngs=nnx.Rngs(1))
        if self.adapter is not None:
            lro.adapters.attach(model, self.adapter, rngs=0)
        return model

    def measure(self, device: Any, args: Any) -> Measured:
        """Counted in the loss, compiled in the step."""
        model = nnx.eval_shape(lambda: self.model(args))
        wrt = nnx.Param if self.adapter is None else lro.adapters.trainable
        tokens = jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32)
        report = saved_residuals(loss, model, tokens, wrt=wrt, compiled=False)
        return _measured(report, temporary_bytes(model, wrt, tokens, device))


def loss(model: Decoder, tokens: jax.Array) -> jax.Array:
    """Of the tokens themselves, which changes no shape."""
    logits = model(tokens)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def temporary_bytes(model: Any, wrt: Any, tokens: Any, device: Any) -> int:
    """Of a step of AdamW."""
    graphdef, trained, fixed = nnx.split(model, wrt, ...)
    trained, fixed = nnx.as_pure(trained), nnx.as_pure(fixed)
    tx = optax.adamw(1e-4)

    def step(trained: Any, state: Any, fixed: Any, tokens: jax.Array) -> Any:
        gradient = jax.grad(lambda t: loss(nnx.merge(graphdef, t, fixed), tokens))(trained)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state

    given = (trained, jax.eval_shape(tx.init, trained), fixed, tokens)
    lowered = lowered_for(device, step, *given, donate_argnums=(0, 1))
    analysis: Any = lowered.compile().memory_analysis()
    return analysis.temp_size_in_bytes


def decoder_variants() -> dict[str, Variant]:
    """The train step's rows by name."""
    sketch = Sketch(fraction=1 / 8)
    adapters = {"LoRA": lro.adapters.LoRA(rank=8), "LoRA-FA": lro.adapters.LoRAFA(rank=8)}
    full = {
        "plain": Step(),
        "remat, full": Step(remat="full"),
        "remat, dots saved": Step(remat="dots_with_no_batch_dims_saveable"),
        "4 bits": Step(bits=4),
        "3 bits": Step(bits=3),
        "randomized 1/8": Step(sketch=sketch),
        "randomized 1/8, 4 bits": Step(bits=4, sketch=sketch),
    }
    variants = {
        name: Variant(step.measure, None if name == "plain" else "plain")
        for name, step in full.items()
    }
    for name, adapter in adapters.items():
        variants[name] = Variant(Step(adapter=adapter).measure, None if name == "LoRA" else "LoRA")
        for bits in (4, 3):
            step = Step(bits=bits, adapter=adapter)
            variants[f"{name}, {bits} bits"] = Variant(step.measure, name)
    return variants
