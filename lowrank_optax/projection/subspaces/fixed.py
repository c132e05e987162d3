"""A basis that the user gives, and that stays."""

from collections.abc import Callable, Mapping
import re
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.view import View

BasisSource: TypeAlias = (
    jax.Array | Mapping[str, jax.Array] | Callable[[str, tuple[int, ...]], jax.Array]
)


def fixed(basis: BasisSource, orthonormal: bool = True) -> base.Subspace:
    """Subspace of a basis that is given: a frozen LoRA factor, or one found elsewhere.

    Training with it and no residual is training the other factor: for ``W + P B`` with ``P``
    frozen, the projected gradient ``PᵀG`` is the gradient of ``B``.

    Args:
      basis: An array ``[d, r]`` (or ``[*batch, d, r]``, one for each matrix of a stack) for all
        matrices, a mapping from patterns of paths (``re.search``, the first that is found) to such
        arrays, or a function of ``(path, shape)`` that returns one.
      orthonormal: Whether ``PᵀP = I``; residual rules then need fewer products.

    Raises:
      ValueError: When the optimizer's state is made: if no pattern is found in a path, or a pattern
        in no path; if a basis does not have as many rows as the compressed axis, or has more
        columns than ``min(m, n)``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> rule = lro.subspaces.fixed(jnp.eye(4, 2))
      >>> tx = lro.scale_by_projection(optax.identity(), rule, side="rows")
      >>> gradient = {"kernel": jnp.ones((4, 3))}
      >>> tx.update(gradient, tx.init(gradient))[0]["kernel"].sum(axis=1).tolist()
      [3.0, 3.0, 0.0, 0.0]

    Reference:
      Zhang et al., LoRA-FA, 2023, https://arxiv.org/abs/2308.03303, section 3.
    """

    def given(path: str) -> Any:
        if not isinstance(basis, Mapping):
            return basis
        found = next((x for pattern, x in basis.items() if re.search(pattern, path)), None)
        if found is None:
            raise ValueError(f"basis has no pattern for {path!r}: its patterns are {list(basis)}.")
        return found

    def basis_for(path: str, shape: tuple[int, ...]) -> jax.Array:
        source = given(path)
        return source(path, shape) if callable(source) else source

    def init(view: View) -> jax.Array:
        array = jnp.asarray(basis_for(view.path, view.shape), view.dtype)
        expected = (*view.batch, view.length, view.rank)
        if array.shape not in (expected, expected[-2:]):
            raise ValueError(
                f"basis of shape {array.shape} does not fit {view.path!r} of shape {view.shape}, "
                f"whose axis of {view.length} is compressed: it must be [{view.length}, r] with "
                f"r at most {min(view.shape[-2:])}."
            )
        stacked = jnp.array(jnp.broadcast_to(array, expected))
        return explicit_sharding.constrain(stacked, view.small_partition)

    def refresh(key: jax.Array, matrix: Any, last: jax.Array, momentum: Any, view: Any) -> Any:
        del key, matrix, momentum, view
        return last

    rank = lambda path, shape: jnp.shape(basis_for(path, shape))[-1]
    patterns = {"basis": tuple(basis)} if isinstance(basis, Mapping) else {}
    return base.from_basis(
        rank, refresh, init=init, orthonormal=orthonormal, turns=False, patterns=patterns
    )
