"""What the TPU compiler keeps of activations in a few bits and of sketched inputs."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import optax
import pytest

from lowrank_optax.activations import few_bit, policy
from lowrank_optax.layers import Sketch, randomized_linear
from lowrank_optax.models import Decoder, decoder_config
from lowrank_optax.planning import saved_residuals

pytestmark = pytest.mark.slow

LAYERS, TOKENS, WIDTH, HIDDEN = 8, 8192, 1024, 4096
CODES = TOKENS * HIDDEN * LAYERS // 2  # bytes, of 4 bits


@pytest.fixture(autouse=True)
def on_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are laid out for JAX's default backend."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def mlp_loss(activation: Any, sketch: Sketch | None) -> Any:
    """``x + act(x A) B``, scanned; what is trained comes first."""

    def product(x: jax.Array, weight: jax.Array, key: jax.Array) -> jax.Array:
        if sketch is None:
            return x @ weight
        return randomized_linear(x, weight, key=key, sketch=sketch)

    def loss(trained: Any, fixed: Any, x: jax.Array) -> jax.Array:
        weights = trained | fixed
        keys = jax.random.split(jax.random.key(0), (LAYERS, 2))

        def layer(x: jax.Array, given: Any) -> tuple[jax.Array, None]:
            a, b, keys = given
            return x + product(activation(product(x, a, keys[0])), b, keys[1]), None

        y, _ = jax.lax.scan(layer, x, (weights["a"], weights["b"], keys))
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return loss


def mlp_bytes(
    allocated_for: Callable[..., Any], activation: Any, frozen: bool, sketch: Sketch | None = None
) -> tuple[int, int]:
    """What is counted to be kept, and the temporaries that are compiled for a v5e."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    a, b = {"a": of(LAYERS, WIDTH, HIDDEN)}, {"b": of(LAYERS, HIDDEN, WIDTH)}
    given = (a, b) if frozen else (a | b, {})
    loss = mlp_loss(activation, sketch)
    report = saved_residuals(loss, *given, of(TOKENS, WIDTH), compiled=False)
    return report.total_bytes, allocated_for("v5e", jax.grad(loss), *given, of(TOKENS, WIDTH))[1]


def test_before_a_frozen_product_four_bits_are_all_that_is_kept(
    allocated_for: Callable[..., Any],
) -> None:
    """Beside the inputs of the first products, in bfloat16."""
    gelu = few_bit(jax.nn.gelu, bits=4)
    check(CODES + 2 * LAYERS * TOKENS * WIDTH, mlp_bytes(allocated_for, gelu, frozen=True))


def test_with_sketched_inputs_the_codes_are_most_of_what_is_left(
    allocated_for: Callable[..., Any],
) -> None:
    """An eighth of the rows of both products' inputs, in bfloat16, and the codes."""
    gelu, sketch = few_bit(jax.nn.gelu, bits=4), Sketch("stratified", fraction=1 / 8)
    theory = CODES + 2 * LAYERS * TOKENS * (WIDTH + HIDDEN) // 8
    check(theory, mlp_bytes(allocated_for, gelu, False, sketch))


def check(theory: int, measured: tuple[int, int]) -> None:
    """Of the stack: the loss also keeps its argument, in float32, which is computed again."""
    kept, temporary = measured
    print(f"theory {theory / 2**20:.0f} MiB, temporaries {temporary / 2**20:.0f} MiB")
    assert kept == pytest.approx(theory + 4 * TOKENS * WIDTH, rel=1e-3)
    assert temporary == pytest.approx(theory, rel=0.1)


def test_a_decoder_saves_what_is_counted(allocated_for: Callable[..., Any]) -> None:
    """With a batch so large, and weights so small, that activations are most."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}  # of 128, as wide as a tile
    sizes = {"num_hidden_layers": 12, "intermediate_size": 1024, "vocab_size": 512}
    config = decoder_config("llama-tiny", **heads, **sizes)
    tokens = jax.ShapeDtypeStruct((64, 128), jnp.int32)
    kept, temporary = {}, {}
    for bits in (None, 4):
        types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "activation_bits": bits}
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **types))  # noqa: B023
        kept[bits] = saved_residuals(decoder_loss, model, tokens, compiled=False).total_bytes
        graphdef, params = nnx.split(model)
        gradient = jax.grad(lambda p, t: decoder_loss(nnx.merge(graphdef, p), t))  # noqa: B023
        _, temporary[bits] = allocated_for("v5e", gradient, nnx.as_pure(params), tokens)
    counted, saved = kept[None] - kept[4], temporary[None] - temporary[4]
    print(f"counted {counted / 2**20:.0f} MiB, saved {saved / 2**20:.0f} MiB")
    assert saved == pytest.approx(counted, rel=0.15)


def decoder_loss(model: Decoder, tokens: jax.Array) -> jax.Array:
    logits = model(tokens)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def policy_loss(table: Any) -> Any:
    """Gated layers in a scan: without ``jax.checkpoint`` for None, else with what a table says."""

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, given: Any) -> tuple[jax.Array, None]:
            gate = checkpoint_name(x @ given["gate"], "gate")
            up = checkpoint_name(x @ given["up"], "up")
            hidden = checkpoint_name(jax.nn.silu(gate) * up, "hidden")
            return x + hidden @ given["down"], None

        if table is not None:
            own = policy(table) if table else None
            layer = jax.checkpoint(layer, policy=own, prevent_cse=False)
        y, _ = jax.lax.scan(layer, x, weights)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return loss


@pytest.mark.full
def test_what_a_policy_saves_is_in_the_programs_temporaries_or_on_the_host(
    allocated_for: Callable[..., Any],
) -> None:
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    wide, x = of(LAYERS, WIDTH, HIDDEN), of(TOKENS, WIDTH)
    weights = {"gate": wide, "up": wide, "down": of(LAYERS, HIDDEN, WIDTH)}

    def bytes_of(table: Any) -> tuple[int, int]:
        program, device = allocated_for("v5e", jax.grad(policy_loss(table)), weights, x)
        return device, program.memory_analysis().host_temp_size_in_bytes

    none, full = bytes_of(None), bytes_of({})
    saved, offloaded = bytes_of({"gate": "save"}), bytes_of({"gate": "offload"})
    print([[x / 2**20 for x in sizes] for sizes in (none, saved, offloaded, full)])
    array = 2 * LAYERS * TOKENS * HIDDEN
    assert full[0] < saved[0] < none[0]
    assert array / 2 < saved[0] - full[0] < array * 1.1
    assert offloaded[1] >= array
    assert full[0] <= offloaded[0] < saved[0] - array / 4
    assert none[1] == full[1] == saved[1] == 0
