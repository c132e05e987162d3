"""What of a decoder's block is saved for the backward pass: the choices, and the names."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lowrank_optax.activations.block_codes import check_bits
from lowrank_optax.activations.policies import Policy, PolicyTable, policy

# The attributes of jax.checkpoint_policies that are policies; the others make one from arguments.
REMAT_POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)

INTERMEDIATES = (
    "attention_query",
    "attention_key",
    "attention_value",
    "attention_context",
    "attention_output",
    "mlp_gate",
    "mlp_up",
    "mlp_hidden",
)
"""The named intermediates of a block: query, key and value as they meet (rotated), their result
before and after the output projection, and in the MLP `gate(x)`, `up(x)` and `silu(gate) * up`."""

GATED = ("mlp_gate", "mlp_up")

Remat: TypeAlias = str | PolicyTable | Callable[..., Any] | None


def check_remat_every(every: int, remat: Remat, blocks: int) -> None:
    """Checks a decoder's `remat_every`, for this number of blocks that follow one another.

    Raises:
        ValueError: as `Decoder`.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"remat_every must be an int of at least 1, got {every!r}")
    if every > 1 and remat != "full":
        raise ValueError(
            f"remat_every={every} saves the input of every {every}th block alone: set "
            f"remat='full', not {remat!r}"
        )
    if blocks % every:
        raise ValueError(
            f"remat_every={every} must divide the number of blocks, which is {blocks} (without "
            "first_block)"
        )


def check_remat(remat: Remat, bits: int | None) -> tuple[Any, int | None]:
    """Checks a decoder's `remat` and `activation_bits`; tables become policies, and say the bits.

    Raises:
        ValueError: as `Decoder`.
    """
    check_bits(bits, "activation_bits")
    if isinstance(remat, Mapping):
        remat = policy(remat)
    if isinstance(remat, Policy):
        return remat, _bits_of(remat, bits)
    if not (remat is None or callable(remat) or remat in ("full", *REMAT_POLICIES)):
        raise ValueError(
            f"remat must be None, 'full', a table of names, a checkpoint policy, or the name of "
            f"one ({', '.join(REMAT_POLICIES)}), got {remat!r}"
        )
    return remat, bits


def rematerialised(call: Callable[..., Any], remat: Any, in_scan: bool) -> Callable[..., Any]:
    """A call, whose first argument is static, under `jax.checkpoint`."""
    if remat is None:
        return call
    if isinstance(remat, str):
        remat = None if remat == "full" else getattr(jax.checkpoint_policies, remat)
    # A scan already keeps XLA from merging the recomputation with the first pass.
    return jax.checkpoint(call, static_argnums=0, policy=remat, prevent_cse=not in_scan)


def in_turn(
    call: Callable[..., Any], remat: Any, every: int, in_scan: bool = False
) -> Callable[..., Any]:
    """Runs `every` blocks, of which the input of the first one is saved.

    Backward, they are run once more, but for the last, to have the inputs of each, and then each
    again for its gradients.

    Returns:
        `(graphdefs, x, layers) -> (x, what each call gives)`; the layers of these blocks are a
        list, or stacked in a scan.
    """
    call = rematerialised(call, remat, in_scan and every == 1)

    def run(graphdefs: tuple[Any, ...], x: Any, layers: Any) -> tuple[Any, Any]:
        outputs = []
        for i, graphdef in enumerate(graphdefs):
            layer = jax.tree.map(lambda stack: stack[i], layers) if in_scan else layers[i]  # noqa: B023
            x, output = call(graphdef, x, *layer)
            outputs.append(output)
        return x, outputs

    return run if every == 1 else rematerialised(run, remat, in_scan)


def scanned(
    call: Callable[..., Any], graphdef: Any, x: Any, layers: Any, remat: Any, every: int
) -> tuple[Any, Any]:
    """As `jax.lax.scan` over stacked blocks, of which `every` are run by `in_turn`."""
    if every == 1:
        call = rematerialised(call, remat, in_scan=True)
        return jax.lax.scan(lambda x, layer: call(graphdef, x, *layer), x, layers)
    # A slice for all of these blocks would be a copy of their weights: each reads its own from the
    # whole stacks, and does so again where it is run again, or that would be saved.
    whole = jax.lax.stop_gradient(layers)

    def one(graphdef: Any, x: Any, number: jax.Array, layer: Any) -> tuple[Any, Any]:
        read = lambda stack, own: _with_gradient_of(
            own, jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)
        )
        return call(graphdef, x, *jax.tree.map(read, whole, layer))

    run = in_turn(one, remat, every, in_scan=True)

    def some(x: Any, given: Any) -> tuple[Any, Any]:
        x, outputs = run((graphdef,) * every, x, given)
        return x, jax.tree.map(lambda *outputs: jnp.stack(outputs), *outputs)

    count = len(jax.tree.leaves(layers)[0])
    in_groups = lambda stack: stack.reshape(-1, every, *stack.shape[1:])
    x, outputs = jax.lax.scan(some, x, jax.tree.map(in_groups, (jnp.arange(count), layers)))
    return x, jax.tree.map(lambda stack: stack.reshape(count, *stack.shape[2:]), outputs)


def _with_gradient_of(x: jax.Array, value: jax.Array) -> jax.Array:
    """The value, which is that of `x`, whose gradient it has; so `x` is never read."""
    return _value(x, value) if jnp.issubdtype(value.dtype, jnp.inexact) else value


@jax.custom_jvp
def _value(x: jax.Array, value: jax.Array) -> jax.Array:
    del x
    return value


# The value again by `_value`: its derivative is that of `x` at the second order, too.
_value.defjvp(lambda given, tangents: (_value(*given), tangents[0]))


def _bits_of(remat: Policy, activation_bits: int | None) -> int | None:
    """The bits that a table gives to gate and up."""
    table = remat.table
    unknown = [name for name in table if name not in INTERMEDIATES]
    if unknown:
        raise ValueError(
            f"remat names {unknown[0]!r}, which is no intermediate of a block: "
            f"{', '.join(INTERMEDIATES)}."
        )
    if activation_bits is not None:
        raise ValueError(
            f"activation_bits={activation_bits} and a table in remat cannot be given together: "
            f"write the bits of mlp_gate and mlp_up in the table."
        )
    bits = {name: place for name, place in table.items() if isinstance(place, int)}
    if not bits:
        return None
    if set(bits) != set(GATED) or len(set(bits.values())) > 1:
        raise ValueError(
            f"remat keeps {bits} in bits: in a block these are mlp_gate and mlp_up alone, both in "
            f"the same number, as they are coded where the two are multiplied."
        )
    if "mlp_hidden" not in table:
        raise ValueError(
            "remat keeps mlp_gate and mlp_up in bits, so it must say what becomes of mlp_hidden: "
            "'save' or 'offload'; or 'recompute', which computes gate and up again for the "
            "gradient of down, and saves memory only where down is frozen."
        )
    return next(iter(bits.values()))
