"""A linear layer in Flax NNX that keeps a sketch of its input for the backward pass."""

from typing import Any, ClassVar

from flax import nnx
import jax

from lowrank_optax.layers.randomized.linear import (
    call_sketched,
    check_dot_general,
    check_sketch,
)
from lowrank_optax.layers.randomized.noise_probe import probed
from lowrank_optax.layers.randomized.sketch import Sketch


class RandomizedLinear(nnx.Linear):
    r"""``nnx.Linear`` whose backward pass works from a sketch of its input.

    Outputs are those of ``nnx.Linear``, by the same operations, and so are the gradients of the
    input and the bias; the kernel's is :math:`(S^\top x)^\top (S^\top \bar y)` with a random
    :math:`S`, drawn anew in each call, and has the exact one as its mean. Kept for the backward
    pass are the p rows of :math:`S^\top x` in the place of x. After ``model.eval()``, or in
    ``nnx.view(model, deterministic=True)``, the layer is ``nnx.Linear``.

    Args:
      in_features: Number of inputs.
      out_features: Number of outputs.
      sketch: Kind and size of the sketch.
      rngs: Of the initial weights, and of the stream ``sketch`` (or ``default``), from which the
        layer's own stream is drawn.
      deterministic: Whether the layer is the plain one.
      **options: Those of ``nnx.Linear``, but no ``dot_general`` of one's own.

    Attributes:
      sketch: As given; may be changed at any time.
      deterministic: As given; what ``train()``, ``eval()`` and ``nnx.view`` set.
      sketch_stream: The layer's ``nnx.RngStream``, with the tag ``sketch``. A call advances its
        count, so a function of the model under ``jax.jit`` must return that, as with dropout.

    Raises:
      TypeError: If ``sketch`` is none.
      ValueError: If there is a ``dot_general`` of one's own; when called, if there is an
        ``out_sharding``.

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

    class_without_sketch: ClassVar[type] = nnx.Linear  # what `restore_linears` gives back
    noise_probe: ClassVar[Any] = None  # what `sketch_noise` sets, on a copy of the layer

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
        self.sketch_stream = sketch_stream(rngs)

    def __call__(
        self,
        inputs: jax.Array,
        out_sharding: Any = None,
        *,
        valid: jax.Array | None = None,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """The outputs ``[..., out]`` for inputs ``[..., in]``.

        Args:
          inputs: The inputs.
          out_sharding: As for ``nnx.Linear``, where the layer is deterministic.
          valid: Which rows count, booleans ``[...]``; what the backward pass sees of the others'
            outputs is taken to be zero (padding). None: all.
          deterministic: Overrides the attribute.
        """
        if self.noise_probe is not None:
            outputs = nnx.Linear.__call__(self, inputs, out_sharding)
            return probed(self.sketch, outputs, inputs, valid, self.noise_probe[...])
        if self.deterministic if deterministic is None else deterministic:
            return nnx.Linear.__call__(self, inputs, out_sharding)
        options = {"key": self.sketch_stream(), "sketch": self.sketch, "valid": valid}
        return call_sketched(nnx.Linear.__call__, self, inputs, out_sharding, **options)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Of ``nnx.view``.

        Args:
          deterministic: Whether the layer is the plain one.
        """
        if deterministic is not None:
            self.deterministic = deterministic


def sketch_stream(rngs: nnx.Rngs, stack: tuple[int, ...] = ()) -> nnx.RngStream:
    """A layer's own stream of keys; one for each layer of a stack."""
    key = rngs["sketch"]()
    return nnx.RngStream(jax.random.split(key, stack) if stack else key, tag="sketch")
