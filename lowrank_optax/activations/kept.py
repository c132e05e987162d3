"""What a loss keeps between its forward and its backward pass, by name and size."""

from collections.abc import Callable, Mapping, Sequence
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.activations.kept_origins import origins
from lowrank_optax.activations.kept_report import KeptComparison, KeptReport, KeptRow
from lowrank_optax.matrices.flax_layers import is_nnx_module
from lowrank_optax.matrices.paths import path_string


def kept_for_backward(
    loss: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    wrt: Any = None,
    compiled: bool = True,
    device: Any = None,
) -> KeptReport:
    """The arrays that backward keeps of forward, and the temporaries of the compiled gradient.

    The function that ``jax.vjp`` returns is a pytree, whose leaves are what is kept. Their names
    are read from the program that makes them: that of ``checkpoint_name``, or the primitive and the
    line of the program, looked up within scans, ``jax.checkpoint`` and jitted functions. Nothing is
    computed.

    In a compiled step the compiler may do better than what is counted (it merges equal arrays) or
    worse (it pads, and holds what backward itself makes); ``temporary_bytes`` is what it says.

    Args:
      loss: Returns a scalar of floats, or with ``has_aux`` a pair of it and anything else.
      *args: Its arguments, as for ``jax.grad``: pytrees of arrays or of ``jax.ShapeDtypeStruct``,
        and NNX models, concrete or abstract, which are split as ``nnx.grad`` does.
      argnums: Which arguments are differentiated.
      has_aux: As in ``jax.grad``.
      wrt: What of an NNX model is differentiated, a filter of ``flax.nnx``; ``nnx.Param`` for None.
      compiled: Whether to compile ``jax.value_and_grad`` of the loss for ``temporary_bytes``.
      device: What to compile for; it need not be there (``jax.experimental.topologies``). For None
        where the arguments are, or the default device.

    Returns:
      A report: print it, or read its ``arrays``, ``total_bytes`` and ``temporary_bytes``. With
      arguments sharded over several devices, bytes are of whole arrays and temporaries of a device.

    Raises:
      TypeError: If the loss is no function.
      ValueError: If it returns no scalar, or ``argnums`` names no argument.

    Example:
      >>> def loss(params, x):
      ...     hidden = jnp.sin(x @ params["in"])
      ...     return jnp.sum(hidden @ params["out"])
      >>> params = {"in": jnp.zeros((4, 16)), "out": jnp.zeros((16, 2))}
      >>> report = kept_for_backward(loss, params, jnp.zeros((8, 4)), compiled=False)
      >>> [(row.name, row.shape, row.bytes) for row in report.arrays]
      [('cos in loss', (8, 16), 512), ('sin in loss', (8, 16), 512)]
      >>> [row.name for row in report.inputs]
      ['params/out', 'x']
    """
    if not callable(loss):
        raise TypeError(f"loss={loss!r} must be a function.")
    chosen = _positions(argnums, len(args))
    pure, trained, fixed = _split(loss, args, chosen, wrt)

    def forward(trained: Any, fixed: Any) -> Any:
        value, pull, *_ = jax.vjp(lambda t: pure(t, fixed), trained, has_aux=has_aux)
        return value, pull

    jaxpr, (value, pull) = jax.make_jaxpr(forward, return_shape=True)(trained, fixed)
    if not isinstance(value, jax.ShapeDtypeStruct) or value.shape != ():
        shown = getattr(value, "shape", value)
        raise ValueError(f"loss must return a scalar (or with has_aux a pair), got {shown}.")
    arrays, inputs = _rows(jaxpr, len(jax.tree.leaves(pull)), _names(loss, trained, fixed))
    temporary = _temporary_bytes(pure, trained, fixed, has_aux, device) if compiled else None
    return KeptReport(tuple(arrays), tuple(inputs), temporary)


