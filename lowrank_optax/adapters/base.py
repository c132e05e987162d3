"""What an adapter is: a small trainable change to a stack of frozen weights of one shape.

A method is a frozen dataclass of its options and a few pure functions of plain dictionaries of
arrays. It knows nothing of Flax: the hosts (`nnx`, `linen`, `pytree`) put its arrays into a model
and add what `Adapter.branch` returns to the output of a layer.

Nearly every method is a `LowRank`, in the file beside this one.
"""

import abc
from collections.abc import Hashable, Mapping, Sequence
import dataclasses
import inspect
import math
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.operands import Operand
from lowrank_optax.matrices.argument_names import check_names

Arrays: TypeAlias = Mapping[str, jax.Array]
Side: TypeAlias = Literal["in", "out"] | None
Axes: TypeAlias = Mapping[str, tuple[Side, ...]]
Weights: TypeAlias = jax.Array | jax.ShapeDtypeStruct


class AdapterParams(NamedTuple):
    """The arrays of one adapter on a stack of ``L`` weights ``[L, d_in, d_out]``.

    Attributes:
      trainable: Arrays by name, with a leading axis of the layers, ``[L, ...]``, except those
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
    r"""A method: its options, and the functions that make and apply its parameters.

    Functions of one layer take ``p``, the layer's arrays by name, trainable, frozen and shared
    together (`layer_arrays`). They may have leading batch axes (experts), so methods are written
    for the last axes.

    A method defines `init_layers` and `branch`; `axes`, if it is to be used on a mesh; `delta`, if
    its change is a matrix added to the weight; and `removed` and `removed_weight`, if it takes a
    part out of the weight when it is attached. A layer's output with any number of adapters is

    .. math:: y + \sum_i s_i \, \mathrm{branch}_i + (1 - s_i) \, \mathrm{removed}_i .
    """

    def __new__(cls, *_: Any, **options: Any) -> Self:
        """Refuses options by their names in other libraries, with the names here."""
        check_names(cls.__name__, inspect.signature(cls.__init__).parameters, options)
        return super().__new__(cls)

    @property
    def shared(self) -> frozenset[str]:
        """Names of arrays that belong to the group, not to a layer."""
        return frozenset()

    axes: ClassVar[Axes] = {}
    """What the last axes of arrays are, by name: the weight's inputs, its outputs, or neither.

    So ``{"A": ("in", None), "B": (None, "out")}``: on a mesh these axes are sharded as the weight's
    are. All axes of arrays that are not named are whole on every device.
    """

    statistics: ClassVar[frozenset[str]] = frozenset()
    """Names of trained arrays whose gradients are statistics of the layer's input, and not slopes.

    `branch` makes them arrive; see ``lowrank_optax/adapters/statistics.py``.
    """

    @property
    def reads_weights(self) -> bool:
        """Whether the initial values depend on the weights, or on their shapes alone."""
        return False

    @property
    def has_static_shapes(self) -> bool:
        """Whether its arrays' shapes follow from the weights' shapes: `init` can be traced."""
        return True

    @property
    def changes_base(self) -> bool:
        """Whether the weights themselves are changed when it is attached."""
        return False

    @property
    def has_delta(self) -> bool:
        """Whether its change is a matrix added to the weight, so that it can be merged."""
        return type(self).delta is not Adapter.delta

    @property
    def depends_on_weight(self) -> bool:
        """Whether `delta` reads the weight's values; by default if the method defines `unmerged`.

        Such a method is merged only by itself and at strength 1.
        """
        return type(self).unmerged is not Adapter.unmerged

    def group(self, path: str, shape: tuple[int, int]) -> Hashable:
        """The group of a weight: those of equal groups share the arrays of `init_shared`.

        Args:
          path: The layer's path in the model, as ``blocks/attention/query``.
          shape: ``(d_in, d_out)``.
        """
        return path

    def init_shared(self, key: jax.Array, members: Sequence[Weights]) -> AdapterParams:
        """The arrays that the members of a group share; by default there are none.

        Args:
          key: PRNG key.
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
          key: PRNG key.
          weights: ``[L, d_in, d_out]``; a shape alone unless `reads_weights`.
          shared: The arrays of `init_shared`, trainable and frozen.
          embedding: Whether rows are looked up instead of multiplied: ``d_in`` is a vocabulary.
        """

    @abc.abstractmethod
    def branch(
        self,
        p: Arrays,
        x: Operand,
        *,
        y: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """What is added to the layer's output, ``[..., d_out]``.

        Args:
          p: One layer's arrays.
          x: The layer's input, of which only products with matrices are known.
          y: The layer's own output ``[..., d_out]``, with its bias.
          weight: The layer's weight ``[d_in, d_out]``.
          bias: Its bias ``[d_out]``, if it has one.
          key: PRNG key for dropout; None to drop nothing.
        """

    def removed(self, p: Arrays, x: Operand) -> jax.Array | None:
        """The output ``[..., d_out]`` of `removed_weight`; None if nothing was removed."""
        del p, x
        return None

    def removed_weight(self, p: Arrays) -> jax.Array | None:
        """What was removed from the weight when this was attached, float32; None for nothing."""
        del p
        return None

    def delta(self, p: Arrays, weight: jax.Array) -> jax.Array:
        """The matrix whose product with the input is `branch`: float32 ``[..., d_in, d_out]``.

        Raises:
          TypeError: If the method has none, as one that routes by its input.
        """
        del p, weight
        raise TypeError(
            f"the change of {type(self).__name__} depends on the layer's input: no matrix can be "
            "added to the weight instead, so it cannot be merged or exported. Leave it attached."
        )

    def init(self, key: jax.Array, weights: Weights, *, embedding: bool = False) -> AdapterParams:
        """All arrays of an adapter on one stack of weights, which is a group of its own.

        Args:
          key: PRNG key.
          weights: ``[L, d_in, d_out]``.
          embedding: As for `init_layers`.

        Raises:
          ValueError: If ``weights`` does not have three axes.
        """
        if len(weights.shape) != 3:
            raise ValueError(
                f"weights must be a stack of matrices [layers, d_in, d_out], got {weights.shape}; "
                "a single one is weights[None]."
            )
        of_group, of_layers = jax.random.split(key)
        shared = self.init_shared(of_group, [weights])
        own = self.init_layers(
            of_layers, weights, shared.trainable | shared.frozen, embedding=embedding
        )
        return AdapterParams(shared.trainable | own.trainable, shared.frozen | own.frozen, own.base)

    def layer_arrays(self, params: AdapterParams, layer: int | jax.Array) -> dict[str, jax.Array]:
        """The arrays of one layer, as `branch` and `delta` take them."""
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
        return rounded_to(weight.dtype, weight.astype(jnp.float32) + self.delta(p, weight))

    def unmerged(self, p: Arrays, merged: jax.Array) -> jax.Array:
        """The weight before `merged`, to the rounding of its dtype."""
        original = merged.astype(jnp.float32) - self.delta(p, merged)
        return original.astype(merged.dtype)

    def original(self, p: Arrays, base: jax.Array) -> jax.Array:
        """The weight with `removed_weight` added again, to the rounding of its dtype."""
        removed = self.removed_weight(p)
        return base if removed is None else (base.astype(jnp.float32) + removed).astype(base.dtype)

    def check_base(self, params: AdapterParams, weights: jax.Array) -> None:
        """Raises ValueError if weights are known not to be those that the arrays were made of.

        Args:
          params: The arrays of an adapter, for example restored ones.
          weights: ``[L, d_in, d_out]``.
        """
        del params, weights

    def to_lora(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """Two factors, ``[..., d_in, r]`` and ``[..., r, d_out]``, of the original weight's change.

        Raises:
          TypeError: If the change has no low rank.
        """
        del p
        raise TypeError(
            f"{type(self).__name__} makes no change of low rank: it cannot be converted to LoRA."
        )


def rounded_to(dtype: Any, exact: jax.Array) -> Merged:
    """A merged weight in its dtype, with the rounding error."""
    rounded = exact.astype(dtype)
    return Merged(rounded, jnp.max(jnp.abs(exact - rounded.astype(exact.dtype)), initial=0.0))


def product(first: jax.Array, second: jax.Array) -> jax.Array:
    """``A B [..., d_in, d_out]`` in float32, at full precision."""
    return jnp.matmul(
        first.astype(jnp.float32), second.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def parameter_count(arrays: Any) -> int:
    """How many numbers a tree of arrays (or shapes) holds."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(arrays))


def byte_count(arrays: Any) -> int:
    """How many bytes a tree of arrays (or shapes) takes."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(arrays))


def counts_of(trained: Any, frozen: Any) -> tuple[int, int, int]:
    """How many numbers are trained, how many are not, and the bytes of both."""
    return parameter_count(trained), parameter_count(frozen), byte_count((trained, frozen))
