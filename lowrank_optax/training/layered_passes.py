"""The passes through a model of blocks that `update_in_backward` consists of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.matrices.paths import normalised_path, path_string
from lowrank_optax.slices.independence import sources
from lowrank_optax.training.layered_models import LayeredFunctions

# What a step's key is folded with, for each part of the model.
EMBED, BLOCKS, HEAD = range(3)

# Metrics of the step itself.
NORMS = ("block_gradient_norms", "gradient_norm")

Gradients = dict[int, jax.Array]


class Passes:
    """A model's passes on a batch. Activations have the micro-batches as their first axis.

    Attributes:
      params: The parameters.
      leaves: Their arrays, in the order of the tree.
      outside: Indices of those that belong to no block.
      stack: Indices of the stacked ones ``[layers, ...]``; empty if blocks are a list.
      listed: For each block of a list, the indices of its own.
      layers: Number of blocks.
    """

    def __init__(
        self, functions: LayeredFunctions, params: Any, batch: Any, key: Any, count: int
    ) -> None:
        self.functions, self.params, self.key, self.count = functions, params, key, count
        self.batches = jax.tree.map(lambda x: _in_parts(x, count), batch)
        with_paths = jax.tree.leaves_with_path(params)
        for path, x in with_paths:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"parameter {path_string(path)!r} is {x.dtype}, not floating.")
        self.leaves = [x for _, x in with_paths]
        names = [normalised_path(path) for path, _ in with_paths]
        blocks = [i for i, name in enumerate(names) if name[0] == "blocks"]
        self.outside = [i for i, name in enumerate(names) if name[0] != "blocks"]
        trees = _list_of(params["blocks"])
        self.stack, self.listed = ([], _runs(blocks, trees)) if trees else (blocks, [])
        self.block_tree = jax.tree.structure(trees[0] if trees else params["blocks"])
        for i, tree in enumerate(trees):
            if jax.tree.structure(tree) != self.block_tree:
                raise ValueError(f"params['blocks'][{i}] has other parameters than block 0.")
        sizes = {self.leaves[i].shape[:1] for i in blocks}
        if not trees and (len(sizes) != 1 or not sizes.isdisjoint({(), (0,)})):
            raise ValueError(f"params['blocks'] must be stacked along a first axis, not {sizes}.")
        self.layers = len(trees) if trees else next(iter(sizes))[0]

    def outer(self, leaves: Mapping[int, jax.Array]) -> Any:
        """The dictionary of parameters outside of the blocks, with these instead of its own."""
        new = [leaves.get(i, x) for i, x in enumerate(self.leaves)]
        tree = jax.tree.unflatten(jax.tree.structure(self.params), new)
        return {name: tree[name] for name in tree if name != "blocks"}

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
        """The mean of the micro-batches' gradients, summed in float32, and what else each gives.

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
        to_float32 = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))

        def add(total: Any, arguments: Any) -> Any:
            gradients, others = function(params, *arguments)
            return jax.tree.map(lambda t, g: t + to_float32(g), total, gradients), others

        zeros = jax.tree.map(lambda x: jnp.zeros_like(to_float32(x)), params)
        total, others = jax.lax.scan(add, zeros, arguments)
        return jax.tree.map(lambda t, x: (t / self.count).astype(x.dtype), total, params), others

    def forward(self) -> tuple[jax.Array, Any]:
        """The last block's output, and the inputs of all blocks, stacked or in a list."""
        outer = self.outer({})
        x = self.each(lambda *of: self.functions.embed(outer, *of), self.keys(EMBED))
        if self.listed:
            inputs = []
            for layer, own in enumerate(self.listed):
                inputs.append(x)
                x = self.block([self.leaves[i] for i in own], x, layer)
            return x, inputs

        def one(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
            return self.block(layer[0], x, layer[1]), x

        stack = [self.leaves[i] for i in self.stack]
        return jax.lax.scan(one, x, (stack, jnp.arange(self.layers)))

    def block(self, weights: Sequence[jax.Array], x: jax.Array, layer: Any) -> jax.Array:
        """The output of a block."""
        weights = self.block_tree.unflatten(weights)
        call = lambda x, *of: self.functions.block(weights, x, *of)
        y = self.each(call, self.keys(BLOCKS, layer), x)
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"a block's output, {y.dtype}{list(y.shape[1:])}, must have the shape and dtype of "
                f"its input, {x.dtype}{list(x.shape[1:])}."
            )
        return y

    def block_gradients(
        self, weights: Sequence[jax.Array], x: jax.Array, dx: jax.Array, layer: Any
    ) -> tuple[list[jax.Array], jax.Array]:
        """The gradients of a block's parameters and of its input; recomputes the block."""

        def one(weights: Any, x: Any, dx: Any, batch: Any, key: Any) -> Any:
            call = lambda weights, x: self.functions.block(
                self.block_tree.unflatten(weights), x, batch, key
            )
            return jax.vjp(call, weights, x)[1](dx)

        return self.mean_gradients(one, list(weights), self.keys(BLOCKS, layer), x, dx)

    def head(self, params: Any, x: jax.Array, batch: Any, key: Any) -> tuple[Any, Any]:
        """The loss and the metrics of a micro-batch."""
        result = self.functions.head(params, x, batch, key)
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
        used = self._used(lambda leaves, *of: self.head(self.outer(leaves), *of)[0], keys, x)
        gradients, (dx, results) = self.mean_gradients(one, used, keys, x)
        return gradients, dx, _mean(results)

    def embed_gradients(self, dx: jax.Array) -> Gradients:
        """The gradients of what the embedding uses, from that of its output."""

        def one(leaves: Any, dx: Any, batch: Any, key: Any) -> Any:
            call = lambda leaves: self.functions.embed(self.outer(leaves), batch, key)
            return *jax.vjp(call, leaves)[1](dx), None

        return self.mean_gradients(one, self.used_by_embed(), self.keys(EMBED), dx)[0]

    def used_by_embed(self) -> Gradients:
        """The parameters that the embedding uses."""
        embed = lambda leaves, *of: self.functions.embed(self.outer(leaves), *of)
        return self._used(embed, self.keys(EMBED))

    def _used(self, function: Callable[..., Any], keys: Any, *arrays: Any) -> Gradients:
        leaves = {i: self.leaves[i] for i in self.outside}
        arguments = first_of((*arrays, self.batches, keys))
        program = jax.make_jaxpr(function)(leaves, *arguments)
        labels = [frozenset((i,)) for i in sorted(leaves)]
        labels += [frozenset()] * len(jax.tree.leaves(arguments))
        used = frozenset().union(*sources(program, labels))
        return {i: leaves[i] for i in sorted(used)}


def is_in_stack(params: Any) -> Callable[[Any], bool]:
    """Whether the leaf of a path is stacked ``[layers, ...]``; none is in a list of blocks."""
    stacked = not _list_of(params["blocks"])
    return lambda path: stacked and normalised_path(path)[0] == "blocks"


def _list_of(blocks: Any) -> list[Any]:
    """The blocks of a list, or of a dictionary with numbers as NNX has it; empty for a stack."""
    if type(blocks) in (list, tuple):  # a named tuple is one block's tree
        return list(blocks)
    if isinstance(blocks, Mapping) and all(isinstance(name, int) for name in blocks):
        return [blocks[name] for name in sorted(blocks)]
    return []


def _runs(indices: Sequence[int], trees: Sequence[Any]) -> list[list[int]]:
    """The indices of each tree's leaves."""
    rest = iter(indices)
    return [[next(rest) for _ in jax.tree.leaves(tree)] for tree in trees]


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


def first_of(tree: Any) -> Any:
    """Each array's first entry."""
    return jax.tree.map(lambda x: x[0], tree)


def _one_more_axis(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


def _mean(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)