def compare_kept(
    variants: Mapping[str, Any],
    *args: Any,
    loss: Callable[..., Any] | None = None,
    **options: Any,
) -> KeptComparison:
    """What backward keeps of several losses, or of one loss with several models, side by side.

    Args:
      variants: Losses by what to call them, each called with ``args``; or, where ``loss`` is given,
        its first arguments, such as a model and its copy with few-bit activations.
      *args: See `kept_for_backward`.
      loss: See there; None where ``variants`` are losses.
      **options: See there.

    Returns:
      A table: print it, or read its ``reports``.

    Raises:
      ValueError: If there are no variants; and as `kept_for_backward`.

    Example:
      >>> def plain(x):
      ...     return jnp.sum(jnp.exp(jnp.sin(x)))
      >>> x = jax.ShapeDtypeStruct((1024,), jnp.float32)
      >>> print(compare_kept({"plain": plain, "remat": jax.checkpoint(plain)}, x, compiled=False))
      kept          plain  remat
      cos in plain  4,096      –
      exp in plain  4,096      –
      total         8,192      0
    """
    if not variants:
        raise ValueError("variants must name at least one loss or model.")
    if loss is None:
        reports = {k: kept_for_backward(f, *args, **options) for k, f in variants.items()}
    else:
        reports = {k: kept_for_backward(loss, x, *args, **options) for k, x in variants.items()}
    return KeptComparison(reports)


class _Argument(NamedTuple):
    """One argument: what of it is differentiated, what is not, and how to make it of both."""

    trained: Any
    fixed: Any
    make: Callable[[Any, Any], Any]


def _split(
    loss: Callable[..., Any], args: tuple[Any, ...], chosen: set[int], wrt: Any
) -> tuple[Callable[[Any, Any], Any], list[Any], list[Any]]:
    """The loss as a function of what is differentiated and of the rest, and these two."""
    parts = [_argument(x, i in chosen, wrt) for i, x in enumerate(args)]

    def pure(trained: list[Any], fixed: list[Any]) -> Any:
        made = (p.make(t, f) for p, t, f in zip(parts, trained, fixed, strict=True))
        return loss(*made)

    return pure, [part.trained for part in parts], [part.fixed for part in parts]


def _argument(x: Any, differentiated: bool, wrt: Any) -> _Argument:
    if is_nnx_module(x):
        from flax import nnx

        wrt = nnx.Param if wrt is None else wrt
        graphdef, trained, fixed = nnx.split(x, wrt if differentiated else nnx.Nothing(), ...)
        # Merged from pure arrays, the model's variables belong to the trace that calls it.
        trained, fixed = nnx.as_pure(trained), nnx.as_pure(fixed)
        return _Argument(trained, fixed, lambda t, f: nnx.merge(graphdef, t, f))
    if differentiated:
        return _Argument(x, None, lambda t, _: t)
    return _Argument(None, x, lambda _, f: f)


def _positions(argnums: int | Sequence[int], count: int) -> set[int]:
    asked = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not asked or any(not -count <= i < count for i in asked):
        raise ValueError(f"argnums={argnums!r} must be positions of the {count} arguments.")
    return {i % count for i in asked}


def _names(loss: Callable[..., Any], *trees: list[Any]) -> list[str]:
    """The path of each leaf, from the name of the loss's parameter on."""
    try:
        parameters = list(inspect.signature(loss).parameters)
    except (TypeError, ValueError):
        parameters = []
    names = []
    for tree in trees:
        for (position, *path), _ in jax.tree_util.tree_leaves_with_path(tree):
            index = position.idx
            known = index < len(parameters)
            first = parameters[index] if known else f"argument {index}"
            names.append("/".join(filter(None, (first, path_string(tuple(path))))))
    return names


def _rows(jaxpr: Any, count: int, names: list[str]) -> tuple[list[KeptRow], list[KeptRow]]:
    """Of the last ``count`` results: what is made, and what is an input."""
    made, inputs, seen = [], [], set()
    kept = list(zip(jaxpr.jaxpr.outvars, origins(jaxpr, names), strict=True))
    for x, origin in kept[len(kept) - count :]:
        if id(x) in seen:
            continue
        seen.add(id(x))
        shape, dtype = tuple(x.aval.shape), x.aval.dtype
        row = KeptRow(origin.name, origin.source, shape, str(dtype), 1, _bytes(shape, dtype))
        (inputs if origin.is_input else made).append(row)
    return made, inputs


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    extended = jnp.issubdtype(dtype, jax.dtypes.extended)
    bits = 8 * dtype.itemsize if extended else jax.dtypes.itemsize_bits(dtype)
    return -(-math.prod(shape) * bits // 8)


def _temporary_bytes(
    pure: Callable[..., Any], trained: Any, fixed: Any, has_aux: bool, device: Any
) -> int | None:
    if device is not None:
        place = jax.sharding.SingleDeviceSharding(device)
        struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        trained, fixed = jax.tree.map(struct, jax.eval_shape(lambda *x: x, trained, fixed))
    step = jax.jit(jax.value_and_grad(pure, has_aux=has_aux))
    analysis = step.lower(trained, fixed).compile().memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes
