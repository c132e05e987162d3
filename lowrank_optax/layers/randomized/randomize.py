"""Randomized linears in Flax NNX: one layer, and the linear layers of a whole model."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, TypeAlias

from flax import nnx
import jax

from lowrank_optax.layers.randomized.linear import (
    call_sketched,
    check_dot_general,
    check_sketch,
    check_sketches,
)
from lowrank_optax.layers.randomized.sketch import Sketch
from lowrank_optax.matrices.selection import Path, Where, path_string
from lowrank_optax.modules.report import Report, Table, matrices_string
from lowrank_optax.modules.select import modules_by_path, options_by_path, select
from lowrank_optax.modules.wrap import made_by, own_class, set_own_class

Sketches: TypeAlias = Sketch | Mapping[str, Sketch]
"""One sketch for all, or sketches by regular expressions found in the layers' paths, of which the
first that is found counts."""


class RandomizedLinear(nnx.Linear):
    r"""``nnx.Linear`` whose backward pass works from a sketch of its input.

    Outputs and the gradients of the input and the bias are those of ``nnx.Linear``, by the same
    operations. The kernel's gradient is :math:`(S^\top x)^\top (S^\top \bar y)` with a random
    :math:`S`, drawn again in each call; its mean is the exact one. The p rows of :math:`S^\top x`
    are saved for the backward pass instead of x. After ``model.eval()``, or in
    ``nnx.view(model, deterministic=True)``, the layer is ``nnx.Linear``.

    Args:
      in_features: Number of inputs.
      out_features: Number of outputs.
      sketch: Kind and size of the sketch.
      rngs: Random keys for the initial weights, and a stream ``sketch`` (or ``default``) that gives
        the key of the layer's own stream.
      deterministic: Whether the layer is the plain one.
      **options: Other arguments of ``nnx.Linear``, except ``dot_general``.

    Attributes:
      sketch: As given; may be changed at any time.
      deterministic: As given; ``train()``, ``eval()`` and ``nnx.view`` set it.
      sketch_stream: The layer's ``nnx.RngStream``, with the tag ``sketch``. A call advances its
        count, so a function of the model under ``jax.jit`` must return it, as with dropout.

    Raises:
      TypeError: If ``sketch`` is not a `Sketch`.
      ValueError: If there is a ``dot_general``; when called, if there is an ``out_sharding``.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> sketch = lro.layers.Sketch("rows", fraction=0.25)
      >>> layer = lro.layers.RandomizedLinear(3, 4, sketch=sketch, rngs=nnx.Rngs(0))
      >>> plain, x = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.ones((8, 3))
      >>> print(bool((layer(x) == plain(x)).all()))
      True
      >>> loss = lambda layer: (layer(x) ** 2).sum()
      >>> exact = nnx.grad(loss)(plain).kernel[...]
      >>> drawn = [nnx.grad(loss)(layer).kernel[...] for _ in range(3)]
      >>> print(all(bool(jnp.allclose(d, exact, rtol=1e-5)) for d in drawn))  # all rows are equal
      True

    Reference:
      Bershatsky et al., 2022, https://arxiv.org/abs/2201.13195.
    """

    plain_weights: ClassVar[bool] = True
    """The call multiplies by the parameter itself: adapters may read and change it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sketch: Sketch,
        rngs: nnx.Rngs,
        deterministic: bool = False,
        **options: Any,
    ) -> None:
        check_sketch(sketch)
        check_dot_general(options.get("dot_general"), "RandomizedLinear")
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self.sketch = sketch
        self.deterministic = deterministic
        self.sketch_stream = _sketch_stream(rngs)

    def __call__(
        self,
        inputs: jax.Array,
        out_sharding: Any = None,
        *,
        valid: jax.Array | None = None,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """Compute the outputs ``[..., out]`` from inputs ``[..., in]``.

        Args:
          inputs: Inputs of the layer.
          out_sharding: As for ``nnx.Linear``, if the layer is deterministic.
          valid: Rows that count, bool ``[...]``; the backward pass takes the cotangents of the
            other rows (padding) to be zero. None for all rows.
          deterministic: Whether the layer is the plain one; overrides the attribute.
        """
        if self.deterministic if deterministic is None else deterministic:
            return nnx.Linear.__call__(self, inputs, out_sharding)
        options = {"key": self.sketch_stream(), "sketch": self.sketch, "valid": valid}
        return call_sketched(nnx.Linear.__call__, self, inputs, out_sharding, **options)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set whether the layer is the plain one, for ``nnx.view``."""
        if deterministic is not None:
            self.deterministic = deterministic


def _sketch_stream(rngs: nnx.Rngs, stack: tuple[int, ...] = ()) -> nnx.RngStream:
    """A layer's own stream of keys; one per layer of a stack."""
    key = rngs["sketch"]()
    return nnx.RngStream(jax.random.split(key, stack) if stack else key, tag="sketch")


def randomize(
    model: nnx.Module, sketch: Sketches, where: Where = None, *, rngs: nnx.Rngs | int
) -> "RandomizedSummary":
    """Turn linear layers of a model into `RandomizedLinear` layers, in place.

    A layer stays the object it is, with its weights and their paths. Layers stacked by ``nnx.vmap``
    get one key each. A layer that is randomized already gets the new sketch and keeps its stream of
    keys, so sizes may change during training. Attach adapters afterwards: the kernels of their
    layers are frozen, so nothing is saved for them.

    Args:
      model: Any NNX model.
      sketch: Sketch of all layers, or sketches by regular expressions found in their paths, of
        which the first that is found counts:
        ``{"mlp/down": Sketch(fraction=0.5), "mlp": Sketch(fraction=0.1)}``.
      where: Layers of type ``nnx.Linear`` to randomize: a regular expression found in a path such
        as ``blocks/mlp/up``, a filter of ``flax.nnx`` or a function of path and module. None for
        those in which a pattern of ``sketch`` is found, or, with a single sketch, all except
        embeddings and output heads.
      rngs: Random keys for the layers' streams: its stream ``sketch``, or ``default``.

    Returns:
      The randomized layers of the model; print it.

    Raises:
      ValueError: If there is no pattern, ``where`` or a pattern matches no linear layer (the
        message lists similar paths), or a layer cannot be randomized: it has its own call or
        ``dot_general``, adapters, or stack axes that are not in front.
      TypeError: If a sketch is not a `Sketch`.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> from lowrank_optax.models import Decoder, decoder_config
      >>> model = Decoder(decoder_config("llama-tiny", vocab_size=256), rngs=nnx.Rngs(0))
      >>> sketch = lro.layers.Sketch(fraction=0.125)
      >>> print(lro.layers.randomize(model, sketch, where="mlp", rngs=nnx.Rngs(1)))
      path             weight           sketch      saved
      blocks/mlp/down  4 × (344 × 128)  stratified  12.5% of rows
      blocks/mlp/gate  4 × (128 × 344)  stratified  12.5% of rows
      blocks/mlp/up    4 × (128 × 344)  stratified  12.5% of rows
      >>> type(lro.layers.restore_linears(model).blocks.mlp.up).__name__
      'Linear'

    Reference:
      Bershatsky et al., 2022, https://arxiv.org/abs/2201.13195, replace every linear layer.
    """
    by_pattern = isinstance(sketch, Mapping)
    check_sketches(sketch)
    layers = modules_by_path(model, lambda module: isinstance(module, nnx.Linear))
    kind = "linear layer"
    if where is not None or not by_pattern:
        layers = select(layers, where, kind)
    if by_pattern:
        sketches = options_by_path("sketch", layers, sketch, kind)
    else:
        sketches = dict.fromkeys(layers, sketch)
    for path in sketches:
        _check_layer(path_string(path), layers[path])
    rngs = rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs)
    for path, own in sketches.items():
        layer = layers[path]
        layer.sketch = own
        if not isinstance(layer, RandomizedLinear):
            layer.deterministic = False
            layer.sketch_stream = _sketch_stream(rngs, layer.kernel.shape[:-2])
            set_own_class(layer, _randomized(own_class(layer)))
    return randomized_layers(model)


