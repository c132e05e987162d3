"""Stochastic and compensated rounding of bfloat16 parameters, which keep small updates.

A bfloat16 has eight significant bits: an update below a 256th of its parameter, rounded to the
nearest, is lost at every step. Weight decay always is.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args
import warnings

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices.draws import drawn
from lowrank_optax.matrices.paths import leaves_by_path, path_string
from lowrank_optax.slices.call import Whole, keys_of_rows
from lowrank_optax.slices.update import update_in_slices

Rounding = Literal["stochastic", "compensated"]


class RoundUpdatesState(NamedTuple):
    """State of `round_updates`.

    Attributes:
      count: Number of updates so far, int32, for random numbers; otherwise ``()``.
      compensation: What "compensated" adds to the bits of a parameter as a float32, int16 in the
        parameters' shapes (``MaskedNode`` where one is not bfloat16); otherwise ``()``.
    """

    count: Any
    compensation: Any


def round_updates(
    rounding: Rounding = "stochastic", seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Round updates of bfloat16 parameters so that small ones act: the last part of a chain.

    ``"stochastic"`` rounds the sum of parameter and update up or down at random, with the sum as
    expectation: small updates act sometimes instead of never. It needs no memory.
    ``"compensated"`` rounds to the nearest, stores the lower half of the float32 that this cuts
    off, and adds it before the next update: the parameters are rounded float32 ones, for two more
    bytes each. (This is Kahan's compensation in integers: one in bfloat16 itself loses updates
    below a 256th of what it holds.)

    Updates become the float32 differences of the new and the old parameter, which
    ``optax.apply_updates`` (and ``nnx.Optimizer``) adds without error. The optimizer before should
    not round either: put it in `in_float32`. Parameters of other dtypes are left to
    ``optax.apply_updates``.

    Args:
      rounding: ``"stochastic"`` or ``"compensated"``.
      seed: Seed of the random numbers, combined with the step and the path of a leaf.

    Returns:
      A transformation that needs ``params``, with the state `RoundUpdatesState`.

    Raises:
      ValueError: If ``rounding`` is unknown; in ``update``, without ``params``, or if all updates
        are bfloat16, as gradients are where `round_updates` comes before the optimizer. If only
        those of bfloat16 parameters are, it warns.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = optax.chain(lro.in_float32(optax.sgd(1.0)), lro.round_updates("stochastic"))
      >>> params = {"kernel": jnp.ones(10_000, jnp.bfloat16)}
      >>> gradient = {"kernel": jnp.full(10_000, -(2.0**-9), jnp.bfloat16)}  # a quarter of a step
      >>> updates, _ = tx.update(gradient, tx.init(params), params)
      >>> new = optax.apply_updates(params, updates)["kernel"]
      >>> print(new.dtype, sorted(set(new.tolist())), f"{new.astype(jnp.float32).mean():.3f}")
      bfloat16 [1.0, 1.0078125] 1.002

    Reference:
      Zamirai et al., Revisiting BFloat16 Training, 2020, https://arxiv.org/abs/2010.06192: both
      ways, Algorithms 2 and 3.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding={rounding!r} must be 'stochastic' or 'compensated'.")
    stochastic = rounding == "stochastic"

    def init_fn(params: optax.Params) -> RoundUpdatesState:
        if stochastic:
            return RoundUpdatesState(jnp.zeros([], jnp.int32), ())
        keep = lambda p: jnp.zeros_like(p, jnp.int16) if _is_bfloat16(p) else optax.MaskedNode()
        return RoundUpdatesState((), jax.tree.map(keep, params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        whole: Whole | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RoundUpdatesState]:
        del extra_args
        if params is None:
            raise ValueError("round_updates needs params: call tx.update(grads, state, params).")
        by_path, treedef = leaves_by_path(updates), jax.tree.structure(updates)
        olds = treedef.flatten_up_to(params)
        if whole is None:  # of a part all leaves may be frozen
            found = [x for x in zip(by_path.items(), olds, strict=True) if _is_bfloat16(x[1])]
            # Some may be bfloat16: the zeros of frozen parameters.
            if found and all(_is_bfloat16(update) for (_, update), _ in found):
                _refuse_rounded(path_string(found[0][0][0]), len(found) == len(olds))
        if stochastic:
            key = jax.random.fold_in(jax.random.key(seed), state.count)
            new = []
            for (path, x), old in zip(by_path.items(), olds, strict=True):
                if _is_bfloat16(old):
                    exact = old.astype(jnp.float32)
                    keys = keys_of_rows(key, path, x, whole)
                    x = stochastic_round(exact + x.astype(jnp.float32), keys) - exact
                new.append(x)
            count = optax.safe_increment(state.count)
            return treedef.unflatten(new), RoundUpdatesState(count, ())
        losses = treedef.flatten_up_to(state.compensation)
        pairs = [
            _compensated(old, x, lost) if _is_bfloat16(old) else (x, lost)
            for old, x, lost in zip(olds, by_path.values(), losses, strict=True)
        ]
        compensation = treedef.unflatten([lost for _, lost in pairs])
        return treedef.unflatten([x for x, _ in pairs]), RoundUpdatesState((), compensation)

    core = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    if not stochastic:
        return core  # one pass over whole leaves, without a temporary
    in_bfloat16 = lambda call: list(map(_is_bfloat16, call.params))
    return core._replace(update=update_in_slices(core, in_bfloat16, []))


def _refuse_rounded(path: str, every: bool) -> None:
    """Raise if all updates are bfloat16; warn if only those of bfloat16 parameters are."""
    message = (
        f"round_updates was given bfloat16 updates, as of {path!r}, which are rounded already. It "
        "must come last in the chain, after the optimizer, and the optimizer in "
        "lro.in_float32(...)."
    )
    if every:
        raise ValueError(message)
    warnings.warn(f"{message} (All bfloat16 parameters may be frozen.)", stacklevel=4)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Round float32 ``x`` to a neighbouring bfloat16 at random, with ``x`` as expectation.

    The result is float32, of numbers that bfloat16 holds exactly. NaN and infinities stay. ``key``
    is one key, or one for each row.
    """
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = functools.partial(jax.random.bits, dtype=jnp.uint16)
    noise = drawn(bits, key, x.shape).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(((raw + noise) >> 16) << 16, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x)


def _compensated(old: jax.Array, update: jax.Array, lost: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The change of a parameter, and what the new one loses of the float32 it stands for."""
    exact = old.astype(jnp.float32)
    raw = jax.lax.bitcast_convert_type(exact, jnp.int32) + lost.astype(jnp.int32)
    new = jax.lax.bitcast_convert_type(raw, jnp.float32) + update.astype(jnp.float32)
    raw = jax.lax.bitcast_convert_type(new, jnp.int32)
    upper = ((raw + 0x8000) >> 16) << 16  # to the nearest
    rounded = jax.lax.bitcast_convert_type(upper, jnp.float32)
    finite = jnp.isfinite(new) & jnp.isfinite(rounded)
    lost = jnp.where(finite, raw - upper, 0).astype(jnp.int16)
    return jnp.where(finite, rounded, new) - exact, lost


def _is_bfloat16(x: Any) -> bool:
    return x.dtype == jnp.bfloat16
