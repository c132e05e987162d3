"""Several trained adapters of a model merged into one."""

from collections.abc import Mapping, Sequence
import functools
import math
import re
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.adapted_layers import (
    LayerAdapter,
    adapted_layers,
    check_names,
    sharing,
    weight_matrix,
    weight_shape,
)
from lowrank_optax.adapters.attaching import attach
from lowrank_optax.adapters.base import product
from lowrank_optax.adapters.low_rank import LowRank
from lowrank_optax.adapters.methods.lora import LoRA
from lowrank_optax.adapters.own_values import owned_parameters
from lowrank_optax.adapters.spectra import truncated_svd
from lowrank_optax.adapters.switching import activate
from lowrank_optax.matrices.orthonormal import in_turn
from lowrank_optax.matrices.selection import Path, path_string

How: TypeAlias = Literal["concatenate", "linear", "svd", "ties", "dare", "ties_svd", "dare_svd"]
Sign: TypeAlias = Literal["total", "frequency"]


def merge_adapters(
    model: nnx.Module,
    weights: Mapping[str, float],
    how: How,
    *,
    name: str,
    rank: int | None = None,
    density: float | None = None,
    sign: Sign | None = None,
    key: jax.Array | None = None,
) -> nnx.Module:
    r"""Merges adapters of a model into a new one, a LoRA, and applies that alone; in place.

    Each adapter :math:`t` changes a weight by :math:`s_t A_t B_t`, and the new one should change it
    by :math:`\sum_t w_t s_t A_t B_t`. Where a layer has only some of the adapters, those count.

    ================  ==============================================================================
    ``how``           the new change
    ================  ==============================================================================
    ``concatenate``   the sum itself, at the sum of the ranks
    ``svd``           the nearest matrix to the sum of rank ``rank``
    ``linear``        :math:`(\sum_t \sqrt{w_t s_t} A_t)(\sum_t \sqrt{w_t s_t} B_t)`: the sum, and
                      the products of unlike adapters
    ``ties``          TIES: of each :math:`A_t` and :math:`B_t` the ``density`` of largest entries,
                      and at each place the mean of those with the elected sign
    ``dare``          DARE: of each :math:`A_t` and :math:`B_t` a random ``density`` of the entries,
                      divided by it, summed
    ``ties_svd``      TIES of the changes themselves, then ``svd``
    ``dare_svd``      DARE of the changes themselves, then ``svd``
    ================  ==============================================================================

    PEFT's ``add_weighted_adapter`` calls them ``cat``, ``svd``, ``linear``, ``ties``,
    ``dare_linear``, ``ties_svd`` and ``dare_linear_svd``. The first two are exact; ``linear``,
    ``ties`` and ``dare`` of factors depend on how each adapter's change is divided into factors,
    and need equal ranks. The strengths of `activate` have no part in it, and dropout ends.

    Args:
      model: A model with the adapters, none of them merged into the weights.
      weights: The weight :math:`w_t` of each adapter by name; of any sign.
      how: See above.
      name: The name of the new adapter.
      rank: Rank of the new adapter, with the SVD; None for the largest rank of the adapters'
        changes, which is twice PiSSA's.
      density: The fraction of entries that TIES and DARE leave, above 0 and at most 1.
      sign: With TIES: how the sign at a place is elected, by the sum of the entries (``"total"``,
        the default) or by their number (``"frequency"``).
      key: PRNG key, with DARE.

    Returns:
      The model itself.

    Raises:
      ValueError: If the model lacks an adapter of a name or has one named ``name``, ``weights`` is
        empty or not finite, an adapter is merged or trains parameters of the model
        (`also_train`), ranks differ where they must not, ``density`` leaves no entry of an array,
        or an argument is missing, out of range or without a meaning for ``how``.
      TypeError: If an adapter's change has no low rank (DoRA) or depends on the input.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> model, x = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), jnp.ones(4)
      >>> for name in "ab":
      ...     method = lro.adapters.LoRA(rank=1, initial="random")
      ...     _ = lro.adapters.attach(model, method, where=".*", rngs=ord(name), name=name)
      >>> lro.adapters.activate(model, "a", "b", strengths={"a": 0.5, "b": 2.0})
      >>> y = model(x)
      >>> _ = lro.adapters.merge_adapters(model, {"a": 0.5, "b": 2.0}, "concatenate", name="both")
      >>> print(bool(jnp.allclose(model(x), y, atol=1e-5)))
      True

    Reference:
      Yadav et al., TIES-Merging, 2023, https://arxiv.org/abs/2306.01708; Yu et al., Language Models
      are Super Mario (DARE), 2023, https://arxiv.org/abs/2311.03099.
    """
    _check_options(how, rank, density, sign, key)
    if not weights or not all(math.isfinite(w) for w in weights.values()):
        raise ValueError(f"weights={dict(weights)} must give each adapter's name a finite number.")
    layers = _layers(model, check_names(model, weights))
    factors: dict[Path, tuple[jax.Array, jax.Array]] = {}
    with sharing(model):
        for number, (path, (layer, adapters)) in enumerate(layers.items()):
            string, sides = path_string(path) or "the model", weight_shape(layer)[-2:]
            pairs = tuple(_factors(string, layer, a) for a in adapters)
            if rank is not None and rank > min(sides):
                raise ValueError(f"rank={rank} is above the sides {sides} of {string}.")
            if how in ("linear", "ties", "dare"):
                _check_one_rank(string, how, adapters, pairs)
            if how.startswith("ties"):
                _check_density(string, how, density or 1.0, sides, pairs[0])
            factors[path] = _combined(
                jnp.array([float(weights[a.name]) for a in adapters], jnp.float32),
                pairs,
                None if key is None else jax.random.fold_in(key, number),
                how=how,
                rank=rank or max(pair.b.shape[-2] for pair in pairs),
                density=density or 1.0,
                sign=sign or "total",
            )
    rank_pattern = {f"^{re.escape(path_string(p))}$": b.shape[-2] for p, (_, b) in factors.items()}
    attach(
        model,
        LoRA(),
        lambda path, _: tuple(map(str, path)) in factors,
        rngs=0,  # what is drawn is replaced
        name=name,
        rank_pattern=rank_pattern,
    )
    for path, (layer, _) in layers.items():
        arrays = layer.adapters[name].arrays
        for array, factor in zip(("A", "B"), factors[path], strict=True):
            arrays[array].set_value(factor.reshape(arrays[array].shape))
    activate(model, name)
    return model


