"""What is saved for the backward pass, recomputed, or moved to the host: one table of names."""

from collections import Counter
from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.activations.block_codes import codes_name
from lowrank_optax.compat.jax import Jaxpr, checkpoint_name, jaxpr_of, scan_length, sub_jaxprs

Place: TypeAlias = Literal["save", "recompute", "offload"]
PolicyTable: TypeAlias = Mapping[str, Place | int]


def policy(table: PolicyTable) -> "Policy":
    """A policy for ``jax.checkpoint`` from a table of named intermediates.

    Names are those of ``jax.ad_checkpoint.checkpoint_name``. What the table does not name is
    recomputed. A policy can only keep values that the program has, so a number of bits stands for
    the codes that a function such as `swiglu` makes of a tensor to which it was given the name.

    Args:
      table: From a name to ``"save"``, ``"recompute"``, ``"offload"`` (to pinned memory of the
        host, and back where the backward pass reads it), or the number of bits, 1 to 8, of the
        codes that are saved instead.

    Returns:
      A policy. `Policy.check` counts what a program attaches to each name, and refuses names that
      it never attaches: JAX ignores these.

    Raises:
      TypeError: If the table is not a mapping from strings.
      ValueError: If it is empty, or an entry is not one of the choices.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> policy = lro.activations.policy({"hidden": "save"})
      >>> def loss(w, x):
      ...     hidden = checkpoint_name(jnp.sin(x @ w), "hidden")
      ...     return jnp.sum(jnp.exp(hidden))
      >>> w, x = jnp.ones((4, 8)), jnp.ones((2, 4))
      >>> policy.check(loss, w, x)
      {'hidden': 1}
      >>> rematerialized = jax.checkpoint(loss, policy=policy)
      >>> report = lro.planning.saved_residuals(rematerialized, w, x, compiled=False)
      >>> report.bytes_by_name()
      {'hidden': 64}

    Reference:
      Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016,
      https://arxiv.org/abs/1604.06174; the choice for each tensor: Gao et al., A Survey on
      Efficient Training of Large Neural Networks, 2022, https://arxiv.org/abs/2202.10435.
    """
    if not isinstance(table, Mapping) or not all(isinstance(name, str) for name in table):
        raise TypeError(f"table={table!r} must be a mapping from names of intermediates.")
    if not table:
        raise ValueError(
            "table={} must name an intermediate. To recompute everything, use jax.checkpoint "
            "without a policy."
        )
    for name, place in table.items():
        is_bits = isinstance(place, int) and not isinstance(place, bool) and 1 <= place <= 8
        if not is_bits and place not in get_args(Place):
            raise ValueError(
                f"table[{name!r}]={place!r} must be 'save', 'recompute', 'offload', or a number of "
                f"bits from 1 to 8."
            )
    return Policy(tuple(sorted(table.items())))


@dataclasses.dataclass(frozen=True)
class Policy:
    """What `policy` returns: give it to ``jax.checkpoint(policy=...)``.

    Attributes:
      entries: The table's pairs of name and choice, sorted: equal tables are equal policies.
    """

    entries: tuple[tuple[str, Place | int], ...]

    @property
    def table(self) -> dict[str, Place | int]:
        """The table."""
        return dict(self.entries)

    def __call__(self, primitive: Any, *operands: Any, **params: Any) -> Any:
        """The policy as ``jax.checkpoint`` calls it for each operation."""
        return _jax_policy(self)(primitive, *operands, **params)

    def check(self, fn: Callable[..., Any], *args: Any) -> dict[str, int]:
        """The number of arrays that a function's program attaches to each name of the table.

        The function is traced with its derivative, and nothing is computed.

        Args:
          fn: Differentiable function, such as a loss or a block, with or without
            ``jax.checkpoint``.
          *args: Its arguments: pytrees of arrays or of ``jax.ShapeDtypeStruct``.

        Returns:
          Counts by name. One within a ``scan`` counts once for each step; codes count with their
          scales.

        Raises:
          ValueError: If the program never attaches one of the names; with a number of bits, if no
            codes of that many bits have the name.
        """
        found = _attached(fn, args)
        missing = [entry for entry in self.entries if not found[_attached_name(*entry)]]
        if missing:
            name, place = missing[0]
            what = f"codes of {place} bits named {name!r}" if isinstance(place, int) else repr(name)
            raise ValueError(
                f"the program never attaches {what}; it attaches "
                f"{', '.join(map(repr, sorted(found))) or 'no name'}. A name is attached by "
                f"jax.ad_checkpoint.checkpoint_name; codes, by swiglu(..., bits=, names=)."
            )
        return {name: found[_attached_name(name, place)] for name, place in self.entries}


@functools.cache
def _jax_policy(own: Policy) -> Callable[..., Any]:
    saved = [_attached_name(*x) for x in own.entries if x[1] not in ("recompute", "offload")]
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=[name for name, place in own.entries if place == "offload"],
        offload_src="device",
        offload_dst="pinned_host",
    )


def _attached_name(name: str, place: Place | int) -> str:
    return codes_name(name, place) if isinstance(place, int) else name


def _attached(fn: Callable[..., Any], args: tuple[Any, ...]) -> Counter[str]:
    """How many arrays of each name there are."""

    def tangent(x: Any) -> Any:
        floating = jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        return x if floating else np.zeros(jnp.shape(x), jax.dtypes.float0)

    # With the derivative, as codes are made only for it.
    derived = lambda *args: jax.jvp(fn, args, jax.tree.map(tangent, args))
    return _names_in(jaxpr_of(jax.make_jaxpr(derived)(*args)))


def _names_in(jaxpr: Jaxpr) -> Counter[str]:
    found: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        if name := checkpoint_name(equation):
            found[name] += 1
        for inner in sub_jaxprs(equation):
            for name, count in _names_in(jaxpr_of(inner)).items():
                found[name] += count * scan_length(equation)
    return found
