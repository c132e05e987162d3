"""The layers and models that `accelerator.py` times."""

from collections.abc import Callable, Iterator
import functools
from importlib.util import find_spec
from typing import Any

from accelerator_cases import Case, Group, Sizes, filled, fixed, shaped, times
from flax import nnx
import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from lowrank_optax.models import Decoder, decoder_config

ADAPTER_RANK = 16
SKETCHES = ("rows", "stratified", "norm_weighted", "rademacher", "gaussian", "srht")
FRACTIONS = (0.5, 0.1)


@jax.custom_vjp
def gelu_of_x(x: jax.Array) -> jax.Array:
    """GELU that saves x alone."""
    return jax.nn.gelu(x)


gelu_of_x.defvjp(
    lambda x: (jax.nn.gelu(x), x),
    lambda x, gradient: jax.vjp(jax.nn.gelu, x)[1](gradient),
)

GELUS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "jax.nn.gelu": jax.nn.gelu,
    **{f"gelu in {b} bits": functools.partial(lro.activations.gelu, bits=b) for b in (1, 2, 3, 4)},
    "jax.checkpoint(jax.nn.gelu)": jax.checkpoint(jax.nn.gelu),
    "gelu, custom_vjp that saves x": gelu_of_x,
}


def block(params: Any, x: jax.Array, heads: int, gelu: Callable[..., jax.Array]) -> jax.Array:
    """``x``, ``[batch, length, width]``, after attention and MLP."""
    split = lambda y: y.reshape(*y.shape[:-1], heads, -1)
    q, k, v = jnp.split(jax.nn.standardize(x) @ params["qkv"], 3, axis=-1)
    attended = jax.nn.dot_product_attention(split(q), split(k), split(v), is_causal=True)
    x += attended.reshape(x.shape) @ params["out"]
    return x + gelu(jax.nn.standardize(x) @ params["up"]) @ params["down"]


def causal_flops(batch: int, tokens: int, width: int) -> int:
    """Of both passes of attention to the tokens before, nothing computed again."""
    return 6 * batch * tokens**2 * width


def activations(sizes: Sizes) -> Iterator[Group]:
    """A training step of pre-norm blocks, by what their GELU saves."""
    layers, width, heads, batch, length = sizes.blocks.values()
    sides = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
    weights = {k: shaped(jnp.float32, a * width, b * width) for k, (a, b) in sides.items()}
    tx = optax.adamw(1e-4)

    def step(carry: Any, x: jax.Array, gelu: Any) -> Any:
        def loss(blocks: Any) -> jax.Array:
            y = x
            for params in blocks:
                y = block(params, y, heads, gelu)
            return jnp.mean(jnp.square(y))

        blocks, state = carry
        updates, state = tx.update(jax.grad(loss)(blocks), state, blocks)
        return optax.apply_updates(blocks, updates), state

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        blocks = filled(key, [weights] * layers, width**-0.5)
        x = jax.random.normal(key, (batch, length, width))
        return (blocks, tx.init(blocks)), (x,)

    # The first block's input needs no gradient.
    products = batch * length * (72 * layers - 6) * width**2
    shapes = f"{layers} blocks of {width}, {times(batch, length)} tokens"
    yield [
        Case(
            name,
            shapes,
            lambda gelu=gelu: (functools.partial(step, gelu=gelu), inputs),
            products + layers * causal_flops(batch, length, width),
        )
        for name, gelu in GELUS.items()
    ]