def _check_options(
    how: How, rank: int | None, density: float | None, sign: Sign | None, key: jax.Array | None
) -> None:
    if how not in get_args(How):
        raise ValueError(f"how={how!r} must be one of {', '.join(map(repr, get_args(How)))}.")
    kind = how.removesuffix("_svd")
    if rank is not None and not how.endswith("svd"):
        raise ValueError(f"rank={rank!r} has no meaning for how={how!r}: leave it out.")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank={rank!r} must be an int of at least 1, or None.")
    if density is not None and kind not in ("ties", "dare"):
        raise ValueError(f"density={density!r} has no meaning for how={how!r}: leave it out.")
    if kind in ("ties", "dare") and (density is None or not 0 < density <= 1):
        raise ValueError(f"density={density!r} must be above 0 and at most 1 for how={how!r}.")
    if sign is not None and kind != "ties":
        raise ValueError(f"sign={sign!r} has no meaning for how={how!r}: leave it out.")
    if sign not in (None, *get_args(Sign)):
        raise ValueError(f"sign={sign!r} must be 'total' or 'frequency'.")
    if key is not None and kind != "dare":
        raise ValueError(f"key has no meaning for how={how!r}, which draws nothing: leave it out.")
    if key is None and kind == "dare":
        raise ValueError(f"key=None: how={how!r} draws entries, and needs a key of jax.random.")


def _layers(model: Any, names: Sequence[str]) -> dict[Path, tuple[Any, list[LayerAdapter]]]:
    """The layers that have any of the adapters, each with those it has, in the order of names."""
    for owned in owned_parameters(model):
        for name in names:
            if name in owned.values.owners():
                raise ValueError(
                    f"the adapter {name!r} has trained values of {path_string(owned.path)} "
                    "(`also_train`), which cannot be merged: detach it, or leave it out."
                )
    found = {}
    for path, layer in adapted_layers(model).items():
        adapters = [layer.adapters[name] for name in names if name in layer.adapters]
        for adapter in layer.adapters.values():
            if adapter.merged:
                raise ValueError(
                    f"the adapter {adapter.name!r} of {path_string(path)} is merged into the "
                    "weight: unmerge the model first."
                )
        if adapters:
            found[path] = layer, adapters
    return found


