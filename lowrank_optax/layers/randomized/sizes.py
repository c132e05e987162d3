"""The size of a sketch, from the noise that it may add."""

import math

import jax

from lowrank_optax.layers.randomized.sketch import SketchKind
from lowrank_optax.layers.randomized.variances import minibatch_variance, sketch_variance


def choose_sketch_size(
    x: jax.Array, y: jax.Array, *, noise_ratio: float = 1.0, kind: SketchKind = "rows"
) -> int:
    """The least p with which the sketch adds at most ``noise_ratio`` times the mini-batch's noise.

    That is `sketch_variance` <= noise_ratio · `minibatch_variance`. For ``"rows"`` it depends on
    nothing but the number of rows: (B - p)/p <= noise_ratio, so a ratio of 1 needs half of them.
    Otherwise it is found by bisection: log2(B) evaluations of the variance.

    Args:
      x: The input of a layer, [..., N], concrete.
      y: The cotangent of its output, [..., M], of the same leading axes.
      noise_ratio: The noise that may be added, above 0.
      kind: As in `Sketch`. Of ``"stratified"`` and ``"winner_take_all"`` the variance may rise with
        p in places; the p returned satisfies the bound still.

    Returns:
      p, from 1 to B; B where no sketch is good enough.

    Raises:
      ValueError: If ``noise_ratio`` is not above 0; as `sketch_variance` and `minibatch_variance`.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> x = jax.random.normal(jax.random.key(0), (1000, 8))
      >>> y = jax.random.normal(jax.random.key(1), (1000, 4))
      >>> kinds = ("rows", "rademacher")
      >>> [lro.layers.choose_sketch_size(x, y, noise_ratio=4.0, kind=kind) for kind in kinds]
      [200, 248]

    Reference:
      The ratio of the two is the diagnostic of Bershatsky et al., 2022,
      https://arxiv.org/abs/2201.13195, Section 3.
    """
    if not noise_ratio > 0:
        raise ValueError(f"noise_ratio={noise_ratio!r} must be above 0.")
    count = math.prod(x.shape[:-1])
    allowed = noise_ratio * float(minibatch_variance(x, y))
    if kind == "rows":
        return max(1, math.ceil(count / (1 + noise_ratio) - 1e-9))
    low, high = 1, count
    while low < high:
        middle = (low + high) // 2
        if float(sketch_variance(x, y, middle, kind)) <= allowed:
            high = middle
        else:
            low = middle + 1
    return low
