"""The passes through a model of blocks that `update_in_backward` consists of."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.matrices.paths import normalised_path, path_string
from lowrank_optax.slices.independence import sources
from lowrank_optax.training.layered_models import (
    LayeredModel,
    check_same_length,
    joined,
    listed_blocks,
)

# What a step's key is folded with, for each part of the model.
EMBED, BLOCKS, HEAD = range(3)

# Metrics of the step itself.
NORMS = ("block_gradient_norms", "gradient_norm")

Gradients = dict[int, jax.Array]
# A block's parameters in the order of their tree, and the tree of its frozen weights.
Weights = tuple[Sequence[jax.Array], Any]
# The gradient of a block's input, and float32 sums of those of what all blocks share.
Through = tuple[jax.Array, Gradients]


class Passes:
    """A model's passes on a batch. Activations have the micro-batches as their first axis.

    Attributes:
      params: The parameters.
      leaves: Their arrays, in the order of the tree.
      outside: Indices of those that belong to no block.
      stack: Indices of the stacked ones ``[layers, ...]``; empty if blocks are a list.
      listed: For each block of a list, the indices of its own; empty if blocks are stacked.
      frozen: The frozen weights of the blocks, stacked, or by the number of a listed block.
      layers: Number of blocks.
    """

    def __init__(
        self, model: LayeredModel, params: Any, frozen: Any, batch: Any, key: Any, count: int
    ) -> None:
        self.model, self.params, self.key, self.count = model, params, key, count
        self.batches = jax.tree.map(lambda x: _in_parts(x, count), batch)
        with_paths = jax.tree.leaves_with_path(params)
        if not with_paths:
            raise ValueError("params has no array: nothing is trained.")
        for path, x in with_paths:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"parameter {path_string(path)!r} is {x.dtype}, not floating.")
        self.leaves = [x for _, x in with_paths]
        names = [normalised_path(path) for path, _ in with_paths]
        held = {normalised_path(path) for path, _ in jax.tree.leaves_with_path(frozen)}
        if twice := [name for name in names if name in held]:
            raise ValueError(f"{'/'.join(twice[0])!r} is in params and in frozen: leave one out.")
        blocks = [i for i, name in enumerate(names) if name[0] == "blocks"]
        self.outside = [i for i, name in enumerate(names) if name[0] != "blocks"]
        self._frozen_outside = {name: x for name, x in frozen.items() if name != "blocks"}
        trees, frozen = params.get("blocks", {}), frozen.get("blocks", {})
        listed, frozen_listed = listed_blocks(trees), listed_blocks(frozen)
        if listed or frozen_listed:
            if listed is None or frozen_listed is None:
                raise ValueError("blocks are a list in one of params and frozen, and not in both.")
            check_same_length(trees, frozen)
            self.layers = 1 + max({*listed, *frozen_listed})
            parts = [listed.get(i) for i in range(self.layers)]
            rest = iter(blocks)
            self.listed = [[next(rest) for _ in jax.tree.leaves(part)] for part in parts]
            self.stack, self.frozen = [], frozen_listed
            self._structures = list(map(jax.tree.structure, parts))
        else:
            sizes = {x.shape[:1] for x in jax.tree.leaves((trees, frozen))}
            if len(sizes) != 1 or not sizes.isdisjoint({(), (0,)}):
                raise ValueError(
                    f"params['blocks'] must be stacked along a first axis, not {sizes}."
                )
            (self.layers,) = next(iter(sizes))
            self.stack, self.listed, self.frozen = blocks, [], frozen
            self._structures = [jax.tree.structure(trees)]

    def outer(self, leaves: Mapping[int, jax.Array]) -> Any:
        """The dictionary of parameters outside of the blocks, with these instead of its own."""
        new = [leaves.get(i, x) for i, x in enumerate(self.leaves)]
        tree = jax.tree.unflatten(jax.tree.structure(self.params), new)
        return joined({name: tree[name] for name in tree if name != "blocks"}, self._frozen_outside)

    def keys(self, part: int, layer: Any = None) -> Any:
        """A key for each micro-batch."""
        if self.key is None:
            return None
        key = jax.random.fold_in(self.key, part)
        key = key if layer is None else jax.random.fold_in(key, layer)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.count))

    def each(self, function: Callable[..., Any], keys: Any, *arrays: Any) -> Any:
        """``function(*arrays, batch, key)`` of each micro-batch."""
        arguments = (*arrays, self.batches, keys)
        if self.count == 1:
            return _one_more_axis(function(*first_of(arguments)))
        return jax.lax.map(lambda arguments: function(*arguments), arguments)

    def mean_gradients(
        self, function: Callable[..., Any], params: Any, keys: Any, *arrays: Any
    ) -> tuple[Any, Any]:
        """The mean of the micro-batches' gradients, and what else each gives.

        With several micro-batches the mean is float32, however the parameters are stored.

        Args:
          function: ``function(params, *arrays, batch, key) -> (gradients, others)``.
          params: What the gradients belong to.
          keys: A key for each micro-batch.
          *arrays: Further arguments, of each micro-batch.
        """
        arguments = (*arrays, self.batches, keys)
        if self.count == 1:
            gradients, others = function(params, *first_of(arguments))
            return gradients, _one_more_axis(others)

        def add(total: Any, arguments: Any) -> Any:
            gradients, others = function(params, *arguments)
            return jax.tree.map(lambda t, g: t + to_float32(g), total, gradients), others

        zeros = jax.tree.map(lambda x: jnp.zeros_like(to_float32(x)), params)
        total, others = jax.lax.scan(add, zeros, arguments)
        return jax.tree.map(lambda x: x / self.count, total), others

    def forward(self) -> tuple[jax.Array, Any]:
        """The last block's output, and the inputs of all blocks, stacked or in a list."""
        outer = self.outer({})
        x = self.each(lambda *of: self.model.embed(outer, *of), self.keys(EMBED))
        if self.listed:
            inputs = []
            for layer in range(self.layers):
                inputs.append(x)
                x = self.block(self.of_listed(layer), x, layer)
            return x, inputs

        def one(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
            return self.block(layer[0], x, layer[1]), x

        return jax.lax.scan(one, x, (self.of_stack, jnp.arange(self.layers)))

    @property
    def of_stack(self) -> Weights:
        """The stacked parameters, and the stacked frozen weights."""
        return [self.leaves[i] for i in self.stack], self.frozen

    def of_listed(self, layer: int) -> Weights:
        """The parameters of a block of a list, and its frozen weights."""
        return [self.leaves[i] for i in self.listed[layer]], self.frozen.get(layer)

    def block(self, weights: Weights, x: jax.Array, layer: Any) -> jax.Array:
        """The output of a block."""
        call = lambda x, *of: self._block(weights, {}, x, layer, *of)
        y = self.each(call, self.keys(BLOCKS, layer), x)
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"a block's output, {y.dtype}{list(y.shape[1:])}, must have the shape and dtype of "
                f"its input, {x.dtype}{list(x.shape[1:])}."
            )
        return y

    def _block(
        self, weights: Weights, shared: Gradients, x: Any, layer: Any, batch: Any, key: Any
    ) -> jax.Array:
        """The output of a block for a micro-batch, with some parameters outside of it replaced."""
        own, frozen = weights
        number = layer if self.listed else 0
        tree = joined(self._structures[number].unflatten(own), frozen)
        return self.model.block(number, tree, self.outer(shared), x, batch, key)

    def block_gradients(
        self, weights: Weights, x: jax.Array, through: Through, layer: Any
    ) -> tuple[list[jax.Array], Through]:
        """The gradients of a block's parameters and of its input; recomputes the block.

        Those of the parameters that blocks share are added to what the blocks after it gave.
        """
        (own, frozen), (dx, total) = weights, through

        def one(trained: Any, x: Any, dx: Any, batch: Any, key: Any) -> Any:
            def call(own: Any, shared: Gradients, x: jax.Array) -> jax.Array:
                return self._block((own, frozen), shared, x, layer, batch, key)

            *gradients, dx = jax.vjp(call, *trained, x)[1](dx)
            return gradients, dx

        trained = [list(own), {i: self.leaves[i] for i in total}]
        keys = self.keys(BLOCKS, layer)
        (gradients, shared), dx = self.mean_gradients(one, trained, keys, x, dx)
        # What all blocks share is rounded only once all of them are added.
        return _in_dtypes_of(own, gradients), (dx, jax.tree.map(jnp.add, total, shared))

    def backward_from(self, dx: jax.Array) -> Through:
        """What goes backwards through the blocks, from the gradient of the last one's output."""
        return dx, {i: to_float32(jnp.zeros_like(x)) for i, x in self.used_by_blocks.items()}

    def head(self, params: Any, x: jax.Array, batch: Any, key: Any) -> tuple[Any, Any]:
        """The loss and the metrics of a micro-batch."""
        result = self.model.head(params, x, batch, key)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        if jnp.shape(loss) != ():
            raise ValueError(f"the loss must be a scalar, not of shape {jnp.shape(loss)}.")
        if taken := [name for name in NORMS if name in metrics]:
            raise ValueError(f"a metric of the loss is named {taken[0]!r}, as one of the step is.")
        return loss, metrics

    def loss(self) -> tuple[jax.Array, dict[str, Any]]:
        """The loss and the metrics of the batch."""
        outer, x = self.outer({}), self.forward()[0]
        return _mean(self.each(lambda *of: self.head(outer, *of), self.keys(HEAD), x))

    def head_gradients(self, x: jax.Array) -> tuple[Gradients, jax.Array, Any]:
        """The gradients of what the head uses and of its input; the loss and the metrics."""

        def one(leaves: Any, x: Any, batch: Any, key: Any) -> Any:
            call = lambda leaves, x: self.head(self.outer(leaves), x, batch, key)
            loss, pull, metrics = jax.vjp(call, leaves, x, has_aux=True)
            gradients, dx = pull(jnp.ones_like(loss))
            return gradients, (dx, (loss, metrics))

        keys = self.keys(HEAD)
        used = self._used(HEAD, lambda leaves, *of: self.head(self.outer(leaves), *of)[0], x)
        gradients, (dx, results) = self.mean_gradients(one, used, keys, x)
        return _in_dtypes_of(used, gradients), dx, _mean(results)

    def embed_gradients(self, dx: jax.Array) -> Gradients:
        """The gradients of what the embedding uses, from that of its output."""
        if not self.used_by_embed:
            return {}

        def one(leaves: Any, dx: Any, batch: Any, key: Any) -> Any:
            call = lambda leaves: self.model.embed(self.outer(leaves), batch, key)
            return *jax.vjp(call, leaves)[1](dx), None

        return self.mean_gradients(one, self.used_by_embed, self.keys(EMBED), dx)[0]

    @functools.cached_property
    def used_by_embed(self) -> Gradients:
        """The parameters that the embedding uses."""
        return self._used(EMBED, lambda leaves, *of: self.model.embed(self.outer(leaves), *of))

    @functools.cached_property
    def used_by_blocks(self) -> Gradients:
        """The parameters outside of the blocks that blocks use."""
        if not self.model.reads_outside or not self.outside:
            return {}

        def blocks(leaves: Gradients, batch: Any, key: Any) -> jax.Array:
            x = self.model.embed(self.outer({}), batch, key)
            for layer in range(self.layers if self.listed else 1):
                own = self.of_listed(layer) if self.listed else first_of(self.of_stack)
                x = self._block(own, leaves, x, layer, batch, key)
            return x

        return self._used(BLOCKS, blocks)

    def _used(self, part: int, function: Callable[..., Any], *arrays: Any) -> Gradients:
        leaves = {i: self.leaves[i] for i in self.outside}
        arguments = first_of((*arrays, self.batches, self.keys(part)))
        program = jax.make_jaxpr(function)(leaves, *arguments)
        labels = [frozenset((i,)) for i in sorted(leaves)]
        labels += [frozenset()] * len(jax.tree.leaves(arguments))
        used = frozenset().union(*sources(program, labels))
        return {i: leaves[i] for i in sorted(used)}

    @property
    def first_layer(self) -> int:
        """The first block that needs a backward pass: nothing before it is trained."""
        if self.used_by_embed or self.used_by_blocks or self.stack:
            return 0
        trained = (layer for layer, own in enumerate(self.listed) if own)
        return next(trained, self.layers)

    @property
    def is_written_out(self) -> bool:
        """Whether the backward pass visits listed blocks, or none at all, and needs no loop."""
        return bool(self.listed) or self.first_layer == self.layers


def _in_parts(x: jax.Array, count: int) -> jax.Array:
    """``[batch, ...]`` as ``[count, batch / count, ...]``, where each device keeps its examples."""
    if count == 1:
        return x[None]
    if x.ndim == 0 or x.shape[0] % count:
        raise ValueError(
            f"an array of the batch, of shape {x.shape}, has no equal parts for "
            f"micro_batches={count} along its first axis."
        )
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)


def to_float32(x: jax.Array) -> jax.Array:
    """``x`` in float32, or float64 if it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _in_dtypes_of(like: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x, y: y.astype(x.dtype), like, tree)


def first_of(tree: Any) -> Any:
    """Each array's first entry."""
    return jax.tree.map(lambda x: x[0], tree)


def _one_more_axis(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


def _mean(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)