@functools.cache
def _randomized(cls: type) -> type:
    """The class of randomized layers of a class of plain ones."""
    if cls is nnx.Linear:
        return RandomizedLinear
    body = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"_plain_class": cls, **made_by(_randomized, cls)}
    return type(cls)(cls.__name__, (RandomizedLinear, cls), body)


def _plain_class(layer: Any) -> Any:
    """The class of a randomized layer before; None for a subclass of `RandomizedLinear`."""
    cls = own_class(layer)
    return nnx.Linear if cls is RandomizedLinear else vars(cls).get("_plain_class")


def _check_layer(name: str, layer: Any) -> None:
    """Raise ValueError if the layer cannot be randomized."""
    cls = type(layer)
    if not isinstance(layer, RandomizedLinear) and cls.__call__ is not nnx.Linear.__call__:
        has = "adapters" if hasattr(layer, "adapters") else f"a call of its own, of {cls.__name__}"
        raise ValueError(
            f"{name} has {has}, which randomize would replace: randomize plain layers (adapters "
            "can be attached afterwards), or leave it out by where."
        )
    check_dot_general(layer.dot_general, name)
    matrix = layer.in_features, layer.out_features
    if layer.kernel.shape[-2:] != matrix:
        raise ValueError(
            f"the kernel of {name} has shape {layer.kernel.shape}, and one layer has {matrix}: "
            "stack layers along the first axis."
        )


