"""Moments as kernels take them: float32 arrays, or codes and scales."""

from typing import Any

from lowrank_optax.quantization import BlockFormat, Quantized, layout_of, packing_of


def check_moment(name: str, moment: Any, fmt: BlockFormat | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless this is a moment of that shape, in codes if there is a format."""
    if fmt is None:
        if isinstance(moment, Quantized) or moment.shape != shape:
            found = "codes" if isinstance(moment, Quantized) else f"of shape {moment.shape}"
            raise ValueError(f"{name} is {found}: without formats it is an array of shape {shape}.")
        return
    if not isinstance(moment, Quantized):
        raise ValueError(f"{name} is no Quantized: with formats it is codes and scales.")
    expected = coded_shapes(shape, fmt)
    found = (moment.codes.shape, moment.scales.shape)
    if found != expected:
        raise ValueError(
            f"{name} has codes and scales of shapes {found}: for an array {shape} and blocks of "
            f"{fmt.block_size} they are {expected}."
        )


def reason_against_formats(formats: tuple[BlockFormat, BlockFormat], device: str) -> str | None:
    """Why no kernel for this device can take moments in these codes, or None."""
    first, second = formats
    if first.block_size != second.block_size:
        return "both moments must have blocks of one size"
    if first.map.bits != second.map.bits:
        return "both moments must have codes of as many bits"
    if any(fmt.map.name == "fp8" for fmt in formats):  # casts to float8
        return f"codes of the map 'fp8' cannot be made in a {device} kernel"
    return None


def coded_shapes(
    shape: tuple[int, ...], fmt: BlockFormat
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and scales of an array."""
    layout, codes = layout_of(shape, fmt.block_size), list(shape)
    if fmt.map.bits == 4:
        axis = packing_of(shape).axis
        codes[axis] = -(-codes[axis] // 2)
    return tuple(codes), (*layout.leading, layout.blocks)
