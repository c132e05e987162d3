"""What Flax's own layers (NNX and Linen) say of their weights: which axes are inputs and outputs.

Nothing here imports Flax unless it is given a Flax object: the optax side of the library works
where Flax is not installed.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
import itertools
import string
import sys
from typing import Any, NamedTuple, TypeAlias

from lowrank_optax.matrices.views import WeightDimensionNumbers


class Kernel(NamedTuple):
    """One weight of a layer, as the layer's constructor describes it.

    Attributes:
      path: Its path below the layer.
      shape: Shape in a single layer, not stacked; None for a size that the layer does not know.
      reduction: Its axes of inputs, of those of ``shape``.
      output: Its axes of outputs.
      by_default: Whether it is a matrix without being asked for by name.
    """

    path: tuple[str, ...]
    shape: tuple[int | None, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]
    by_default: bool = True


Reader: TypeAlias = Callable[[Any], list[Kernel]]


def is_nnx_module(x: Any) -> bool:
    """Whether ``x`` is a ``flax.nnx.Module``; if it is, Flax has been imported already."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Module)


def is_linen_module(x: Any) -> bool:
    """Whether ``x`` is a ``flax.linen.Module``."""
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(x, linen.Module)


def read_layer(module: Any) -> list[Kernel] | None:
    """The weights of a layer of Flax (or of a subclass); None for modules of other types."""
    readers = _readers()
    return next((readers[t](module) for t in type(module).__mro__ if t in readers), None)


def infer_axes(
    kernel: Kernel, shape: tuple[int, ...], bias_shape: tuple[int, ...] | None
) -> tuple[WeightDimensionNumbers, tuple[int, ...]] | None:
    """Dimension numbers for a weight that may have more axes than its layer says.

    The layer's own axes are the last ones if these fit, else the only ones that fit; the sizes of
    the others, known from a bias, have a say where the layer does not know its own. Axes of size 1
    count for nothing there, so that a bias may have some for the rows.

    Args:
      kernel: What the layer says.
      shape: The weight's shape.
      bias_shape: The shape of the layer's bias, if it has one.

    Returns:
      The dimension numbers, counted from the end, and the sizes of the leading stack axes (empty
      where the stack axes do not lead); None if the layer's axes cannot be told from the others.
    """
    own = kernel.shape
    per_output = tuple(size for axis, size in enumerate(own) if axis not in kernel.reduction)
    stack = None
    if bias_shape is not None and (axes := _find_axes(bias_shape, per_output)):
        stack = _others(bias_shape, axes)
    axes = _find_axes(shape, own, stack)
    if axes is None:
        return None
    from_end = lambda named: _one_or_more(tuple(axes[a] - len(shape) for a in named))
    spec = WeightDimensionNumbers(from_end(kernel.reduction), from_end(kernel.output))
    leading = len(shape) - len(own)
    return spec, shape[:leading] if axes[0] == leading else ()


def _find_axes(
    shape: Sequence[int], own: Sequence[int | None], stack: tuple[int, ...] | None = None
) -> tuple[int, ...] | None:
    fitting = [
        axes
        for axes in itertools.combinations(range(len(shape)), len(own))
        if all(size is None or shape[axis] == size for axis, size in zip(axes, own, strict=True))
        and (stack is None or _others(shape, axes) == stack)
    ]
    last = tuple(range(len(shape) - len(own), len(shape)))
    if last in fitting or len(fitting) != 1:
        return last if last in fitting else None
    return fitting[0]


def _others(shape: Sequence[int], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for axis, size in enumerate(shape) if axis not in axes and size != 1))


def _one_or_more(axes: tuple[int, ...]) -> int | tuple[int, ...]:
    return axes[0] if len(axes) == 1 else axes


@functools.cache
def _readers() -> dict[type, Reader]:
    from flax import linen, nnx

    norms = ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm")
    readers: dict[type, Reader] = {
        getattr(flax, name): lambda _: [] for flax in (nnx, linen) for name in norms
    }
    return readers | {
        nnx.Linear: _linear,
        linen.Dense: _linear,
        nnx.LinearGeneral: _linear_general,
        linen.DenseGeneral: _linear_general,
        nnx.Einsum: _einsum,
        linen.Einsum: _einsum,
        nnx.Conv: _convolution,
        linen.Conv: _convolution,
        linen.ConvLocal: _unshared_convolution,
        nnx.ConvTranspose: _transposed_convolution,
        linen.ConvTranspose: _transposed_convolution,
        nnx.Embed: _embedding,
        linen.Embed: _embedding,
        nnx.LoRA: _lora,
        linen.MultiHeadDotProductAttention: _linen_attention,
    }


