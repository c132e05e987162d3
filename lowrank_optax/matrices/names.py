"""What a parameter is, by the names in its path."""

import re
from typing import Literal, TypeAlias

NamedKind: TypeAlias = Literal["adapters", "biases", "scales", "norms", "embeddings", "head"]

_ADAPTER = re.compile(r"lora_|(^|/)adapter(s|_groups)/", re.IGNORECASE)
_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_BIAS = re.compile(r"(^|_)(bias|beta)$")
_SCALE = re.compile(r"(^|_)(scale|gamma)$|^integer_bits$|^angle_matrices$")
_NORM = re.compile(r"norm|(^|_)(ln|rms)(_|\d|$)")
_EMBEDDING = re.compile(r"(?<!time_)(?<!timestep_)(?<!patch_)embed|(^|_)(wte|wpe)(_|\d|$)|^shared$")
_OUTPUT_HEAD = re.compile(
    r"unembed|embed\w*out|(^|_)(?<!pre_)(logits|classifier)(_|\d|$)|(^|_)lm_?head(_?\d+)?$"
)
_HEAD = re.compile(r"^(?!\w*(attention|attn)|(multi|self|cross|per)_)(\w+_)?head(_?\d+)?$")
_OUTPUT = re.compile(r"^output(_layer|_proj|_projection)?$")
_INSIDE = re.compile(r"attention|attn|block|(^|_)layers?(_?\d+)?$")  # where heads are attention's
_PROJECTION = re.compile(r"(^|_)(proj|projection|linear|dense|conv)(_?\d+)?$")
_PART_OF_BLOCK = re.compile(
    r"^((query|key|value|qkv|up|down|gate)(_proj)?|[qkvo]_proj|(c_)?fc|c_(attn|proj)|mlp|wi|wo)(_?\d+)?$"
)
_WEIGHT = re.compile(r"^w(\d|_|$)")
_CONTAINER = re.compile(r"^(layers_?)?\d*$|^layers$")  # of nn.Sequential and lists


def named_kind(path: str) -> NamedKind | None:
    """Returns what the names in a leaf's path say it is, or None for a weight like any other.

    Names are read as words: ``LMHead_0`` as ``lm_head_0``. The last two names decide, of modules
    and of a leaf that is not called ``kernel``, ``weight``, ``w`` or ``table``:

    - The weight of a part of a block (``up``, ``q_proj``, ``query``) is a weight wherever it is:
      ``moe_head/up/kernel``.
    - So is that of another projection (``proj``, ``linear_1``, ``Dense_0``) in an embedding or a
      norm, as ``patch_embed/proj/kernel``, but not in a head: ``lm_head/dense/kernel``.
    - A ``kernel`` belongs to no norm and no embedding, which have none in Flax:
      ``layernorm_qkv/kernel`` is a weight.
    - A ``head_0`` inside a block or an attention is one of the attention's heads, so not an output
      head; a module called ``output`` is an output head only at the top of the tree.

    Args:
      path: A path such as ``blocks/attention/query/kernel``.

    Returns:
      - ``"adapters"``: an array of an adapter of this library, or a factor of ``nnx.LoRA``;
      - ``"biases"``: a leaf called ``bias`` or ``beta``, of norms too;
      - ``"scales"``: a leaf called ``scale`` or ``gamma``, and the binary points of fixed-point
        layers, ``integer_bits``, which are the logarithms of scales, and the ``angle_matrices`` of
        ComRoPE, which are frequencies;
      - ``"norms"``: any other leaf of a norm;
      - ``"embeddings"``: an embedding;
      - ``"head"``: an output head (``lm_head``, ``logits``, ``classifier``, ``unembed``).

    Example:
      >>> named_kind("embed/embedding"), named_kind("LMHead_0/kernel")
      ('embeddings', 'head')
      >>> print(named_kind("patch_embed/proj/kernel"))
      None
    """
    if _ADAPTER.search(path):
        return "adapters"
    *modules, leaf = (_WORDS.sub("_", name).lower() for name in path.split("/"))
    if _BIAS.search(leaf):
        return "biases"
    if _SCALE.search(leaf):
        return "scales"
    is_kernel = leaf == "kernel" or leaf.endswith("_kernel")
    is_weight = is_kernel or leaf in ("weight", "w", "table")
    places = [i for i, name in enumerate(modules) if not _CONTAINER.search(name)]
    names = [modules[i] for i in places] + ([] if is_weight else [leaf])
    if not names or _PART_OF_BLOCK.search(names[-1]):
        return None
    for i in range(len(names) - 1, max(len(names) - 3, -1), -1):
        outside = modules[: places[i]] if i < len(places) else modules
        is_output = _OUTPUT.search(names[i]) and set(outside) <= {"params", "model"}
        is_head = _HEAD.search(names[i]) and not any(map(_INSIDE.search, outside))
        if is_output or is_head or _OUTPUT_HEAD.search(names[i]):
            return "head"
    if is_kernel or _PROJECTION.search(names[-1]):
        return None
    if any(map(_NORM.search, names[-1:] if is_weight or _WEIGHT.search(leaf) else names[-2:])):
        return "norms"
    return "embeddings" if any(map(_EMBEDDING.search, names[-2:])) else None