def linears(sizes: Sizes) -> Iterator[Group]:
    """A linear layer forward and backward, from sketches of its input; both gradients."""
    rows, d_in, d_out = sizes.linear
    x, kernel = shaped(sizes.dtype, rows, d_in), shaped(sizes.dtype, d_in, d_out)
    y = shaped(sizes.dtype, rows, d_out)

    def step(carry: Any, x: jax.Array, kernel: jax.Array, y: jax.Array, sketch: Any) -> Any:
        linear = jnp.matmul
        if sketch is not None:
            linear = functools.partial(
                lro.layers.randomized_linear, key=jax.random.key(1), sketch=sketch
            )
        out, vjp = jax.vjp(linear, x, kernel)
        return (out, *vjp(y))

    def case(name: str, sketch: Any, fraction: float) -> Case:
        # The kernel's gradient is a product of so many rows; sums of rows are products too.
        flops = (4 + 2 * fraction) * rows * d_in * d_out
        if sketch is not None and sketch.kind in ("rademacher", "gaussian"):
            flops += 2 * fraction * rows**2 * (d_in + d_out)
        build = fixed(functools.partial(step, sketch=sketch), (y, x, kernel), x, kernel, y)
        return Case(
            name, f"{times(*sizes.linear)}, {sizes.dtype}", build, flops, sizes.dtype, False
        )

    yield [
        case("dense linear", None, 1.0),
        *(
            case(f"randomized linear, {kind} {f}", lro.layers.Sketch(kind, fraction=f), f)
            for kind in SKETCHES
            for f in FRACTIONS
        ),
    ]


def attentions(sizes: Sizes) -> Iterator[Group]:
    """Causal attention forward and backward, by each implementation that this backend has."""
    installed = {"gpu": ["cudnn"], "tpu": ["splash"]}.get(jax.default_backend(), [])
    names = [None, "chunked", *installed, *["tokamax"] * (find_spec("tokamax") is not None)]
    functions = {"jax.nn": jax.nn.dot_product_attention} | {
        name or "chosen": functools.partial(run_attention, implementation=name) for name in names
    }

    def step(carry: Any, query: Any, key: Any, value: Any, y: Any, attention: Any) -> Any:
        del carry
        out, vjp = jax.vjp(functools.partial(attention, is_causal=True), query, key, value)
        return (out, *vjp(y))

    for batch, tokens, heads, width in sizes.attention:
        x = shaped(sizes.dtype, batch, tokens, heads, width)
        yield [
            Case(
                f"attention, {name}",
                f"{times(batch, tokens, heads, width)}, {sizes.dtype}",
                fixed(functools.partial(step, attention=attention), (x,) * 4, *(x,) * 4),
                causal_flops(batch, tokens, heads * width),
                sizes.dtype,
                False,
            )
            for name, attention in functions.items()
        ]


def run_attention(*arrays: jax.Array, **options: Any) -> jax.Array:
    """Attention by the library."""
    return lro.layers.dot_product_attention(*arrays, **options)


