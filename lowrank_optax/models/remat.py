"""What of a decoder's block is saved for the backward pass: the choices, and the names."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

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
    """A block's call, whose first argument is static, under `jax.checkpoint`."""
    if remat is None:
        return call
    if isinstance(remat, str):
        remat = None if remat == "full" else getattr(jax.checkpoint_policies, remat)
    # A scan already keeps XLA from merging the recomputation with the first pass.
    return jax.checkpoint(call, static_argnums=0, policy=remat, prevent_cse=not in_scan)


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
