"""The codebooks of the usual functions: read at 1 to 4 bits, fitted when first asked for at more.

``tables.json`` is written by `fit_tables`.
"""

from collections.abc import Callable
import functools
from importlib import resources
import inspect
import json
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.activations.fit_arguments import Coding, check
from lowrank_optax.activations.sampling import DensityName
from lowrank_optax.activations.step_function import Codebook

FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "celu": jax.nn.celu,
    "elu": jax.nn.elu,
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_silu": jax.nn.hard_silu,
    "hard_tanh": jax.nn.hard_tanh,
    "leaky_relu": jax.nn.leaky_relu,
    "log_sigmoid": jax.nn.log_sigmoid,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "soft_sign": jax.nn.soft_sign,
    "softplus": jax.nn.softplus,
    "squareplus": jax.nn.squareplus,
    "tanh": jnp.tanh,
}
"""The functions of the tables, with JAX's own defaults for what else they take."""

DOMAIN = 10.0
MOST_BITS = 4
DENSITIES: tuple[DensityName, ...] = ("uniform", "normal")
CODINGS: tuple[Coding, ...] = ("value", "interval")


def table(
    name: str, bits: int = 3, density: DensityName = "uniform", coding: Coding = "value"
) -> Codebook:
    """The codebook of a known function; see `codebook`.

    Args:
      name: A key of `FUNCTIONS`.
      bits: 1 to 8.
      density: ``"uniform"`` or ``"normal"``.
      coding: ``"value"`` or ``"interval"``.

    Raises:
      ValueError: If one of them is none of these.
    """
    if name not in FUNCTIONS:
        raise ValueError(f"name={name!r} must be one of {', '.join(FUNCTIONS)}.")
    if density not in DENSITIES:
        raise ValueError(f"density={density!r} must be 'uniform' or 'normal'.")
    check(bits, DOMAIN, coding)
    if bits > MOST_BITS:
        # Here, so that importing the library does not load NumPy's polynomials.
        from lowrank_optax.activations.fitting import fit_once

        return fit_once(FUNCTIONS[name], int(bits), density, DOMAIN, coding)
    boundaries, codes, levels, error = _rows()[name][density][coding][bits - 1]
    return Codebook(tuple(boundaries), tuple(codes), tuple(levels), int(bits), error)


def known_name(fn: Any) -> str | None:
    """The name in `FUNCTIONS` of what computes the same, or None."""
    keywords: dict[str, Any] = {}
    if isinstance(fn, functools.partial) and not fn.args:
        fn, keywords = fn.func, fn.keywords
    if getattr(fn, "__module__", None) == "lowrank_optax.activations.functions":
        fn = getattr(jax.nn, fn.__name__, fn)
    if fn is jax.nn.gelu and keywords == {"approximate": False}:
        return "gelu_erf"
    if keywords:
        own = inspect.signature(fn).parameters
        numbers_equal = lambda a, b: isinstance(a, bool | int | float) and a == b
        if not all(n in own and numbers_equal(v, own[n].default) for n, v in keywords.items()):
            return None
    try:
        return _names().get(fn)
    except TypeError:  # no hash
        return None


@functools.cache
def _names() -> dict[Any, str]:
    names: dict[Any, str] = {jax.lax.logistic: "sigmoid", jax.lax.tanh: "tanh"}
    return names | {fn: name for name, fn in FUNCTIONS.items()}


@functools.cache
def _rows() -> dict[str, Any]:
    file = resources.files("lowrank_optax.activations") / "tables.json"
    return json.loads(file.read_text("utf-8"))