def restore_linears(model: Any) -> nnx.Module:
    """Turn all randomized layers of a model into plain ones again, in place: undoes `randomize`.

    Returns the model itself. Weights and structure are as they were before, without the layers'
    random streams; a layer made as `RandomizedLinear` becomes ``nnx.Linear``.

    Raises:
      ValueError: If there is no randomized layer, or one of a subclass of `RandomizedLinear`.
    """
    layers = randomized_modules(model)
    if not layers:
        raise ValueError(f"the {type(model).__name__} has no randomized layer to restore.")
    for path, layer in layers.items():
        if _plain_class(layer) is None:
            raise ValueError(
                f"{path_string(path)} is of the class {type(layer).__name__}, which has no plain "
                "layer: replace it before the others are restored."
            )
    for layer in layers.values():
        set_own_class(layer, _plain_class(layer))
        del layer.sketch, layer.deterministic, layer.sketch_stream
    return model


class RandomizedLayer(NamedTuple):
    """A randomized layer, or a stack of layers.

    Attributes:
      path: Path of the layer, such as ``blocks/mlp/up``.
      weight: Weights as a batch of matrices, inputs × outputs: ``4 × (512 × 1376)``.
      sketch: What is saved of the layer's input.
    """

    path: str
    weight: str
    sketch: Sketch


@dataclasses.dataclass(frozen=True, repr=False)
class RandomizedSummary(Report):
    """The randomized layers of a model; prints as a table.

    Attributes:
      rows: One `RandomizedLayer` per layer, or stack of layers.
    """

    rows: list[RandomizedLayer]

    def table(self) -> Table:
        """One row per layer."""
        rows = [(row.path, row.weight, row.sketch.kind, _size(row.sketch)) for row in self.rows]
        return Table(("path", "weight", "sketch", "saved"), rows)


def _size(sketch: Sketch) -> str:
    """``12.5% of rows, 16 at least``."""
    if sketch.fraction is None:
        size = f"{sketch.size} rows"
    else:
        size = f"{100 * sketch.fraction:.3g}% of rows"
    least = f", {sketch.min_size} at least" if sketch.min_size > 1 else ""
    most = "" if sketch.max_size is None else f", {sketch.max_size} at most"
    return size + least + most


def randomized_layers(model: nnx.Module) -> RandomizedSummary:
    """Return the randomized layers of a model: print it, or read its ``rows``."""
    return RandomizedSummary(
        [
            RandomizedLayer(path_string(path), matrices_string(layer.kernel.shape), layer.sketch)
            for path, layer in randomized_modules(model).items()
        ]
    )


def randomized_modules(model: nnx.Module) -> dict[Path, Any]:
    """The randomized layers of a model, by path; shared ones once."""
    return modules_by_path(model, lambda module: isinstance(module, RandomizedLinear))