def _tuple(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, Iterable) else (x,)


def _features(module: Any) -> tuple[Any, Any]:
    """Input features (None in Linen, whose layers learn them from their first input), output."""
    if is_linen_module(module):
        return None, module.features
    return module.in_features, module.out_features


def _linear(module: Any) -> list[Kernel]:
    return [Kernel(("kernel",), _features(module), (0,), (1,))]


def _linear_general(module: Any) -> list[Kernel]:
    inputs, outputs = _features(module)
    if is_linen_module(module):
        batch, inputs = [None] * len(_tuple(module.batch_dims)), [None] * len(_tuple(module.axis))
    else:
        batch = module.batch_axis.values()
    shape = (*batch, *_tuple(inputs), *_tuple(outputs))
    first_input, first_output = len(batch), len(shape) - len(_tuple(outputs))
    reduction, output = range(first_input, first_output), range(first_output, len(shape))
    return [Kernel(("kernel",), shape, tuple(reduction), tuple(output))] if output else []


def _einsum(module: Any) -> list[Kernel]:
    shape = tuple(module.shape if is_linen_module(module) else module.kernel_shape)
    if not module.einsum_str:  # Linen's may be given at the call
        return []
    inputs, letters, result = einsum_letters(module.einsum_str, None, len(shape))
    reduction, output = kernel_axes(module.einsum_str, len(shape))
    batch = [letter for letter in letters if letter in inputs and letter in result]
    if not reduction or not output or len(reduction) + len(output) + len(batch) != len(letters):
        return []
    return [Kernel(("kernel",), shape, reduction, output)]


def kernel_axes(equation: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of inputs and of outputs of the second operand of an einsum, of ``ndim`` axes."""
    x, kernel, result = einsum_letters(equation, None, ndim)
    reduction = tuple(i for i, c in enumerate(kernel) if c in x and c not in result)
    output = tuple(i for i, c in enumerate(kernel) if c in result and c not in x)
    return reduction, output


def einsum_letters(equation: str, x_ndim: int | None, kernel_ndim: int) -> tuple[str, str, str]:
    """The two operands and the result of an equation, ellipses spelled out."""
    operands, result = equation.replace(" ", "").split("->")
    x, kernel = operands.split(",")
    unused = [c for c in string.ascii_letters if c not in equation]
    hidden = 0
    if "..." in x and x_ndim is not None:
        hidden = x_ndim - len(x.replace("...", ""))
    if "..." in kernel:
        hidden = kernel_ndim - len(kernel.replace("...", ""))
    letters = "".join(unused[:hidden])
    x, kernel, result = (part.replace("...", letters) for part in (x, kernel, result))
    return x, kernel, result


def _convolution(module: Any) -> list[Kernel]:
    inputs, outputs = _features(module)
    groups = module.feature_group_count
    shape = (*_tuple(module.kernel_size), None if inputs is None else inputs // groups, outputs)
    window_and_inputs = tuple(range(len(shape) - 1))
    # Groups make a block-diagonal matrix, which no dimension numbers describe.
    return [Kernel(("kernel",), shape, window_and_inputs, (len(shape) - 1,), groups == 1)]


def _unshared_convolution(module: Any) -> list[Kernel]:
    positions = len(_tuple(module.kernel_size))
    shape = (*[None] * positions, None, module.features)
    return [Kernel(("kernel",), shape, (positions,), (positions + 1,))]


def _transposed_convolution(module: Any) -> list[Kernel]:
    features, window = _features(module), _tuple(module.kernel_size)
    axis = len(window)
    if module.transpose_kernel:
        return [Kernel(("kernel",), (*window, *features[::-1]), (*range(axis), axis + 1), (axis,))]
    return [Kernel(("kernel",), (*window, *features), tuple(range(axis + 1)), (axis + 1,))]


def _embedding(module: Any) -> list[Kernel]:
    return [Kernel(("embedding",), (module.num_embeddings, module.features), (0,), (1,), False)]


def _lora(module: Any) -> list[Kernel]:
    rank = module.lora_a.shape[-1]
    return [
        Kernel(("lora_a",), (module.in_features, rank), (0,), (1,), False),
        Kernel(("lora_b",), (rank, module.out_features), (0,), (1,), False),
    ]


def _linen_attention(module: Any) -> list[Kernel]:
    """Its projections are made at the call, under fixed names, so they are described here."""
    heads = module.num_heads
    return [
        *(
            Kernel((name, "kernel"), (None, heads, None), (0,), (1, 2))
            for name in ("query", "key", "value")
        ),
        Kernel(("out", "kernel"), (heads, None, None), (0, 1), (2,)),
    ]
