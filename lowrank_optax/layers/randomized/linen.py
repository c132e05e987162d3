"""A dense layer in Flax Linen that keeps a sketch of its input for the backward pass."""

from flax import linen as nn
import jax

from lowrank_optax.layers.randomized.dot_general import (
    call_sketched,
    check_dot_general,
    check_sketch,
)
from lowrank_optax.layers.randomized.sketch import Sketch


class RandomizedDense(nn.Dense):
    r"""``nn.Dense`` whose backward pass works from a sketch of its input.

    As `RandomizedLinear`, with the key of each call from the module's ``make_rng("sketch")``: give
    ``apply`` an ``rngs={"sketch": key}``, another key each step, and under ``nn.scan`` split it
    (``split_rngs={"params": True, "sketch": True}``). Without such a key, and where it is
    deterministic, the layer is ``nn.Dense`` to the last bit. Its parameters are those of
    ``nn.Dense``.

    Attributes:
      sketch: Kind and size of the sketch.
      deterministic: Whether the layer is the plain one; None leaves that to the call.
      rng_collection: Another name in the place of ``sketch``. The other attributes are those of
        ``nn.Dense``.

    Raises:
      TypeError: When called: if ``sketch`` is none.
      ValueError: When called with a key: if there is a ``dot_general`` of one's own.

    Example:
      >>> from flax import linen as nn
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.layers.linen.RandomizedDense(4, sketch=lro.layers.Sketch(fraction=0.5))
      >>> x, key = jax.random.normal(jax.random.key(0), (8, 3)), jax.random.key(1)
      >>> variables = layer.init(key, x)
      >>> print(bool((layer.apply(variables, x) == nn.Dense(4).apply(variables, x)).all()))
      True
      >>> loss = lambda v: (layer.apply(v, x, rngs={"sketch": key}) ** 2).sum()
      >>> print(jax.tree.map(jnp.shape, jax.grad(loss)(variables)))
      {'params': {'bias': (4,), 'kernel': (3, 4)}}

    Reference:
      Bershatsky et al., 2022, https://arxiv.org/abs/2201.13195.
    """

    sketch: Sketch | None = None
    deterministic: bool | None = None
    rng_collection: str = "sketch"

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        deterministic: bool | None = None,
        *,
        valid: jax.Array | None = None,
    ) -> jax.Array:
        """The outputs ``[..., features]`` for inputs ``[..., in]``.

        Args:
          inputs: The inputs.
          deterministic: Whether the layer is the plain one; where both this and the attribute are
            given, this counts.
          valid: Which rows count, as for `RandomizedLinear`.
        """
        sketch = check_sketch(self.sketch)
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic or not self.has_rng(self.rng_collection):
            return nn.Dense.__call__(self, inputs)
        own = self.dot_general if self.dot_general_cls is None else self.dot_general_cls
        check_dot_general(own, "RandomizedDense")
        options = {"key": self.make_rng(self.rng_collection), "sketch": sketch, "valid": valid}
        return call_sketched(nn.Dense.__call__, self, inputs, **options)