class _Factors(NamedTuple):
    """The change of one adapter in a stack of ``L`` weights.

    Attributes:
      a: ``[L, d_in, r]``, float32; zero where the scale is.
      b: ``[L, r, d_out]``, scaled.
      scale: The scale in ``b``, float32 ``[L]``; zero where a layer has no adapter.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array


def _factors(path: str, layer: Any, adapter: LayerAdapter) -> _Factors:
    method, p, (*batch, d_in, d_out) = adapter.method, adapter.p(), weight_shape(layer)
    try:
        if not method.has_delta:
            method.delta(p, weight_matrix(layer))  # says why there is none
        a, b = method.to_lora(p)
    except TypeError as error:
        raise TypeError(f"{adapter.name!r} of {path}: {error}") from None
    rank, size = b.shape[-2], math.prod(batch)
    a = jnp.broadcast_to(a, (*batch, d_in, rank)).reshape(size, d_in, rank)
    b = jnp.broadcast_to(b, (*batch, rank, d_out)).reshape(size, rank, d_out)
    scale = jnp.asarray(method.scales(size) if isinstance(method, LowRank) else np.ones(size))
    if "rank_scale" in p:
        scale = p["rank_scale"].reshape(size, -1)[:, 0]
    a = jnp.where(scale[:, None, None] == 0, 0, a.astype(jnp.float32))
    return _Factors(a, b.astype(jnp.float32), scale.astype(jnp.float32))


def _check_one_rank(
    path: str, how: How, adapters: Sequence[LayerAdapter], pairs: Sequence[_Factors]
) -> None:
    """Checks that the adapters have one rank in all layers of a stack that they are in."""
    # An adapter's change may have another rank than its method: twice PiSSA's, at most the sides.
    found = [{pair.b.shape[-2] for pair in pairs}]
    for adapter, pair in zip(adapters, pairs, strict=True):
        method = adapter.method
        if isinstance(method, LowRank):
            traced = isinstance(pair.scale, jax.core.Tracer)
            is_there = slice(None) if traced else np.asarray(pair.scale) != 0
            found.append({method.max_rank, *method.ranks(len(pair.scale))[is_there].tolist()})
    ranks = max(found, key=len)
    if len(ranks) > 1:
        raise ValueError(
            f"how={how!r} adds factors, which need one rank, and those of {path} have "
            f"{', '.join(map(str, sorted(ranks)))}: use 'concatenate' or one with the SVD."
        )


def _check_density(
    path: str, how: How, density: float, sides: Sequence[int], pair: _Factors
) -> None:
    sizes = [math.prod(sides)] if how == "ties_svd" else [n * pair.b.shape[-2] for n in sides]
    if int(density * min(sizes)) == 0:
        raise ValueError(
            f"density={density} leaves none of the {min(sizes)} entries of an array of {path}."
        )


@functools.partial(jax.jit, static_argnames=("how", "rank", "density", "sign"))
def _combined(
    weights: jax.Array,
    pairs: tuple[_Factors, ...],
    key: jax.Array | None,
    *,
    how: How,
    rank: int,
    density: float,
    sign: Sign,
) -> tuple[jax.Array, jax.Array]:
    """The factors ``[L, d_in, R]`` and ``[L, R, d_out]`` of the new adapter."""
    reduced = functools.partial(_reduced, how=how, density=density, sign=sign)

    def one(layer: tuple[tuple[_Factors, ...], jax.Array]) -> tuple[jax.Array, jax.Array]:
        pairs, number = layer
        keys = [None] * 2 if key is None else jax.random.split(jax.random.fold_in(key, number))
        if how in ("concatenate", "svd"):
            a = jnp.concatenate([w * x.a for w, x in zip(weights, pairs, strict=True)], axis=-1)
            b = jnp.concatenate([pair.b for pair in pairs], axis=-2)
            return (a, b) if how == "concatenate" else _truncated_product(a, b, rank)
        if how.endswith("svd"):
            deltas = jnp.stack([product(pair.a, pair.b) for pair in pairs])
            return _truncated(reduced(deltas, weights, keys[0]), rank)
        # PEFT's rule: half of each weight and scale goes to either factor, the sign to the first.
        scale = jnp.stack([pair.scale for pair in pairs])
        whole = weights * scale
        half = jnp.sqrt(jnp.abs(whole))
        a, b = (jnp.stack([pair[i] for pair in pairs]) for i in range(2))
        b = b / jnp.where(scale == 0, 1, scale)[:, None, None]
        return reduced(a, jnp.sign(whole) * half, keys[0]), reduced(b, half, keys[1])

    return jax.lax.map(one, (pairs, jnp.arange(pairs[0].a.shape[0])))


def _reduced(
    x: jax.Array, weights: jax.Array, key: Any, *, how: How, density: float, sign: Sign
) -> jax.Array:
    """One array of those of all adapters, ``x [adapters, m, n]``."""
    weighted = weights[:, None, None] * x
    if how == "linear":
        return weighted.sum(0)
    if how.startswith("dare"):
        kept = jax.random.bernoulli(key, density, x.shape)
        return jnp.where(kept, weighted / density, 0).sum(0)
    trimmed = jnp.where(jax.vmap(lambda y: _largest(y, density))(x), x, 0)
    votes = trimmed if sign == "total" else jnp.sign(trimmed)
    agree = jnp.sign(trimmed) == jnp.where(votes.sum(0) >= 0, 1, -1)
    return jnp.where(agree, weighted, 0).sum(0) / jnp.maximum(agree.sum(0), 1)


def _largest(x: jax.Array, density: float) -> jax.Array:
    """Which entries are the ``density`` of largest size; of equal ones the first."""
    order = jnp.argsort(-jnp.abs(x).ravel(), stable=True)
    count = int(density * x.size)
    return jnp.zeros(x.size, bool).at[order[:count]].set(True).reshape(x.shape)


def _truncated(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    u, s, v = truncated_svd(matrix, rank)
    return u, s[:, None] * v.T


def _truncated_product(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """`_truncated` of ``a b``, without that matrix."""
    (q_a, r_a), (q_b, r_b) = (in_turn(lambda x: jnp.linalg.qr(x), each) for each in (a, b.T))
    first, second = _truncated(product(r_a, r_b.T), rank)
    return product(q_a, first), product(second, q_b.T)
