"""Maestro layers made smaller for real: the directions beyond the current ranks are removed."""

from collections.abc import Callable
import copy
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from lowrank_optax.layers.maestro.maestro_conversion import check_unadapted
from lowrank_optax.layers.maestro.ordered_layer import MaestroLayer
from lowrank_optax.layers.maestro.proximal import INWARD, OUTWARD
from lowrank_optax.layers.maestro.ranks import maestro_modules
from lowrank_optax.layers.structured.factors import Factors
from lowrank_optax.matrices.paths import owner_of
from lowrank_optax.modules.carrying import carry
from lowrank_optax.modules.wrap import become


def compact(
    model: nnx.Module, opt_state: Any = None, init: Callable[[Any], Any] | None = None
) -> Any:
    """Remove the directions beyond the current ranks, in place, outside of ``jit``.

    A layer whose factors would have more parameters than its weight becomes an ``nnx.Linear`` or
    ``nnx.Conv``; at equal numbers it stays as it is. Layers of a stack keep the largest rank among
    them, and mask. A rank of 0 keeps one direction, masked. The outputs at the current ranks stay
    the same, to rounding; sampled ranks are removed.

    The model then has other parameters: compile its step again. Moments of an optimizer are cut
    like the parameters they belong to; for a layer that becomes dense they start again from zero
    while the optimizer's count goes on, so that Adam's next steps in it are up to six times the
    learning rate. Ranks fall seldom enough for that: call it once or twice in a run, and `shrink`
    in between.

    Args:
      model: A model with Maestro layers.
      opt_state: State of any optax transformation for the model's parameters; None without one.
      init: Function that makes such a state for the smaller parameters, called with
        ``nnx.state(model, nnx.Param)``: ``tx.init`` of the transformation. With
        ``opt_state=nnx.state(optimizer)`` of an ``nnx.Optimizer`` it is
        ``lambda _: nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param))``.

    Returns:
      The state for the smaller model; None without one.

    Raises:
      ValueError: If the model has no Maestro layer, the factors of one have adapters, only one of
        ``opt_state`` and ``init`` is given, they are of different transformations, or an array that
        belongs to a factor that is cut is not like it (moments in 8 bits, or in a subspace): make
        these with ``tx.init`` again. The model is then as before.
      TypeError: If ranks are traced.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro, optax
      >>> from lowrank_optax.layers import maestro
      >>> model = nnx.Sequential(lro.layers.MaestroLinear(8, 16, rngs=nnx.Rngs(0)))
      >>> tx = optax.adam(1e-3)
      >>> opt_state = tx.init(nnx.state(model, nnx.Param))
      >>> opt_state = maestro.compact(maestro.truncate(model, 2), opt_state, tx.init)
      >>> print(maestro.summary(model))
      path      weight  ranks  parameters  of dense
      layers/0  8 × 16  2 / 2          48     37.5%
      >>> opt_state[0].mu["layers"][0]["ordered_in"]["kernel"].shape
      (8, 2)

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929.
    """
    if (opt_state is None) != (init is None):
        given, missing = ("opt_state", "init") if init is None else ("init", "opt_state")
        raise ValueError(f"{given} is given without {missing}: give compact both, or neither.")
    layers = maestro_modules(model)
    for path, layer in layers.items():
        if isinstance(layer.rank[...], jax.core.Tracer):
            raise TypeError("compact makes arrays as small as the ranks: call it outside jit.")
        check_unadapted(path, layer)
    before = {path: copy.copy(layer) for path, layer in layers.items()}
    try:
        cuts, dense = _make_smaller(layers)
        if opt_state is None or init is None:
            return None
        return _carried(init(nnx.state(model, nnx.Param)), opt_state, cuts, dense)
    except BaseException:
        for path, layer in layers.items():
            become(layer, before[path])
        raise


class _Cut(NamedTuple):
    """What is cut from a parameter: its shape before, axis of directions and rank."""

    shape: tuple[int, ...]
    axis: int
    rank: int
    stack: int
    """Number of its stack axes."""


def _make_smaller(
    layers: dict[str, MaestroLayer],
) -> tuple[dict[tuple[str, ...], _Cut], set[tuple[str, ...]]]:
    """Cuts layers; the parameters that are smaller, and kernels of layers that are dense."""
    cuts: dict[tuple[str, ...], _Cut] = {}
    dense: set[tuple[str, ...]] = set()
    for path, layer in layers.items():
        names = tuple(path.split("/")) if path else ()
        rank = max(int(jnp.max(layer.rank[...], initial=0)), 1)
        before = layer.ordered_in.kernel.shape, layer.ordered_out.kernel.shape
        if _become_smaller(layer, rank):
            dense.add((*names, "kernel"))
        elif rank < before[0][-1]:
            stack = len(before[1]) - 2
            cuts[*names, *INWARD] = _Cut(before[0], len(before[0]) - 1, rank, stack)
            cuts[*names, *OUTWARD] = _Cut(before[1], stack, rank, stack)
    return cuts, dense


def _become_smaller(layer: MaestroLayer, rank: int) -> bool:
    """Cuts the factors to a rank, or makes the layer dense; whether it has become dense."""
    a, b = layer.factors()
    inputs, outputs = a.shape[-2], b.shape[-1]
    if rank * (inputs + outputs) > inputs * outputs:
        become(layer, layer.dense())
        return True
    layer.set_factors(Factors(a[..., :rank], b[..., :rank, :]), layer.rank[...])
    return False


def _carried(new_state: Any, old_state: Any, cuts: dict[Any, _Cut], dense: set[Any]) -> Any:
    """The old state in the structure of the new one, cut where parameters are."""

    def fit(path: Any, names: tuple[str, ...], new: Any, old: Any) -> Any:
        cut = cuts.get(owner_of(path, cuts) or ("",))
        if old is None and owner_of(path, dense) is not None:
            return new
        if old is not None and cut is not None and old.shape == cut.shape:
            part = jax.lax.slice_in_dim(old, 0, cut.rank, axis=cut.axis)
            # A basis of a square factor has its shape, but is not cut like it.
            if part.shape == new.shape:
                return part
        # A number of a whole leaf, or of each layer of a stack, does not depend on the rank.
        is_number = cut is None or old is None or old.ndim <= cut.stack
        if old is not None and is_number and (old.shape, old.dtype) == (new.shape, new.dtype):
            return old
        found = "missing" if old is None else f"{old.dtype}{old.shape}"
        raise ValueError(
            f"{'/'.join(names)} of opt_state is {found}, which cannot be cut to what init makes, "
            f"{new.dtype}{new.shape}: it must be like the parameter. Make the state again with "
            "tx.init, or call compact without one."
        )

    return carry(new_state, old_state, fit)
