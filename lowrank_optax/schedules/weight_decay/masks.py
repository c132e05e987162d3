"""Which parameters decay: by what they are, told from the names that Flax gives them."""

from collections.abc import Callable, Sequence
import re
from typing import Any, Literal, get_args

import jax

from lowrank_optax.matrices.paths import compiled_pattern, path_string
from lowrank_optax.matrices.rules import VECTOR_OF_NORM, default_rule, is_no_matrix

ParameterKind = Literal["matrices", "embeddings", "head", "norms", "biases", "adapters", "others"]

DECAYED: tuple[ParameterKind, ...] = ("matrices", "embeddings", "head")

_ADAPTER = re.compile(r"lora_|(^|/)adapter(s|_groups)/")
_BIAS = re.compile(r"(^|[/_])((?i:bias|beta)|b)$")  # a matrix B is none
_SCALE = re.compile(r"(^|/)(scale|gamma)$", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|[/_])(ln|rms)([/_\d]|$)", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|(^|[/_])(wte|wpe)([/_\d]|$)", re.IGNORECASE)


def parameter_kinds(params: Any) -> Any:
    """What each parameter is: a tree like ``params`` with a name for each leaf.

    - ``"biases"``: leaves called ``bias`` (or ``b``, ``beta``), those of norms too;
    - ``"norms"``: leaves called ``scale`` (or ``gamma``), and other vectors of a norm;
    - ``"embeddings"``: what has ``embed``, ``wte`` or ``wpe`` in its path;
    - ``"head"``: an output head by name (``lm_head``, ``logits``, ``classifier``, ...);
    - ``"adapters"``: the arrays of adapters, ours and ``nnx.LoRA``'s;
    - ``"matrices"``: all other leaves that are matrices or stacks of them, kernels of convolutions
      and attention too;
    - ``"others"``: vectors and scalars that nothing explains.

    Names decide before shapes, so that the biases and scales of layers stacked by ``nnx.scan`` or
    ``nn.scan``, which have two axes, are biases and scales still. A tied embedding is one
    parameter, an embedding.

    Args:
      params: Any tree of arrays or ``jax.ShapeDtypeStruct``: of NNX, of Linen or a plain one.

    Returns:
      The tree of names.

    Example:
      >>> import jax.numpy as jnp
      >>> stacked = {"up": {"kernel": jnp.zeros((2, 4, 8)), "bias": jnp.zeros((2, 8))}}
      >>> parameter_kinds({"embed": jnp.zeros((9, 4)), "blocks": stacked})
      {'blocks': {'up': {'bias': 'biases', 'kernel': 'matrices'}}, 'embed': 'embeddings'}

    Reference:
      D'Angelo et al., Why Do We Need Weight Decay in Modern Deep Learning?, 2024,
      https://arxiv.org/abs/2310.04415, whose code selects by such names.
    """
    # What the rule by names would see as matrices if no name forbade it.
    specs = default_rule(params, include=".")
    is_matrix = {
        path_string(path): leaf is not None
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            specs, is_leaf=lambda x: x is None or hasattr(x, "reduction_axis")
        )
    }

    def kind(path: Any, leaf: Any) -> ParameterKind:
        name = path_string(path)
        explained = is_matrix.get(name, False) or name.endswith("kernel")
        return _kind(name, leaf.ndim > 2 or (leaf.ndim == 2 and explained))

    return jax.tree_util.tree_map_with_path(kind, params)


def decay_mask(
    kinds: Sequence[ParameterKind] = DECAYED,
    *,
    include: str | None = None,
    exclude: str | None = None,
) -> Callable[[Any], Any]:
    """A mask for weight decay: the parameters of these kinds, of any model.

    For ``weight_decay_mask`` of this library's optimizers, ``mask`` of ``optax.adamw`` and
    ``optax.masked``, and `add_weight_decay`. The default is that of the paper's language models:
    matrices, embeddings and the head decay; scales of norms and biases do not.

    Args:
      kinds: The kinds of `parameter_kinds` that decay.
      include: Regular expression; leaves in whose path (``blocks/mlp/up/kernel``) it is found decay
        too.
      exclude: Regular expression; leaves in whose path it is found do not. It wins over
        ``include``.

    Returns:
      A function of the parameters that gives a tree of bools.

    Raises:
      ValueError: If a kind is none of them, or a pattern no regular expression.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> mask = lro.schedules.decay_mask()
      >>> tx = optax.adamw(1e-3, weight_decay=0.1, mask=mask)
      >>> mask({"norm": {"scale": jnp.ones(4)}, "up": {"kernel": jnp.ones((4, 8))}})
      {'norm': {'scale': False}, 'up': {'kernel': True}}

    Reference:
      D'Angelo et al., 2024, https://arxiv.org/abs/2310.04415: ``configure_optimizers`` of the
      official code.
    """
    if isinstance(kinds, str) or not set(kinds) <= set(get_args(ParameterKind)):
        raise ValueError(f"kinds={kinds!r} must be some of {get_args(ParameterKind)}.")
    included, excluded = _pattern("include", include), _pattern("exclude", exclude)

    def mask(params: Any) -> Any:
        def decays(path: Any, kind: str) -> bool:
            name = path_string(path)
            if excluded is not None and excluded.search(name):
                return False
            return kind in kinds or (included is not None and bool(included.search(name)))

        return jax.tree_util.tree_map_with_path(decays, parameter_kinds(params))

    return mask


def _kind(name: str, is_matrix: bool) -> ParameterKind:
    if _ADAPTER.search(name):
        return "adapters"
    if _BIAS.search(name):
        return "biases"
    if _SCALE.search(name) or (VECTOR_OF_NORM.search(name) and not is_matrix):
        return "norms"
    if _EMBEDDING.search(name):
        return "embeddings"
    # What else is no matrix by its name is a head, but for a projection of what is normed.
    if is_no_matrix(name) and not _NORM.search(name):
        return "head"
    return "matrices" if is_matrix else "others"


def _pattern(argument: str, pattern: str | None) -> re.Pattern[str] | None:
    return None if pattern is None else compiled_pattern(argument, pattern)
