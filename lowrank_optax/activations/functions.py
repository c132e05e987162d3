"""The nonlinearities of ``jax.nn``, whose backward pass keeps a few bits of each element."""

from collections.abc import Callable
import functools
import numbers
from typing import Any

import jax
from jax.typing import ArrayLike

from lowrank_optax.activations.coded_backward import few_bit

_DOC = """``jax.nn.{name}``{kind}.

    .. math::
      {formula}

    Args:
      x: Any shape, floating point.
{bits}
    Returns:
      ``jax.nn.{name}`` of x, by the same operations.

    Raises:
      TypeError: If ``x`` is not of floating point.
{raises}
    Example:
      >>> import lowrank_optax as lro
      >>> print(f"{{lro.activations.{name}(1.0):.4f}}")
      {at_one}
    """


def gelu(x: ArrayLike, bits: int = 3, approximate: bool = True) -> jax.Array:
    r"""``jax.nn.gelu``, whose backward pass keeps ``bits`` bits of each element.

    .. math::
      y = x \, \Phi(x), \qquad
      \Phi(x) \approx \tfrac{1}{2} + \tfrac{1}{2} \tanh(\sqrt{2 / \pi} \, (x + 0.044715 x^3)).

    Args:
      x: Any shape, floating point.
      bits: 1 to 8; 3 or 4 train as the exact gradient does.
      approximate: The form with tanh, as ``jax.nn.gelu`` by default; otherwise with erf.

    Returns:
      ``jax.nn.gelu(x, approximate)``, by the same operations.

    Raises:
      ValueError: If ``bits`` is not 1 to 8.
      TypeError: If ``x`` is not of floating point.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> x = jnp.array([-3.0, -0.5, 0.0, 0.5, 3.0])
      >>> print(bool(jnp.all(lro.activations.gelu(x) == jax.nn.gelu(x))))
      True
      >>> slope = lambda gelu: jax.grad(lambda x: gelu(x).sum())(x).round(2)
      >>> print(slope(jax.nn.gelu), slope(lambda x: lro.activations.gelu(x, bits=8)))
      [-0.01  0.13  0.5   0.87  1.01] [-0.01  0.13  0.5   0.87  1.01]

    Reference:
      Novikov et al., Few-Bit Backward, 2023, https://arxiv.org/abs/2202.00441: as `few_bit`.
    """
    fn = jax.nn.gelu if approximate else _partial(jax.nn.gelu, approximate=False)
    return few_bit(fn, bits)(x)


def elu(x: ArrayLike, bits: int = 3, alpha: float = 1.0) -> jax.Array:
    r"""``jax.nn.elu``, whose backward pass keeps ``bits`` bits of each element.

    .. math::
      y = x \text{ where } x > 0, \quad \alpha (e^x - 1) \text{ elsewhere}

    Args:
      x: Any shape, floating point.
      bits: 1 to 8; 3 or 4 train as the exact gradient does.
      alpha: A Python number.

    Returns:
      ``jax.nn.elu(x, alpha)``, by the same operations.

    Raises:
      ValueError: If ``bits`` is not 1 to 8.
      TypeError: If ``x`` is not of floating point, or ``alpha`` is not a Python number.

    Example:
      >>> import lowrank_optax as lro
      >>> print(f"{lro.activations.elu(-1.0):.4f}")
      -0.6321
    """
    return few_bit(_with(jax.nn.elu, "alpha", alpha, default=1.0), bits)(x)


def celu(x: ArrayLike, bits: int = 3, alpha: float = 1.0) -> jax.Array:
    r"""``jax.nn.celu``, whose backward pass keeps ``bits`` bits of each element.

    .. math::
      y = \max(x, 0) + \alpha (e^{\min(x, 0) / \alpha} - 1)

    Args:
      x, bits: As for `elu`.
      alpha: A Python number other than 0.

    Returns:
      ``jax.nn.celu(x, alpha)``, by the same operations.

    Raises:
      ValueError: As `elu`.
      TypeError: As `elu`.

    Example:
      >>> import lowrank_optax as lro
      >>> print(f"{lro.activations.celu(-1.0, alpha=2.0):.4f}")
      -0.7869
    """
    return few_bit(_with(jax.nn.celu, "alpha", alpha, default=1.0), bits)(x)


