"""What a parameter is, by the names in its path."""

import re
from typing import Literal, TypeAlias

NamedKind: TypeAlias = Literal["adapters", "biases", "scales", "norms", "embeddings", "head"]

_ADAPTER = re.compile(r"lora_|(^|/)adapter(s|_groups)/", re.IGNORECASE)
_BIAS = re.compile(r"(^|_)(bias|beta)$", re.IGNORECASE)
_SCALE = re.compile(r"(^|_)(scale|gamma)$", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|_)(ln|rms)(_|\d|$)", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|(^|_)(wte|wpe)(_|\d|$)", re.IGNORECASE)
_HEAD = re.compile(
    r"unembed|embed\w*out|(^|_)(logits|classifier)(_|\d|$)"
    r"|^(?!(multi|attention|attn|self|cross|per)_)(\w+_)?head(_?\d+)?$",
    re.IGNORECASE,
)
_OUTPUT = re.compile(r"^output(_layer|_proj|_projection)?$", re.IGNORECASE)
_PROJECTION = re.compile(r"(^|_)(proj|projection|linear|dense|conv)(_?\d+)?$", re.IGNORECASE)
_PART_OF_BLOCK = re.compile(
    r"^((query|key|value|qkv|up|down|gate)(_proj)?|[qkvo]_proj|fc|wi|wo)(_?\d+)?$", re.IGNORECASE
)


def named_kind(path: str) -> NamedKind | None:
    """Returns what the names in a leaf's path say it is, or None for a weight like any other.

    The innermost name that says anything decides. The weight of a part of a block (``up``,
    ``q_proj``, ``query``) is a weight wherever it stands: ``moe_head/up/kernel``. The weight of
    another projection (``proj``, ``linear_1``, ``Dense_0``) is one unless it belongs to a head:
    ``patch_embed/proj/kernel`` and ``PreNorm_0/Dense_0/kernel`` are weights, and
    ``lm_head/dense/kernel`` is a head. Norms and embeddings lend their name to the module right
    inside them, but not to a ``kernel`` there, which Flax's norms and embeddings do not have. A
    module called ``output`` is a head only at the top of the tree; further down it belongs to an
    attention.

    Args:
      path: A path such as ``blocks/attention/query/kernel``.

    Returns:
      - ``"adapters"``: an array of an adapter of this library, or a factor of ``nnx.LoRA``;
      - ``"biases"``: a leaf called ``bias`` or ``beta``, of norms too;
      - ``"scales"``: a leaf called ``scale`` or ``gamma``;
      - ``"norms"``: any other leaf of a norm;
      - ``"embeddings"``: an embedding;
      - ``"head"``: an output head (``lm_head``, ``logits``, ``classifier``, ``unembed``).

    Example:
      >>> named_kind("embed/embedding"), named_kind("lm_head/kernel")
      ('embeddings', 'head')
      >>> print(named_kind("patch_embed/proj/kernel"))
      None
    """
    if _ADAPTER.search(path):
        return "adapters"
    names = [name for name in path.removeprefix("params/").split("/") if not name.isdecimal()]
    if not names:
        return None
    leaf = names[-1]
    if _BIAS.search(leaf):
        return "biases"
    if _SCALE.search(leaf):
        return "scales"
    is_weight = leaf in ("kernel", "weight", "w")
    in_projection = False
    for distance, name in enumerate(reversed(names)):
        is_part = is_weight or distance == 0
        if is_part and _PART_OF_BLOCK.search(name):
            return None
        if _HEAD.search(name) or (distance == len(names) - 1 and _OUTPUT.search(name)):
            return "head"
        in_projection |= is_part and bool(_PROJECTION.search(name))
        is_near = distance < 2 or (distance == 2 and leaf != "kernel")
        if is_near and not in_projection and _NORM.search(name):
            return "norms"
        if is_near and not in_projection and _EMBEDDING.search(name):
            return "embeddings"
    return None
