"""Arrays in codes of 1 to 8 bits, with a scale for each block: moments, weights and residuals."""

from lowrank_optax.quantization.blocks import (
    Affine,
    BlockFormat,
    Layout,
    Quantized,
    decode_blocks,
    dequantize,
    encode_blocks,
    layout_of,
    over_blocks,
    quantize,
)
from lowrank_optax.quantization.maps import Bits, CodeMap, MapName, code_map
from lowrank_optax.quantization.nf4 import nf4_dequantize, nf4_quantize, nf4_round
from lowrank_optax.quantization.packing import (
    Packing,
    PackingName,
    pack,
    packed_bytes,
    packing_of,
    unpack,
)

__all__ = [
    "Affine",
    "Bits",
    "BlockFormat",
    "CodeMap",
    "Layout",
    "MapName",
    "Packing",
    "PackingName",
    "Quantized",
    "code_map",
    "decode_blocks",
    "dequantize",
    "encode_blocks",
    "layout_of",
    "nf4_dequantize",
    "nf4_quantize",
    "nf4_round",
    "over_blocks",
    "pack",
    "packed_bytes",
    "packing_of",
    "quantize",
    "unpack",
]
