"""The kernels and steps that `accelerator.py` times, each with what it must move and multiply."""

import argparse
from collections.abc import Callable, Iterator
import functools
from typing import Any, NamedTuple

import adapter_step
from flax import nnx
import jax
import jax.numpy as jnp
import kernels
from optimizer_recipes import RANK, RECIPES, Recipe, projected
from projection_step import optimizer_step

import lowrank_optax as lro

HIGHEST = "float32, highest"
ADAPTER_RANK = 16


class Case(NamedTuple):
    """A function that is timed.

    Attributes:
      name: Its name.
      shapes: Sizes, as they are printed.
      build: Makes ``step(carry, *arguments) -> carry`` and ``inputs(key) -> carry, arguments``.
      flops: Multiplications and additions of its products, no more than any form of it needs.
      rate: Whose products its own are compared with.
      reads_carry: Whether the step reads what it writes over.
    """

    name: str
    shapes: str
    build: Callable[[], tuple[Callable[..., Any], Callable[[jax.Array], tuple[Any, ...]]]]
    flops: float = 0
    rate: str = "float32"
    reads_carry: bool = True


class Sizes(NamedTuple):
    """Sizes of all cases; products of models and layers are in ``dtype``."""

    dtype: str
    copied: int  # bytes
    side: int  # of the matrices of a product
    kernels: int  # divides the sizes of kernels.py
    stack: tuple[int, int, int]  # of the optimizers' weights
    loss: tuple[tuple[int, int, int], ...]  # tokens, width, words
    attention: tuple[tuple[int, int, int, int], ...]  # batch, tokens, heads, width of a head
    decoder: tuple[str, int, int, int]  # configuration, words, batch, tokens
    adapters: dict[str, int]
    blocks: dict[str, int]
    linear: tuple[int, int, int]  # rows, inputs, outputs


Group = list[Case]  # the first is what the others are compared with

SIZES = {
    "tiny": Sizes(
        dtype="float32",
        copied=2**27,
        side=1024,
        kernels=8,
        stack=(4, 512, 1376),
        loss=((512, 256, 8000),),
        attention=((1, 512, 8, 64),),
        decoder=("llama-tiny", 2000, 4, 128),
        adapters={"layers": 2, "width": 256, "tokens": 512, "rank": 8},
        blocks={"layers": 2, "width": 256, "heads": 4, "batch": 4, "length": 128},
        linear=(1024, 512, 512),
    ),
    "small": Sizes(
        dtype="bfloat16",
        copied=2**30,
        side=8192,
        kernels=1,
        stack=(4, 2048, 5504),
        loss=((2048, 2048, 32000), (2048, 2048, 152000)),
        attention=((2, 2048, 16, 128), (1, 8192, 16, 128)),
        decoder=("llama-350m", 32000, 2, 1024),
        adapters={"layers": 4, "width": 1024, "tokens": 8192, "rank": ADAPTER_RANK},
        blocks={"layers": 2, "width": 1024, "heads": 16, "batch": 8, "length": 1024},
        linear=(16384, 2048, 2048),
    ),
    "large": Sizes(
        dtype="bfloat16",
        copied=2**32,
        side=8192,
        kernels=1,
        stack=(4, 4096, 11008),
        loss=((8192, 2048, 32000), (8192, 2048, 152000)),
        attention=((4, 2048, 32, 128), (1, 8192, 32, 128)),
        decoder=("llama-1b", 32000, 4, 2048),
        adapters={"layers": 4, "width": 2048, "tokens": 16384, "rank": ADAPTER_RANK},
        blocks={"layers": 2, "width": 2048, "heads": 16, "batch": 8, "length": 2048},
        linear=(32768, 4096, 4096),
    ),
}


def times(*sizes: int) -> str:
    """``2 × 3``."""
    return " × ".join(map(str, sizes))


def filled(key: jax.Array, shapes: Any, scale: float = 1.0) -> Any:
    """Normally distributed numbers of these shapes; other dtypes than floats are zeros."""
    leaves, treedef = jax.tree.flatten(shapes)

    def one(key: jax.Array, x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(x)), x.shape)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        return scale * jax.random.normal(key, x.shape, x.dtype)

    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([one(*pair) for pair in zip(keys, leaves, strict=True)])


