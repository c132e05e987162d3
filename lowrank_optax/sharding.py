"""Shardings of optimizer state from the shardings of the parameters.

The state is traced once, without computing anything, on the parameters' mesh with explicit axes.
There a sharding is part of an array's type, so that each state array's follows from how it is
computed from the parameters; nothing is guessed from names or shapes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding
import optax

from lowrank_optax.matrices.paths import path_string

__all__ = ["state_shardings"]


def state_shardings(tx: optax.GradientTransformation, params: Any, param_shardings: Any) -> Any:
    """The shardings of ``tx.init(params)``, as they follow from those of the parameters.

    For ``jit(tx.init, out_shardings=...)``, without which a jitted ``init`` makes replicated state
    on a mesh of automatic axes; for ``in_shardings`` and ``out_shardings`` of a training step; and
    for restoring a checkpoint onto a mesh. Of a parameter ``[*batch, m, n]`` that is projected

    - moments in the projected shape are sharded as the batch axes and the matrix axis that is not
      projected; the axis of the rank is not sharded;
    - a basis ``[*batch, d, r]`` and its optimizer as the batch axes alone, and so is the state of
      each matrix, such as the count of its next refresh (the inner optimizer's own counts of steps
      are replicated);
    - an error of the parameter's own shape as the parameter; of one in 8 bits, the numbers for each
      row as the rows.

    Moments of other leaves have their parameters' shardings, and scalars are replicated. A matrix
    axis that was made of several axes of the weight has the sharding of the first of them.

    Args:
      tx: Any transformation of this library or optax, and any wrapper of them.
      params: The parameters, any tree of arrays or ``jax.ShapeDtypeStruct``.
      param_shardings: A ``NamedSharding`` for each parameter, in the same tree, or in a prefix of
        it: one ``NamedSharding`` for all of a subtree. All on one mesh, of any axis types.

    Returns:
      The tree ``tx.init(params)`` with a ``NamedSharding`` on that mesh for each array, in the
      mesh's default memory.

    Raises:
      TypeError: If ``tx`` has no ``init``, or a leaf of ``param_shardings`` is no
        ``NamedSharding``.
      ValueError: If the trees do not fit, there are several meshes or no sharding at all, or a
        parameter's axis is not a multiple of the devices it is sharded over.
      Exception: What ``tx.init`` itself raises; JAX's ``ShardingTypeError`` if it makes an array
        whose sharding does not follow from the parameters', as ``optax.flatten`` does.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
      >>> shardings = {"kernel": NamedSharding(mesh, PartitionSpec("data", "model"))}
      >>> params = {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
      >>> tx = lro.galore(0.01, rank=4)
      >>> state = lro.sharding.state_shardings(tx, params, shardings)[0]
      >>> print(state.inner.mu["kernel"].spec)  # [4, 256]
      P(None, 'model')
      >>> print(state.basis["kernel"].spec)  # [64, 4]
      P(None, None)

    Reference:
      Explicit sharding: https://docs.jax.dev/en/latest/notebooks/explicit-sharding.html
    """
    if not callable(getattr(tx, "init", None)):
        raise TypeError(f"tx={tx!r} must be an optax transformation.")
    shardings = _for_each_parameter(params, param_shardings)
    meshes = list(dict.fromkeys(sharding.mesh for sharding in shardings))
    if len(meshes) != 1:
        raise ValueError(f"param_shardings must be on one mesh; they are on {meshes}.")
    (mesh,) = meshes
    explicit = mesh.abstract_mesh.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))

    def typed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        on_explicit = NamedSharding(explicit, sharding.spec)
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=on_explicit)

    leaves, treedef = jax.tree.flatten(params)
    shapes = treedef.unflatten(map(typed, leaves, shardings))
    try:
        with jax.sharding.use_abstract_mesh(explicit):
            state = jax.eval_shape(tx.init, shapes)
    except Exception as error:
        error.add_note(
            "tx.init was traced for parameters sharded over explicit axes; a ShardingTypeError "
            "means that it makes an array whose sharding does not follow from theirs, as "
            "optax.flatten does."
        )
        raise
    spec = lambda x: PartitionSpec() if x.sharding is None else x.sharding.spec
    return jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), state)


def _for_each_parameter(params: Any, param_shardings: Any) -> list[NamedSharding]:
    """A sharding for each leaf of the parameters, each checked against it."""
    is_leaf = lambda x: x is None or isinstance(x, Sharding | PartitionSpec)
    try:
        spread = jax.tree.broadcast(param_shardings, params, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(
            "param_shardings must have the structure of params, or be a prefix of it, with a "
            f"NamedSharding for each array: {error}"
        ) from error
    shardings = jax.tree.leaves(spread, is_leaf=is_leaf)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), shardings, strict=True
    ):
        _check(path_string(path), leaf, sharding)
    return shardings


def _check(path: str, leaf: Any, sharding: Any) -> None:
    if not isinstance(sharding, NamedSharding):
        hint = ": give NamedSharding(mesh, spec)" if isinstance(sharding, PartitionSpec) else ""
        raise TypeError(f"param_shardings has {sharding!r} at {path!r}, no NamedSharding{hint}.")
    try:
        sharding.shard_shape(jnp.shape(leaf))
    except ValueError as error:
        raise ValueError(
            f"param_shardings at {path!r} does not fit the parameter of shape {jnp.shape(leaf)}: "
            f"{error}"
        ) from error
