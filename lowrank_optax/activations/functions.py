"""The nonlinearities of ``jax.nn``, whose backward pass keeps a few bits of each element."""

from collections.abc import Callable
import functools
import numbers
from typing import Any, TypeVar

import jax
from jax.typing import ArrayLike

from lowrank_optax.activations.coded_backward import few_bit

F = TypeVar("F", bound=Callable[..., jax.Array])

_DOC = """``jax.nn.{name}``{kind}.

    .. math::
      {formula}

    Args:
      x: Any shape, floating point.
{arguments}
    Returns:
      ``jax.nn.{name}`` of x, by the same operations.

    Raises:
      {raises}

    Example:
      >>> import lowrank_optax as lro
      >>> print(f"{{lro.activations.{example}:.4f}}")
      {result}
    """


def _documented(
    formula: str, example: str, result: str, *, exact: bool = False, **option: str
) -> Callable[[F], F]:
    """Gives a function its docstring; ``exact`` ones take no ``bits``."""
    kind = ", whose backward pass keeps ``bits`` bits of each element"
    raises = "TypeError: If ``x`` is not of floating point"
    raises += "".join(f", or ``{name}`` is not a Python number" for name in option) + "."
    if exact:
        kind = " with its exact gradient, for which one bit of each element is kept"
    else:
        option = {"bits": "1 to 8; 3 or 4 train as the exact gradient does.", **option}
        raises = f"ValueError: If ``bits`` is not 1 to 8.\n      {raises}"
    arguments = "".join(f"      {name}: {what}\n" for name, what in option.items())

    def decorate(function: F) -> F:
        function.__doc__ = _DOC.format(
            name=function.__name__,
            kind=kind,
            formula=formula,
            arguments=arguments,
            raises=raises,
            example=example,
            result=result,
        )
        return function

    return decorate


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


@_documented(
    r"y = x \text{ where } x > 0, \quad \alpha (e^x - 1) \text{ elsewhere}",
    "elu(-1.0)",
    "-0.6321",
    alpha="A Python number.",
)
def elu(x: ArrayLike, bits: int = 3, alpha: float = 1.0) -> jax.Array:
    return few_bit(_with(jax.nn.elu, "alpha", alpha, default=1.0), bits)(x)


@_documented(
    r"y = \max(x, 0) + \alpha (e^{\min(x, 0) / \alpha} - 1)",
    "celu(-1.0, alpha=2.0)",
    "-0.7869",
    alpha="A Python number other than 0.",
)
def celu(x: ArrayLike, bits: int = 3, alpha: float = 1.0) -> jax.Array:
    return few_bit(_with(jax.nn.celu, "alpha", alpha, default=1.0), bits)(x)


@_documented(
    r"y = \frac{x + \sqrt{x^2 + b}}{2}",
    "squareplus(1.0)",
    "1.6180",
    b="A Python number above 0.",
)
def squareplus(x: ArrayLike, bits: int = 3, b: float = 4.0) -> jax.Array:
    return few_bit(_with(jax.nn.squareplus, "b", b, default=4.0), bits)(x)


@_documented(
    r"y = x \text{ where } x \ge 0, \quad \alpha x \text{ elsewhere}",
    "leaky_relu(-1.0)",
    "-0.0100",
    exact=True,
    negative_slope=r":math:`\alpha`, a Python number.",
)
def leaky_relu(x: ArrayLike, negative_slope: float = 0.01) -> jax.Array:
    fn = _with(jax.nn.leaky_relu, "negative_slope", negative_slope, default=0.01)
    return few_bit(fn, 1)(x)


def _function(
    fn: Callable[..., jax.Array], formula: str, at_one: str, *, exact: bool = False
) -> Callable[..., jax.Array]:
    """A public function of ``x`` and ``bits``, or of ``x`` alone."""

    def smooth(x: ArrayLike, bits: int = 3) -> jax.Array:
        return few_bit(fn, bits)(x)

    def in_one_bit(x: ArrayLike) -> jax.Array:
        return few_bit(fn, 1)(x)

    function: Any = in_one_bit if exact else smooth
    function.__name__ = function.__qualname__ = fn.__name__
    return _documented(formula, f"{fn.__name__}(1.0)", at_one, exact=exact)(function)


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