def squareplus(x: ArrayLike, bits: int = 3, b: float = 4.0) -> jax.Array:
    r"""``jax.nn.squareplus``, whose backward pass keeps ``bits`` bits of each element.

    .. math::
      y = \frac{x + \sqrt{x^2 + b}}{2}

    Args:
      x, bits: As for `elu`.
      b: A Python number above 0.

    Returns:
      ``jax.nn.squareplus(x, b)``, by the same operations.

    Raises:
      ValueError: As `elu`.
      TypeError: If ``x`` is not of floating point, or ``b`` is not a Python number.

    Example:
      >>> import lowrank_optax as lro
      >>> print(f"{lro.activations.squareplus(1.0):.4f}")
      1.6180
    """
    return few_bit(_with(jax.nn.squareplus, "b", b, default=4.0), bits)(x)


def leaky_relu(x: ArrayLike, negative_slope: float = 0.01) -> jax.Array:
    r"""``jax.nn.leaky_relu`` with its exact gradient, for which one bit of each element is kept.

    .. math::
      y = x \text{ where } x \ge 0, \quad \alpha x \text{ elsewhere}

    Args:
      x: Any shape, floating point.
      negative_slope: :math:`\alpha`, a Python number.

    Returns:
      ``jax.nn.leaky_relu(x, negative_slope)``, by the same operations.

    Raises:
      TypeError: If ``x`` is not of floating point, or ``negative_slope`` is not a Python number.

    Example:
      >>> import lowrank_optax as lro
      >>> print(f"{lro.activations.leaky_relu(-1.0):.4f}")
      -0.0100
    """
    fn = _with(jax.nn.leaky_relu, "negative_slope", negative_slope, default=0.01)
    return few_bit(fn, 1)(x)


def _function(
    fn: Callable[..., jax.Array], formula: str, at_one: str, *, exact: bool = False
) -> Callable[..., jax.Array]:
    """A public function of ``x`` and ``bits``, or of ``x`` alone; with its value at 1."""

    def smooth(x: ArrayLike, bits: int = 3) -> jax.Array:
        return few_bit(fn, bits)(x)

    def in_one_bit(x: ArrayLike) -> jax.Array:
        return few_bit(fn, 1)(x)

    kind, bits, raises = ", whose backward pass keeps ``bits`` bits of each element", "", ""
    if exact:
        kind = " with its exact gradient, for which one bit of each element is kept"
    else:
        bits = "      bits: 1 to 8; 3 or 4 train as the exact gradient does.\n"
        raises = "      ValueError: If ``bits`` is not 1 to 8.\n"
    function: Any = in_one_bit if exact else smooth
    function.__name__ = function.__qualname__ = name = fn.__name__
    function.__doc__ = _DOC.format(
        name=name, kind=kind, formula=formula, bits=bits, raises=raises, at_one=at_one
    )
    return function


def _with(
    fn: Callable[..., jax.Array], name: str, value: float, default: float
) -> Callable[..., jax.Array]:
    """``fn`` with an option; at its default, ``fn`` itself."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be a Python number, known when compiling.")
    return fn if value == default else _partial(fn, **{name: float(value)})


@functools.cache
def _partial(fn: Callable[..., jax.Array], **options: float) -> Callable[..., jax.Array]:
    """The same object for the same options, so that compiled programs are found again."""
    return functools.partial(fn, **options)


silu = swish = _function(jax.nn.silu, r"y = x \, \sigma(x) = \frac{x}{1 + e^{-x}}", "0.7311")
sigmoid = _function(jax.nn.sigmoid, r"y = \sigma(x) = \frac{1}{1 + e^{-x}}", "0.7311")
tanh = _function(jax.nn.tanh, r"y = \tanh x", "0.7616")
softplus = _function(jax.nn.softplus, r"y = \log(1 + e^x)", "1.3133")
log_sigmoid = _function(jax.nn.log_sigmoid, r"y = \log \sigma(x)", "-0.3133")
mish = _function(jax.nn.mish, r"y = x \tanh(\log(1 + e^x))", "0.8651")
selu = _function(
    jax.nn.selu,
    r"y = \lambda x \text{ where } x > 0, \quad \lambda \alpha (e^x - 1) \text{ elsewhere}",
    "1.0507",
)
soft_sign = _function(jax.nn.soft_sign, r"y = \frac{x}{1 + |x|}", "0.5000")
hard_silu = hard_swish = _function(jax.nn.hard_silu, r"y = x \min(\max(x + 3, 0), 6) / 6", "0.6667")
relu = _function(jax.nn.relu, r"y = \max(x, 0)", "1.0000", exact=True)
relu6 = _function(jax.nn.relu6, r"y = \min(\max(x, 0), 6)", "1.0000", exact=True)
hard_tanh = _function(jax.nn.hard_tanh, r"y = \min(\max(x, -1), 1)", "1.0000", exact=True)
hard_sigmoid = _function(
    jax.nn.hard_sigmoid, r"y = \min(\max(x + 3, 0), 6) / 6", "0.6667", exact=True
)