def losses(sizes: Sizes) -> Iterator[Group]:
    """Gradients of the loss of a linear head: by both operands, or with the head frozen."""

    def plain(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def by_design(design: str) -> Callable[..., jax.Array]:
        return lambda *operands: lro.losses.linear_cross_entropy(*operands, design=design)

    functions = {"optax": plain} | {
        f"linear_cross_entropy, {design}": by_design(design)
        for design in ("auto", "recompute", "forward")
    }

    def step(carry: Any, hidden: Any, head: Any, labels: Any, loss: Any, frozen: bool) -> Any:
        del carry
        return jax.grad(loss, (0,) if frozen else (0, 1))(hidden, head, labels)

    for tokens, width, words in sizes.loss:
        operands = shaped(sizes.dtype, tokens, width), shaped(sizes.dtype, width, words)
        shapes = f"{times(tokens, width, words)}, {sizes.dtype}"
        for frozen in (False, True):
            gradients = operands[:1] if frozen else operands
            arguments = gradients, *operands, shaped(jnp.int32, tokens)
            yield [
                Case(
                    f"loss, {name}" + frozen * ", frozen head",
                    shapes,
                    fixed(functools.partial(step, loss=loss, frozen=frozen), *arguments),
                    (4 if frozen else 6) * tokens * width * words,
                    sizes.dtype,
                    False,
                )
                for name, loss in functions.items()
            ]


def without_logits(model: Decoder, hidden: jax.Array, text: jax.Array) -> jax.Array:
    """The decoder's loss from its hidden states."""
    head, axis = model.head()
    return lro.losses.linear_cross_entropy(hidden, head, text, head_axis=axis)


def decoders(sizes: Sizes) -> Iterator[Group]:
    """A whole training step of a decoder: all weights or an adapter, rematerialised."""
    name, words, batch, tokens = sizes.decoder
    config = decoder_config(name, vocab_size=words)
    types = {"dtype": sizes.dtype, "param_dtype": sizes.dtype}

    def model_of(adapter: Any) -> Decoder:
        model = Decoder(config, rngs=nnx.Rngs(0), remat="full", **types)
        return model if adapter is None else lro.adapters.attach(model, adapter, rngs=0)

    def build(make: Callable[..., Any], adapter: Any, logits: bool) -> Any:
        wrt = nnx.Param if adapter is None else lro.adapters.trainable
        graph, trained, rest = nnx.split(nnx.eval_shape(lambda: model_of(adapter)), wrt, ...)
        tx, given = make(), shaped(jnp.int32, batch, tokens)

        def loss(trained: Any, rest: Any, text: jax.Array) -> jax.Array:
            model = nnx.merge(graph, trained, rest)
            if not logits:
                return without_logits(model, model.hidden(text), text)
            return optax.softmax_cross_entropy_with_integer_labels(model(text), text).mean()

        def step(carry: Any, rest: Any, text: jax.Array) -> Any:
            trained, state = carry
            updates, state = tx.update(jax.grad(loss)(trained, rest, text), state, trained)
            return optax.apply_updates(trained, updates), state

        def inputs(key: jax.Array) -> tuple[Any, ...]:
            params, others, text = filled(
                key, (nnx.as_pure(trained), nnx.as_pure(rest), given), 0.02
            )
            return (params, tx.init(params)), (others, text)

        return step, inputs

    def build_in_backward(make: Callable[..., Any]) -> Any:
        model = nnx.eval_shape(lambda: model_of(None))
        fused = lro.update_in_backward(model, make(), loss=without_logits)
        given = nnx.as_pure(nnx.state(model, nnx.Param)), shaped(jnp.int32, batch, tokens)

        def step(carry: Any, text: jax.Array) -> Any:
            return fused.step(*carry, (text, text))[:2]

        def inputs(key: jax.Array) -> tuple[Any, ...]:
            params, text = filled(key, given, 0.02)
            return (params, fused.init(params)), (text,)

        return step, inputs

    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = layers * (4 * width**2 + 3 * width * inner) + width * words
    attention = layers * causal_flops(batch, tokens, width)
    adamw, lora = lambda: optax.adamw(1e-4), lro.adapters.LoRA(rank=ADAPTER_RANK)
    numbers = lro.weight_dimension_numbers(nnx.eval_shape(lambda: model_of(None)))
    options = {"rank": width // 4, "weight_dimension_numbers": numbers}
    rows = {
        "optax.adamw": (adamw, None, True),
        "lro.low_bit(optax.adamw)": (lambda: lro.low_bit(optax.adamw(1e-4)), None, True),
        "lro.galore": (lambda: lro.galore(1e-4, **options), None, True),
        "LoRA": (adamw, lora, True),
        "optax.adamw, no logits": (adamw, None, False),
        "LoRA, no logits": (adamw, lora, False),
    }
    passes = {
        label: (functools.partial(build, *row), 6 if row[1] is None else 4)
        for label, row in rows.items()
    }
    for label in ("optax.adamw", "lro.low_bit(optax.adamw)", "lro.galore"):
        make = functools.partial(build_in_backward, rows[label][0])
        passes[f"{label}, no logits, in backward"] = make, 6
    yield [
        Case(
            f"decoder, {label}",
            f"{name}, {times(batch, tokens)} tokens, {sizes.dtype}",
            make,
            flops * batch * tokens * weights + attention,
            sizes.dtype,
        )
        for label, (make, flops) in passes.items()
    ]
