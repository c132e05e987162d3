"""Models whose files hold quantized weights, which are refused as such."""

from collections.abc import Mapping
import os
from typing import Any

_DTYPES = ("F8", "F6", "F4")
_NAMES = (".qweight", ".qzeros", ".absmax", ".SCB", ".weight_scale", ".weight_scale_inv", "_packed")


def check_not_quantized(
    folder: str | os.PathLike, config: Mapping[str, Any], dtypes: Mapping[str, str]
) -> None:
    """Refuses a folder whose weights are quantized.

    Args:
      folder: Folder that the message names.
      config: Fields of its config.json.
      dtypes: Dtypes of its tensors by name, as safetensors spells them.

    Raises:
      ValueError: If the configuration says that it is quantized, or its tensors show it.
    """
    text = config.get("text_config")
    configs = [config, text] if isinstance(text, Mapping) else [config]
    fields = ("quantization_config", "compression_config")
    said = next((c[field] for c in configs for field in fields if c.get(field)), None)
    found = [n for n, dtype in dtypes.items() if dtype.startswith(_DTYPES) or n.endswith(_NAMES)]
    if said is None and not found:
        return
    method = said.get("quant_method") if isinstance(said, Mapping) else said
    how = f"quantization_config has quant_method={method!r}" if said else ""
    how = how or f"{found[0]} is {dtypes[found[0]]}"
    raise ValueError(
        f"the model in {folder} is quantized ({how}), which is not read. Load it in transformers, "
        "dequantize it (`model.dequantize()`), save it, and give that folder."
    )
