"""Which parameters decay: by their kinds, inferred from names and shapes."""

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
    """The kind of each parameter: a tree like ``params`` with a name for each leaf.

    - ``"biases"``: leaves called ``bias`` (or ``b``, ``beta``), also those of norms;
    - ``"norms"``: leaves called ``scale`` (or ``gamma``), other vectors of a norm, and the binary
      points of fixed-point layers;
    - ``"embeddings"``: embeddings by name (``embed``, ``wte``, ``wpe``);
    - ``"head"``: an output head by name (``lm_head``, ``logits``, ``classifier``, ...);
    - ``"adapters"``: the arrays of adapters, including ``nnx.LoRA``;
    - ``"matrices"``: all other matrices and stacks of them, including kernels of convolutions and
      attention;
    - ``"others"``: all other vectors and scalars.

    Names come before shapes: the biases and scales of layers stacked by ``nnx.scan`` or
    ``nn.scan``, which have two axes, are biases and norms. A tied embedding is one parameter, an
    embedding.

    Args:
      params: Any tree of arrays or ``jax.ShapeDtypeStruct``: of NNX, of Linen or a plain one.

    Example:
      >>> import jax.numpy as jnp
      >>> stacked = {"up": {"kernel": jnp.zeros((2, 4, 8)), "bias": jnp.zeros((2, 8))}}
      >>> parameter_kinds({"embed": jnp.zeros((9, 4)), "blocks": stacked})
      {'blocks': {'up': {'bias': 'biases', 'kernel': 'matrices'}}, 'embed': 'embeddings'}

    Reference:
      D'Angelo et al., Why Do We Need Weight Decay in Modern Deep Learning?, 2024,
      https://arxiv.org/abs/2310.04415, whose code selects by such names.
    """
    # The leaves that are matrices by their shapes, whatever their names.
    specs = jax.tree_util.tree_leaves_with_path(
        default_rule(params, is_weight=lambda path: True),
        is_leaf=lambda x: x is None or hasattr(x, "reduction_axis"),
    )
    matrices = {path_string(path) for path, spec in specs if spec is not None}

    def kind_of(path: Any, leaf: Any) -> ParameterKind:
        name = path_string(path)
        by_shape = leaf.ndim == 2 and (name in matrices or name.endswith("kernel"))
        is_matrix = leaf.ndim > 2 or by_shape
        kind = "biases" if name.rpartition("/")[2] == "b" else named_kind(name)
        if kind == "scales":
            return "norms"
        if kind is None or (kind == "norms" and is_matrix):
            return "matrices" if is_matrix else "others"
        return kind

    return jax.tree_util.tree_map_with_path(kind_of, params)


def decay_mask(
    kinds: Sequence[ParameterKind] = DECAYED,
    *,
    include: str | None = None,
    exclude: str | None = None,
) -> Callable[[Any], Any]:
    """A mask for weight decay that selects parameters by kind, for any model.

    It fits ``weight_decay_mask`` of this library's optimizers, ``mask`` of ``optax.adamw`` and
    ``optax.masked``, and `add_weight_decay`. By default, as in the paper's language models,
    matrices, embeddings and the head decay; scales of norms and biases do not.

    Args:
      kinds: The kinds of `parameter_kinds` that decay.
      include: Regular expression found in the paths (``blocks/mlp/up/kernel``) of further leaves
        that decay.
      exclude: Regular expression found in the paths of leaves that do not decay. It takes
        precedence over ``include``.

    Returns:
      A function from parameters to a tree of bools.

    Raises:
      ValueError: If a kind is unknown or a pattern is not a regular expression; and, when the mask
        is called on a whole tree, if a pattern matches no parameter, or nothing decays without
        ``exclude``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> mask = lro.training.decay_mask()
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
    matches = lambda argument, name: argument in patterns and patterns[argument].search(name)

    def mask(params: Any) -> Any:
        found = parameter_kinds(params)
        decays = jax.tree_util.tree_map_with_path(
            lambda path, kind: bool(
                not matches("exclude", path_string(path))
                and (kind in kinds or matches("include", path_string(path)))
            ),
            found,
        )
        if is_whole(params):
            paths = [normalised_path(path) for path in leaves_by_path(params)]
            for argument, pattern in patterns.items():
                check_patterns(argument, [pattern.pattern], paths, "parameter")
            if exclude is None and not any(jax.tree.leaves(decays)):
                there = ", ".join(sorted(set(jax.tree.leaves(found))))
                raise ValueError(
                    f"decay_mask selects no parameter: kinds={tuple(kinds)}, and these are {there}."
                )
        return decays

    return mask
