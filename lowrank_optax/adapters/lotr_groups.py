"""Which layers share the factors of a LoTR, told by their paths."""

from collections.abc import Callable, Hashable
import re
from typing import Literal, TypeAlias

GroupBy: TypeAlias = (
    Literal["shape", "kind", "kind_and_block"] | Callable[[str, tuple[int, int]], Hashable]
)


def layer_of(path: str) -> tuple[str, int | None]:
    """A layer's path without the numbers of layers, and the first of these.

    So a layer has the same name in a stack run by a scan and in a list. In Linen numbers hang on
    names: of these the first alone is dropped, since ``Dense_0`` and ``Dense_1`` in one block are
    two kinds of layers. A weight's path is that of its layer.

    Example:
      >>> layer_of("blocks/3/attention/query"), layer_of("blocks/attention/query")
      (('blocks/attention/query', 3), ('blocks/attention/query', None))
      >>> layer_of("layers_3/Dense_1")
      ('layers/Dense_1', 3)
    """
    index, names = None, []
    for name in re.sub(r"/(kernel|embedding|weight|w)$", "", path).split("/"):
        found = re.fullmatch(r"(?:(.+)_)?(\d+)", name)
        if found is None or (index is not None and found[1]):
            names.append(name)
            continue
        index = int(found[2]) if index is None else index
        if found[1]:
            names.append(found[1])
    return "/".join(names), index


def group_of(by: GroupBy, block_size: int, path: str, shape: tuple[int, int]) -> Hashable:
    """Equal for layers that share factors, as far as shapes allow.

    Args:
      by: As for `LoTR`.
      block_size: Layers in a block.
      path: Of the layer.
      shape: ``(d_in, d_out)``.
    """
    if callable(by):
        return by(path, shape)
    name, index = layer_of(path)
    if by == "kind":
        return name.rsplit("/", 1)[-1]
    if by == "kind_and_block":
        return name, None if index is None else index // block_size
    return None
