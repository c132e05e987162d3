"""The best few-bit stand-in for the derivative of any function of one number."""

from collections.abc import Callable
from typing import Any

import jax

from lowrank_optax.activations.fit_arguments import Coding, check
from lowrank_optax.activations.sampling import DensityName
from lowrank_optax.activations.step_function import Codebook
from lowrank_optax.activations.tables import DENSITIES, DOMAIN, known_name, table


def codebook(
    fn: Callable[[jax.Array], jax.Array],
    bits: int = 3,
    *,
    density: DensityName | Any = "uniform",
    domain: float = 10.0,
    coding: Coding = "value",
) -> Codebook:
    r"""The step function of at most ``2**bits`` levels that is nearest to the derivative of ``fn``.

    It has the least

    .. math::
      L = \int_{-A}^{A} (f'(x) - q(x))^2 \, w(x) \, dx

    of all :math:`q` with that many levels (``coding="value"``), or with that many intervals
    (``coding="interval"``): the best on a grid of 2048 points by dynamic programming, and
    from there Newton's method to where every level is the mean of :math:`f'` over what it stands
    for, and :math:`f'` at every boundary the mean of the two levels that meet. Piecewise linear
    functions need no more levels than they have slopes, and come out exactly, at their kinks as
    ``jax.grad`` has it in float32.

    It may be called while tracing; the result holds plain numbers. Fits take about a second. Those
    of jax.nn's functions at 1 to 4 bits are read from a file (see `table`), others are remembered,
    but for those with measured densities.

    Args:
      fn: Elementwise, of a float, differentiable by ``jax.grad`` in float64; its derivative may
        jump.
      bits: Of a code, 1 to 8.
      density: What weighs the error, :math:`w`: ``"uniform"``, 1 everywhere; ``"normal"``, of
        mean 0 and deviation 1; or measured inputs of ``fn``, an array of any shape: their
        histogram, of integral 1. Inputs off the domain are left out of it.
      domain: :math:`A`. What lies off it, on whichever side, gets the outermost code of that side.
      coding: What a code says. ``"value"``: which level is nearest to the derivative; intervals of
        x with one level share a code. It is never worse. ``"interval"``, as in the paper: in which
        interval of x it lies, or of \|x\| where the derivative is even, as that of ``tanh``.

    Returns:
      The codebook; its ``error`` is :math:`L`.

    Raises:
      ValueError: If ``bits``, ``density``, ``domain`` or ``coding`` is none of these, or the
        derivative is not finite somewhere on the domain.
      TypeError: If ``fn`` does not take a float to a float.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> book = lro.activations.codebook(jax.nn.gelu, bits=2)
      >>> print([round(level, 4) for level in book.levels])
      [-0.0157, 0.3195, 0.6805, 1.0157]
      >>> print([round(boundary, 4) for boundary in book.boundaries], f"{book.error:.4f}")
      [-0.4692, 0.0, 0.4692] 0.0407
      >>> print(lro.activations.codebook(jax.nn.relu6, bits=3).levels)  # no more than needed
      (0.0, 1.0)

    Reference:
      Novikov et al., Few-bit Backward: Quantized Gradients of Activation Functions for Memory
      Footprint Reduction, 2022, https://arxiv.org/abs/2202.00441, Section 3; coding the value is
      ours.
    """
    # Here, so that importing the library does not load NumPy's polynomials.
    from lowrank_optax.activations.fitting import fit, fit_once

    check(bits, domain, coding)
    if not isinstance(density, str):
        return fit(fn, int(bits), density, float(domain), coding)
    name = known_name(fn)
    if name is not None and domain == DOMAIN and density in DENSITIES:
        return table(name, int(bits), density, coding)
    try:
        hash(fn)
    except TypeError:
        return fit(fn, int(bits), density, float(domain), coding)
    return fit_once(fn, int(bits), density, float(domain), coding)
