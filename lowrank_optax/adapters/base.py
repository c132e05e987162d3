"""What an adapter is: a small trainable change to a stack of frozen weights of one shape.

A method is a frozen dataclass of its options and a few pure functions of plain dictionaries of
arrays. It knows nothing of Flax: the hosts (`nnx`, `linen`, `pytree`) put its arrays into a model
and call `Adapter.apply` where a layer has been called.

Nearly every method is `LowRank`: all it has to say is which two thin factors its parameters make.
"""

import abc
from collections.abc import Hashable, Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.adapters.operands import Operand, Rows

Arrays: TypeAlias = Mapping[str, jax.Array]
Weights: TypeAlias = jax.Array | jax.ShapeDtypeStruct


class AdapterParams(NamedTuple):
    """The arrays of one adapter on a stack of ``L`` weights ``[L, d_in, d_out]``.

    Attributes:
      trainable: By name. Arrays have a leading axis of the layers, ``[L, ...]``, except those
        whose names are in the method's ``shared``, which all layers use.
      frozen: Likewise, what is needed but not trained.
      base: What the weights become, ``[L, d_in, d_out]``; None if they stay as they are.
    """

    trainable: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    base: jax.Array | None = None


class Merged(NamedTuple):
    """Weights with their adapter folded in.

    Attributes:
      weight: ``[..., d_in, d_out]`` in the dtype of the weight given.
      rounding_error: Largest absolute difference from the float32 sum, a float32 scalar: zero for
        float32 weights.
    """

    weight: jax.Array
    rounding_error: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter(abc.ABC):
    """A method: its options, and the functions that make and apply its parameters.

    Functions of one layer take ``p``, the layer's arrays by name, trainable, frozen and shared
    together (`layer_arrays`). They may have leading batch axes (experts), so methods are written
    for the last axes.
    """

    @property
    def shared(self) -> frozenset[str]:
        """Names of arrays that belong to the group, not to a layer."""
        return frozenset()

    @property
    def reads_weights(self) -> bool:
        """Whether the initial values depend on the weights, or on their shapes alone."""
        return False

    @property
    def changes_base(self) -> bool:
        """Whether the weights themselves are changed when it is attached."""
        return False

    def group(self, path: str, shape: tuple[int, int]) -> Hashable:
        """Weights whose answers are equal share the arrays of `init_shared`.

        Args:
          path: The layer's path in the model, as ``blocks/attention/query``.
          shape: ``(d_in, d_out)``.
        """
        return path

    def init_shared(self, key: jax.Array, members: Sequence[Weights]) -> AdapterParams:
        """The arrays that the members of a group share; none by default.

        Args:
          key: Of ``jax.random``.
          members: Stacks ``[L, d_in, d_out]``; shapes alone unless `reads_weights`.
        """
        del key, members
        return AdapterParams({}, {})

    @abc.abstractmethod
    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """The arrays of one stack of the group, without the shared ones.

        Args:
          key: Of ``jax.random``.
          weights: ``[L, d_in, d_out]``; a shape alone unless `reads_weights`.
          shared: The arrays of `init_shared`, trainable and frozen.
          embedding: Whether rows are looked up instead of multiplied: ``d_in`` is a vocabulary.
        """

    @abc.abstractmethod
    def apply(
        self,
        p: Arrays,
        x: Operand,
        y: jax.Array,
        *,
        weight: jax.Array,
        bias: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The layer's output with the adapter.

        Args:
          p: One layer's arrays.
          x: The layer's input, of which no more is asked than its product with a matrix.
          y: The layer's own output ``[..., d_out]``, with its bias.
          weight: The layer's weight ``[d_in, d_out]``.
          bias: Its bias ``[d_out]``, if it has one.
          key: For dropout; None where nothing is to be dropped.

        Returns:
          ``[..., d_out]``, in ``y``'s dtype.
        """

    @abc.abstractmethod
    def delta(self, p: Arrays, weight: jax.Array) -> jax.Array:
        """What the adapter adds to the weight: float32 ``[..., d_in, d_out]``."""

    def init(self, key: jax.Array, weights: Weights, *, embedding: bool = False) -> AdapterParams:
        """All arrays of an adapter on one stack of weights, which is a group of its own.

        Args:
          key: Of ``jax.random``.
          weights: ``[L, d_in, d_out]``.
          embedding: As for `init_layers`.

        Raises:
          ValueError: If ``weights`` has other than three axes.
        """
        check_stack(weights)
        of_group, of_layers = jax.random.split(key)
        shared = self.init_shared(of_group, [weights])
        own = self.init_layers(
            of_layers, weights, shared.trainable | shared.frozen, embedding=embedding
        )
        return AdapterParams(shared.trainable | own.trainable, shared.frozen | own.frozen, own.base)

    def layer_arrays(self, params: AdapterParams, layer: int | jax.Array) -> dict[str, jax.Array]:
        """The arrays of one layer, as `apply` and `delta` take them."""
        together = params.trainable | params.frozen
        return {name: x if name in self.shared else x[layer] for name, x in together.items()}

    def stack_arrays(self, params: AdapterParams, batch: int) -> dict[str, jax.Array]:
        """The arrays of all ``batch`` layers at once: shared ones are broadcast."""
        together = params.trainable | params.frozen
        return {
            name: jnp.broadcast_to(x, (batch, *x.shape)) if name in self.shared else x
            for name, x in together.items()
        }

    def deltas(self, params: AdapterParams, weights: jax.Array) -> jax.Array:
        """`delta` of every layer of a stack, float32 ``[L, d_in, d_out]``."""
        return self.delta(self.stack_arrays(params, weights.shape[0]), weights)

    def merged(self, p: Arrays, weight: jax.Array) -> Merged:
        """The weight with the adapter folded in: summed in float32, rounded once."""
        exact = weight.astype(jnp.float32) + self.delta(p, weight)
        rounded = exact.astype(weight.dtype)
        error = jnp.max(jnp.abs(exact - rounded.astype(jnp.float32)), initial=0.0)
        return Merged(rounded, error)

    def unmerged(self, p: Arrays, merged: jax.Array) -> jax.Array:
        """The weight before `merged`, to the rounding of its dtype."""
        original = merged.astype(jnp.float32) - self.delta(p, merged)
        return original.astype(merged.dtype)

    def before(self, p: Arrays, x: Operand, y: jax.Array) -> jax.Array:
        """The output of the layer as it was before it was adapted, from its output now.

        They differ only if the method changes the weights (`changes_base`).
        """
        del p, x
        return y

    def original(self, p: Arrays, base: jax.Array) -> jax.Array:
        """The weight as it was before it was adapted, from what it was changed to."""
        del p
        return base

    def to_lora(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """Two factors, ``[..., d_in, r]`` and ``[..., r, d_out]``, of the original weight's change.

        Raises:
          TypeError: If the change is of no low rank.
        """
        del p
        raise TypeError(f"{type(self).__name__} makes no change of low rank.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Adapter):
    """A method whose change is a product of two thin factors: ``y + (drop(x) A) B``.

    No matrix of the weight's shape is formed, forward or backward. Factors are formed in float32
    from the parameters once a call, and cast to the activations' dtype. What is trained should go
    into the second: its gradient needs the ``r`` numbers ``x A`` of each token, that of the first
    the whole input.

    Attributes:
      rank: The rank, or (for a stack) one for each layer: arrays are then padded to the largest,
        and what is beyond a layer's own rank has no part in anything.
      alpha: The change is scaled by ``alpha / rank``; None for ``alpha = rank``.
      dropout: The fraction of inputs dropped before the first factor, in training.
      param_dtype: Of the adapter's arrays.
    """

    rank: int | tuple[int, ...] = 8
    alpha: float | None = None
    dropout: float = 0.0
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Checks the options, each where it is given.

        Raises:
          TypeError: If ``rank`` is no int or tuple of them.
          ValueError: If one is out of its range.
        """
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        if not all(isinstance(r, int) and not isinstance(r, bool) for r in ranks) or not ranks:
            raise TypeError(f"rank={self.rank!r} must be an int, or a tuple of one for each layer.")
        if min(ranks) < 1:
            raise ValueError(f"rank={self.rank!r} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and below 1.")

    @abc.abstractmethod
    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """The factors ``[..., d_in, r]`` and ``[..., r, d_out]`` of one layer's change, scaled."""

    @property
    def max_rank(self) -> int:
        """The number of columns of the first factor."""
        return max(self.rank) if isinstance(self.rank, tuple) else self.rank

    def scale_of(self, rank: int) -> float:
        """The scale of a layer of that rank."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def rank_scales(self, layers: int) -> dict[str, jax.Array]:
        """``rank_scale [L, r]``, the scale within a layer's rank and zero beyond; {} if all equal.

        Raises:
          ValueError: If there are other than ``layers`` ranks.
        """
        if not isinstance(self.rank, tuple):
            return {}
        if len(self.rank) != layers:
            raise ValueError(
                f"rank={self.rank} has {len(self.rank)} ranks for a stack of {layers} weights: "
                "give one for each, or an int."
            )
        ranks = jnp.array(self.rank)[:, None]
        scales = jnp.array([self.scale_of(r) for r in self.rank], jnp.float32)[:, None]
        return {"rank_scale": jnp.where(jnp.arange(self.max_rank) < ranks, scales, 0.0)}

    def layer_ranks(self) -> jax.Array:
        """The rank of each layer, int32 ``[L]``, or ``[1]`` of all."""
        return jnp.array(self.rank if isinstance(self.rank, tuple) else (self.rank,))

    def within_ranks(self) -> jax.Array:
        """Which of ``max_rank`` directions a layer has, bool ``[L, r]`` or ``[1, r]``.

        Beyond it factors start at zero, and stay there: no gradient moves them.
        """
        return jnp.arange(self.max_rank) < self.layer_ranks()[:, None]

    def scaled(self, p: Arrays, factor: jax.Array) -> jax.Array:
        """The second factor ``[..., r, d_out]`` times the scale of each row; float32."""
        factor = factor.astype(jnp.float32)
        if "rank_scale" in p:
            return p["rank_scale"][..., :, None] * factor
        scale = self.scale_of(self.max_rank)
        return factor if scale == 1 else scale * factor

    def apply(
        self,
        p: Arrays,
        x: Operand,
        y: jax.Array,
        *,
        weight: jax.Array,
        bias: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """``y + (drop(x) A) B``; see `Adapter.apply`."""
        del weight, bias
        return y + self.branch(p, x, key).astype(y.dtype)

    def branch(self, p: Arrays, x: Operand, key: jax.Array | None = None) -> jax.Array:
        """What is added to the layer's output, ``[..., d_out]``."""
        first, second = self.factors(p)
        return thin_product(self.dropped(x, key), first, second)

    def dropped(self, x: Operand, key: jax.Array | None) -> Operand:
        """The branch's input: some of it is dropped in training."""
        return x if key is None or self.dropout == 0 else x.drop(key, self.dropout)

    def delta(self, p: Arrays, weight: jax.Array) -> jax.Array:
        """The product of the factors; see `Adapter.delta`."""
        del weight
        return product(*self.factors(p))

    def to_lora(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """The factors themselves, scaled; see `Adapter.to_lora`."""
        return self.factors(p)


def thin_product(x: Operand, first: jax.Array, second: jax.Array) -> jax.Array:
    """``(x A) B`` in the dtype of ``x``'s products."""
    inside = x @ first
    return Rows(inside) @ second


def product(first: jax.Array, second: jax.Array) -> jax.Array:
    """``A B [..., d_in, d_out]`` in float32, at full precision."""
    return jnp.matmul(
        first.astype(jnp.float32), second.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def check_stack(weights: Weights) -> None:
    """Raises ValueError unless these are matrices in a stack."""
    if len(weights.shape) != 3:
        raise ValueError(
            f"weights must be a stack of matrices [layers, d_in, d_out], got {weights.shape}; "
            "a single one is weights[None]."
        )


def parameter_count(arrays: Any) -> int:
    """How many numbers a tree of arrays (or shapes) holds."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(arrays))


def byte_count(arrays: Any) -> int:
    """How many bytes a tree of arrays (or shapes) takes."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(arrays))
