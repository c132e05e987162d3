"""A rank for each layer: by the spectra of weights (LaMDA++), or by depth (PRILoRA)."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
import math
import re
from typing import Any, TypeAlias

import jax
from jax.typing import ArrayLike
import numpy as np

from lowrank_optax.adapters.spectra import singular_values
from lowrank_optax.matrices.paths import normalised_path

_ARRAYS = re.compile(r"/?adapters/[^/]+/arrays$")  # behind the layer's path, in an NNX model

RankPattern: TypeAlias = Mapping[str, int | tuple[int, ...]]
"""Ranks by patterns of layers' paths, as ``rank_pattern`` of `attach`."""


def energy(singular_values: ArrayLike) -> np.ndarray:
    r"""The fraction of a matrix that its ``r`` leading singular triplets hold, for every ``r``.

    .. math::
      E(r) = \sum_{j \le r} \sigma_j^2 \, \Big/ \, \sum_j \sigma_j^2

    Args:
      singular_values: ``[..., k]``, in any order.

    Returns:
      ``[..., k]`` float64, for ``r = 1, ..., k``: it rises to 1. For a matrix of zeros, 1.

    Example:
      >>> from lowrank_optax.adapters import energy
      >>> print(energy([3.0, 1.0]))
      [0.9 1. ]

    Reference:
      Azizi et al., LaMDA, 2024, https://arxiv.org/abs/2406.12832: LaMDA++.
    """
    sigma = np.abs(np.asarray(singular_values, np.float64))
    largest = sigma.max(axis=-1, keepdims=True, initial=0.0)
    squares = np.square(np.sort(sigma, axis=-1)[..., ::-1] / np.where(largest > 0, largest, 1))
    total = squares.sum(axis=-1, keepdims=True)
    return np.where(total > 0, squares.cumsum(axis=-1) / np.where(total > 0, total, 1), 1.0)


def allocate_ranks(
    spectra: Mapping[str, ArrayLike], ranks: Sequence[int], average: float
) -> dict[str, int | tuple[int, ...]]:
    r"""Ranks of layers, out of a set, whose average keeps to a budget.

    All layers start at the smallest rank. The layer whose energy (`energy`) rises most per further
    rank, :math:`(E(r') - E(r)) / (r' - r)`, gets the next rank in the set, as long as there is a
    gain and the sum of ranks keeps within the budget. Among equal ones, the layer of the smaller
    rank comes first, then that of the flatter spectrum (by
    :math:`E(r_{\max}) - E(r_{\min})`), then the first.

    Args:
      spectra: Singular values by pattern or path (`weight_spectra`): ``[k]``, or ``[L, k]`` of a
        stack.
      ranks: Allowed ranks.
      average: Largest average of all layers' ranks.

    Returns:
      The rank for each key, or a tuple of one for each layer of a stack (one number if they are
      equal): ``rank_pattern`` of `attach`, or ``rank`` of a method.

    Raises:
      ValueError: If there is no layer or no rank, a rank is below 1, or ``average`` is below the
        smallest.

    Example:
      >>> from lowrank_optax.adapters import allocate_ranks
      >>> spectra = {"steep": [8.0, 1.0, 0.5, 0.1], "stack": [[1.0] * 4, [4.0, 1.0, 1.0, 1.0]]}
      >>> allocate_ranks(spectra, ranks=(1, 2, 4), average=2)
      {'steep': 1, 'stack': (4, 1)}

    Reference:
      After Azizi et al., LaMDA, 2024, https://arxiv.org/abs/2406.12832, whose rule is not
      published in full.
    """
    allowed = sorted(set(ranks))
    if not allowed or allowed[0] < 1 or not spectra:
        raise ValueError(f"ranks={ranks!r} must be some of at least 1, for at least one layer.")
    if average < allowed[0]:
        raise ValueError(f"average={average} must be at least the smallest of ranks={ranks!r}.")
    stacks = {key: np.atleast_2d(np.asarray(sigma)) for key, sigma in spectra.items()}
    energies = [energy(sigma) for stack in stacks.values() for sigma in stack]
    chosen = iter(_raised(energies, allowed, average * len(energies)))
    found = {}
    for key, stack in stacks.items():
        of_stack = tuple(next(chosen) for _ in stack)
        found[key] = of_stack[0] if len(set(of_stack)) == 1 else of_stack
    return found