def shaped(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def fixed(step: Callable[..., Any], *shapes: Any) -> Callable[[], Any]:
    """What builds a step whose carry and arguments are normally distributed."""

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        carry, *arguments = filled(key, shapes)
        return carry, tuple(arguments)

    return lambda: (step, inputs)


def device(sizes: Sizes) -> Iterator[Group]:
    """Copies and products: the rates that floors are made of."""
    x = shaped(jnp.float32, sizes.copied // 4)
    yield [Case("copy", f"{sizes.copied / 1e6:.0f} MB", fixed(lambda x: x + 1, x))]
    for rate in ("bfloat16", "float32", HIGHEST):
        dtype, *precision = rate.split(", ")
        square = shaped(dtype, sizes.side, sizes.side)
        product = functools.partial(jnp.matmul, precision=(precision or [None])[0])
        step = lambda carry, a, b, product=product: product(a, b)
        build = fixed(step, square, square, square)
        shapes = times(sizes.side, sizes.side, sizes.side)
        yield [Case(f"product, {rate}", shapes, build, 2 * sizes.side**3, rate, False)]


def low_bit_adam(sizes: Sizes) -> Iterator[Group]:
    """The reference, and what runs by default."""

    def build(case: kernels.Case, implementation: Any) -> Any:
        step = functools.partial(case.step, implementation=implementation)
        return fixed(step, case.carry, *case.given)()

    for case in kernels.cases(sizes.kernels):
        shapes, name = case.name.split(", ", 1)
        yield [
            Case(f"low_bit_adam, {name}, {label}", shapes, functools.partial(build, case, chosen))
            for label, chosen in (("xla", "xla"), ("chosen", None))
        ]


# Products with a matrix of RANK columns that a step between refreshes cannot avoid.
PRODUCTS = {
    "lro.galore": 2,
    "lro.fira": 2,
    "lro.adarankgrad": 2,
    "lro.online_subspace_descent": 3,
    "lro.dct_adamw": 2,
    "lro.apollo": 1,
    "lro.apollo_mini": 1 / RANK,
    "lro.ldadam": 2,
}


def refreshing() -> dict[str, Recipe]:
    """Recipes that refresh their basis at every step."""
    recipes = {"lro.galore": lro.galore, "lro.dct_adamw": lro.dct_adamw, "lro.apollo": lro.apollo}
    return {
        f"{name}(refresh_every=1)": Recipe(projected(recipe, refresh_every=1))
        for name, recipe in recipes.items()
    }


def optimizers(sizes: Sizes) -> Iterator[Group]:
    """A step of every optimizer, updates applied."""

    def build(recipe: Recipe) -> Any:
        tx = recipe.make()
        step = optimizer_step(tx)
        if hasattr(tx, "step"):  # lro.fused_adamw
            step = lambda carry, gradients: tx.step(gradients, carry[1], carry[0])

        def inputs(key: jax.Array) -> tuple[Any, ...]:
            weights = {"stack": shaped(recipe.dtypes[0], *sizes.stack)}
            params, gradients = filled(key, (weights, weights))
            params = lro.to_int8_weights(params) if recipe.int8_weights else params
            return (params, tx.init(params)), (gradients,)

        return step, inputs

    products = lambda name: next(
        (n for p, n in PRODUCTS.items() if f"{name}(".startswith(p + "(")), 0
    )
    layers, rows, columns = sizes.stack
    yield [
        Case(
            name,
            f"{times(*sizes.stack)}, {recipe.dtypes[0]}",
            functools.partial(build, recipe),
            products(name) * 2 * layers * rows * columns * RANK,
            HIGHEST,
        )
        for name, recipe in (RECIPES | refreshing()).items()
    ]


def adapters(sizes: Sizes) -> Iterator[Group]:
    """A training step of MLPs whose linear layers are all adapted."""
    args = argparse.Namespace(**sizes.adapters)
    weights = 8 * args.width**2  # of a layer

    def build(kind: str) -> Any:
        make = functools.partial(adapter_step.model_of, kind, args)
        model = nnx.eval_shape(lambda: make()[0])
        trained = nnx.Param if kind == adapter_step.FULL else lro.adapters.trainable
        trained = nnx.LoRAParam if kind == adapter_step.FLAX else trained
        found = adapter_step.training_step(kind, model, trained)
        x = shaped(jnp.float32, args.tokens, args.width)

        def inputs(key: jax.Array) -> tuple[Any, ...]:
            trained, rest, given = filled(key, (found.trained, found.rest, x), 0.02)
            return (trained, found.tx.init(trained)), (rest, given)

        return found.step, inputs

    def flops(kind: str) -> int:
        passes = 6 if kind == adapter_step.FULL else 4
        # The first layer's input needs no gradient.
        return args.tokens * (passes * args.layers * weights - weights)

    kinds = adapter_step.FLAX, adapter_step.FULL, *adapter_step.OURS
    shapes = f"{args.layers} layers of {args.width}, {args.tokens} tokens, rank {args.rank}"
    yield [
        Case(f"MLPs, {kind}", shapes, functools.partial(build, kind), flops(kind)) for kind in kinds
    ]
