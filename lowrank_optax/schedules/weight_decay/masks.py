"""Which parameters decay: by what they are, told from the names that Flax gives them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax

from lowrank_optax.matrices.names import named_kind
from lowrank_optax.matrices.paths import (
    compiled_pattern,
    is_whole,
    leaves_by_path,
    normalised_path,
    path_string,
)
from lowrank_optax.matrices.rules import default_rule
from lowrank_optax.matrices.selection import check_patterns

ParameterKind = Literal["matrices", "embeddings", "head", "norms", "biases", "adapters", "others"]

DECAYED: tuple[ParameterKind, ...] = ("matrices", "embeddings", "head")


def parameter_kinds(params: Any) -> Any:
    """What each parameter is: a tree like ``params`` with a name for each leaf.

    - ``"biases"``: leaves called ``bias`` (or ``b``, ``beta``), those of norms too;
    - ``"norms"``: leaves called ``scale`` (or ``gamma``), and other vectors of a norm;
    - ``"embeddings"``: embeddings by name (``embed``, ``wte``, ``wpe``);
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
    # What the rule by names would see as matrices if all names allowed it.
    specs = default_rule(params, is_weight=lambda path: True)
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
      ValueError: If a kind is none of them, or a pattern no regular expression; in the function
        that is returned, if a pattern matches no parameter of a whole tree, or none decays
        though none is excluded.

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
    given = {"include": include, "exclude": exclude}
    patterns = {name: compiled_pattern(name, x) for name, x in given.items() if x is not None}
    found_in = lambda argument, name: argument in patterns and patterns[argument].search(name)

    def mask(params: Any) -> Any:
        must_find = is_whole(params)
        if must_find:
            paths = [normalised_path(path) for path in leaves_by_path(params)]
            for argument, pattern in patterns.items():
                check_patterns(argument, [pattern.pattern], paths, "parameter")

        def decays(path: Any, kind: str) -> bool:
            name = path_string(path)
            return not found_in("exclude", name) and (
                kind in kinds or bool(found_in("include", name))
            )

        kinds_of = parameter_kinds(params)
        found = jax.tree_util.tree_map_with_path(decays, kinds_of)
        if must_find and exclude is None and not any(jax.tree.leaves(found)):
            there = ", ".join(sorted(set(jax.tree.leaves(kinds_of))))
            raise ValueError(
                f"decay_mask selects no parameter: kinds={tuple(kinds)}, and these are {there}."
            )
        return found

    return mask


def _kind(name: str, is_matrix: bool) -> ParameterKind:
    kind = "biases" if name.rpartition("/")[2] == "b" else named_kind(name)
    if kind == "scales":
        return "norms"
    if kind is None or (kind == "norms" and is_matrix):
        return "matrices" if is_matrix else "others"
    return kind