def _raised(energies: Sequence[np.ndarray], ranks: Sequence[int], budget: float) -> list[int]:
    """The rank of each layer: one after the other is raised while the budget lasts."""
    steps = np.diff(ranks)
    # [layers, ranks]: beyond a weight's own rank there is nothing to gain.
    held = np.array([[e[min(r, len(e)) - 1] for r in ranks] for e in energies])
    # Falling in exact arithmetic; rounding must not raise a layer twice before its equal.
    gains = np.minimum.accumulate(np.diff(held, axis=1) / steps, axis=1)
    flatness = held[:, -1] - held[:, 0]
    at = [0] * len(energies)
    total = len(energies) * ranks[0]
    while True:
        open_ = [i for i, level in enumerate(at) if level < len(steps) and gains[i, level] > 0]
        if not open_:
            break
        best = min(open_, key=lambda i: (-gains[i, at[i]], at[i], -flatness[i], i))
        total += steps[at[best]]
        if total > budget:
            break
        at[best] += 1
    return [ranks[level] for level in at]


def linear_ranks(first: int, last: int, layers: int) -> tuple[int, ...]:
    r"""Ranks that grow (or fall) linearly with depth.

    .. math::
      r_l = \mathrm{round}\bigl(r_{\text{first}} + (r_{\text{last}} - r_{\text{first}})
            \, l / (L - 1)\bigr), \qquad l = 0, \dots, L - 1,

    with halves rounded to the even neighbour. If ``first + last`` is even, the sum is exactly
    ``layers * (first + last) / 2``, the budget of one rank for all; if it is odd, ranks that fall
    on a half can change it by a little: take ``sum`` of the result. A single layer has the mean.

    Args:
      first: Rank of the first layer.
      last: Rank of the last layer.
      layers: Number of layers.

    Returns:
      A rank for each layer: ``rank`` of a method for a stack of them, or values of
      ``rank_pattern``.

    Raises:
      ValueError: If an argument is below 1.
      TypeError: If an argument is not an int.

    Example:
      >>> from lowrank_optax.adapters import linear_ranks
      >>> ranks = linear_ranks(4, 12, layers=12)
      >>> print(ranks, sum(ranks))
      (4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12) 96
      >>> pattern = {f"^blocks/{i}/": rank for i, rank in enumerate(ranks)}

    Reference:
      Benedek and Wolf, PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation, 2024,
      https://arxiv.org/abs/2401.11316.
    """
    for name, value in (("first", first), ("last", last), ("layers", layers)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be an int.")
        if value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1.")
    if layers == 1:
        return (round(Fraction(first + last, 2)),)
    return tuple(
        round(Fraction(first * (layers - 1) + (last - first) * layer, layers - 1))
        for layer in range(layers)
    )


def weight_spectra(model: Any, where: Any = None) -> dict[str, jax.Array]:
    """Singular values of a Flax NNX model's layers, for `allocate_ranks`.

    Args:
      model: An NNX model.
      where: Which layers, as for `attach`.

    Returns:
      ``[k]``, or ``[L, k]`` of stacked layers, float32, by patterns that match one layer's path.

    Raises:
      ValueError: If ``where`` matches no layer.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
      >>> spectra = lro.adapters.weight_spectra(model, where="query|value")
      >>> print({pattern: sigma.shape for pattern, sigma in spectra.items()})
      {'^query$': (8,), '^value$': (8,)}
      >>> ranks = lro.adapters.allocate_ranks(spectra, ranks=(1, 2, 4), average=3)
      >>> method = lro.adapters.LaMDA()
      >>> _ = lro.adapters.attach(model, method, "query|value", rngs=0, rank_pattern=ranks)

    Reference:
      Azizi et al., LaMDA, 2024, https://arxiv.org/abs/2406.12832: LaMDA++.
    """
    from lowrank_optax.adapters.adapted_layers import chosen_layers, weight_matrix

    spectra: dict[str, jax.Array] = {}
    for path, layer in chosen_layers(model, where).items():
        sigma = singular_values(weight_matrix(layer))
        shape = (-1, sigma.shape[-1]) if sigma.ndim > 1 else (-1,)
        spectra[f"^{re.escape('/'.join(path))}$"] = sigma.reshape(shape)
    return spectra


def ranks_at(
    path: Any, batch: tuple[int, ...], largest: int, rank_pattern: RankPattern | None
) -> np.ndarray:
    """The ranks ``[*batch]`` of the matrices of an adapter's leaf, padded to ``largest``.

    Raises:
      ValueError: If ``rank_pattern`` has a tuple of another length than the stack.
    """
    layer = _ARRAYS.sub("", "/".join(normalised_path(path)[:-1]))
    pattern = next((p for p in rank_pattern or {} if re.search(p, layer)), None)
    ranks = largest if rank_pattern is None or pattern is None else rank_pattern[pattern]
    if isinstance(ranks, int):
        return np.full(batch, min(ranks, largest))
    if len(ranks) != math.prod(batch):
        raise ValueError(
            f"rank_pattern[{pattern!r}]={ranks} has {len(ranks)} ranks for a stack of {batch} "
            f"matrices at {layer!r}."
        )
    return np.minimum(np.array(ranks).reshape(batch), largest)
