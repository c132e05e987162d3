"""Where binary points start, by the numbers of a forward pass, and where their training ends."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.fixed_point.convert import quantizers
from lowrank_optax.layers.fixed_point.quantized_layers import (
    BinaryPoint,
    FrozenBinaryPoint,
    RangeStatistics,
)
from lowrank_optax.layers.fixed_point.ranges import (
    CANDIDATES,
    COUNT,
    StartRule,
    best_position,
    check_finite,
    check_rule,
)
from lowrank_optax.matrices.selection import path_string


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What `calibrate_fixed_point` set.

    Attributes:
      integer_bits: Binary points by path of their quantizer, arrays.
    """

    integer_bits: dict[str, Any]

    def __str__(self) -> str:
        points = sum(x.size for x in self.integer_bits.values())
        layers = len({path.rpartition("/")[0] for path in self.integer_bits})
        return f"{points} binary points in {layers} layer{'s' if layers > 1 else ''}"


def calibrate_fixed_point(
    model: nnx.Module,
    run: Callable[[Any, Any], Any],
    *batches: Any,
    rule: StartRule = "mse",
) -> Calibration:
    """Set the binary points of all quantizers by the numbers that they see, in place.

    The model runs as a float model meanwhile: nothing is quantized, and formats that include a ReLU
    are that alone. Trained with points that start
    here is quantization-aware training; used as it is, the model is a post-training one.

    Args:
      model: Model with fixed-point layers; it may be stacked, scanned and rematerialized.
      run: ``run(model, batch)`` returns outputs that depend differentiably on all layers. It is
        compiled.
      *batches: Batches, pytrees of arrays of the same shapes.
      rule: ``"mse"`` for the least squared error of each tensor, ``"max"`` to hold its largest
        number: see `choose_integer_bits`.

    Returns:
      The binary points that were set; print it.

    Raises:
      ValueError: If there is no batch, no quantizer, one that ``run`` does not call (named), or one
        that sees numbers that are not finite; or ``rule`` is unknown.

    Reference:
      The rule ``"max"`` is the usual start of post-training quantization; see
      https://arxiv.org/abs/1903.08066, section 4.
    """
    found = _found(model)
    if not batches:
        raise ValueError("batches is empty: give at least one.")
    for quantizer in found.values():
        check_rule(rule, quantizer.format)
    try:
        for quantizer in found.values():
            shape = (*quantizer.integer_bits.shape, len(CANDIDATES), 3)
            quantizer.statistics = RangeStatistics(jnp.zeros(shape))
        graphdef, zeros, rest = nnx.split(model, RangeStatistics, ...)

        def total(zeros: Any, rest: Any, batch: Any) -> jax.Array:
            outputs = jax.tree.leaves(run(nnx.merge(graphdef, zeros, rest, copy=True), batch))
            return sum((x.astype(jnp.float32).sum() for x in outputs), start=jnp.zeros(()))

        statistics_of = jax.jit(jax.grad(total))
        sums = [statistics_of(zeros, rest, batch) for batch in batches]
        nnx.update(model, jax.tree.map(lambda *each: sum(each[1:], start=each[0]), *sums))
        statistics = {path: q.statistics[...] for path, q in found.items()}
    finally:
        for quantizer in found.values():
            quantizer.statistics = nnx.data(None)
    points = {}
    for path, each in statistics.items():
        _check_seen(path_string(path).removesuffix("_quantizer"), each, rule)
        points[path] = best_position(each, rule)
    for path, point in points.items():
        found[path].integer_bits = BinaryPoint(point)
    return Calibration({path_string(path): point for path, point in points.items()})


def _check_seen(name: str, statistics: Any, rule: StartRule) -> None:
    check_finite(name, statistics, rule)
    if not isinstance(statistics, jax.core.Tracer) and (statistics[..., COUNT] == 0).any():
        raise ValueError(
            f"run does not call the quantizer {name}, or its outputs do not depend on it: leave "
            "the layer out, or run all of the model."
        )


def freeze_binary_points(model: nnx.Module, loss: Callable[[Any], Any]) -> None:
    """End the training of all binary points, in place, each at the better of its two integers.

    A trained position hovers where rounding takes it up or down, and one of the two integers may be
    much worse. So each is set to the integer below and above, and the one with the lower loss is
    kept, one position after another. The positions become `FrozenBinaryPoint` variables, which
    ``wrt=nnx.Param`` leaves out; make the optimizer again.

    Args:
      model: Model with fixed-point layers.
      loss: ``loss(model)`` returns a scalar, such as that of a large batch. It is compiled, and
        runs once per position and one time more.

    Raises:
      ValueError: If there is no quantizer, or a position or the loss is not finite.
    """
    found = _found(model)
    trained = {path: np.asarray(q.integer_bits[...]) for path, q in found.items()}
    for path, points in trained.items():
        if not np.isfinite(points).all():
            raise ValueError(f"integer_bits of {path_string(path)} is not finite: calibrate first.")
    graphdef, state = nnx.split(model)

    @jax.jit
    def loss_at(points: Any, state: Any) -> jax.Array:
        tried = nnx.merge(graphdef, state, copy=True)
        for path, quantizer in quantizers(tried).items():
            quantizer.integer_bits[...] = points[path]
        return loss(tried)

    best_points = {path: np.asarray(np.rint(points)) for path, points in trained.items()}
    best = float(loss_at(best_points, state))
    if not np.isfinite(best):
        raise ValueError(f"the loss is {best}, to which no other can be compared.")
    for path, points in trained.items():
        for index in np.ndindex(points.shape):
            other = best_points[path].copy()
            other[index] = np.floor(points[index]) + np.ceil(points[index]) - other[index]
            value = float(loss_at({**best_points, path: other}, state))
            if value < best:
                best, best_points[path] = value, other
    for path, points in best_points.items():
        found[path].integer_bits = FrozenBinaryPoint(jnp.asarray(points))


def _found(model: Any) -> dict[Any, Any]:
    found = quantizers(model)
    if not found:
        raise ValueError(
            f"the {type(model).__name__} has no fixed-point layer: call convert_to_fixed_point."
        )
    return found
