"""The loss around the weights: a few extra backward passes, to be called rarely."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.states.arguments import refuse_unused


def jacobian_norm_sq(
    f: Callable[..., jax.Array],
    params: Any,
    *inputs: Any,
    key: jax.Array | None = None,
    samples: int | None = 1,
) -> jax.Array:
    r"""The squared Frobenius norm of the Jacobian of ``f(params, *inputs)`` by the parameters.

    :math:`\lVert J \rVert_F^2 = \mathbb{E}_z \lVert J^\top z \rVert^2` with random signs :math:`z`
    in the shape of the output: unbiased, with one backward pass per sample. Over a batch it is the
    sum over the examples.

    Args:
      f: Function of parameters and inputs that returns an array.
      params: Any tree of floats.
      inputs: Further arguments of ``f``.
      key: PRNG key for the random signs.
      samples: Number of samples; None for the exact value by ``jax.jacrev``, for small models.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: If ``samples`` is below 1, or the key is missing.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> f = lambda w, x: x @ w
      >>> x, w = jnp.array([[1.0, 2.0]]), jnp.ones((2, 3))
      >>> print(f"{lro.training.jacobian_norm_sq(f, w, x, samples=None):.1f}")
      15.0
      >>> print(f"{lro.training.jacobian_norm_sq(f, w, x, key=jax.random.key(0)):.1f}")
      15.0

    Reference:
      D'Angelo et al., Why Do We Need Weight Decay in Modern Deep Learning?, 2024,
      https://arxiv.org/abs/2310.04415, section 2.
    """
    of_params = lambda p: f(p, *inputs)
    if samples is None:
        refuse_unused(jacobian_norm_sq, "samples=None", key=key)
        jacobian = jax.jacrev(of_params)(params)
        return _dot(jacobian, jacobian)
    output, pull_back = jax.vjp(of_params, params)

    def sample(key: jax.Array) -> jax.Array:
        gradient = pull_back(jax.random.rademacher(key, output.shape, output.dtype))[0]
        return _dot(gradient, gradient)

    return _mean(sample, key, samples)


def hessian_trace(
    loss: Callable[..., jax.Array], params: Any, *inputs: Any, key: jax.Array, samples: int = 1
) -> jax.Array:
    r"""The trace of the Hessian of ``loss(params, *inputs)``, by Hutchinson's estimator.

    :math:`\mathrm{tr}\, H = \mathbb{E}_z\, z^\top H z` with random signs :math:`z`: unbiased, and
    exact for a diagonal :math:`H`. A sample costs about two gradients.

    Args:
      loss: Function of parameters and inputs that returns a scalar.
      params: Any tree of floats.
      inputs: Further arguments of ``loss``.
      key: PRNG key for the random signs.
      samples: Number of samples.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: If ``samples`` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> loss = lambda w: jnp.sum(jnp.array([1.0, 2.0, 3.0]) * w**2) / 2
      >>> print(f"{lro.training.hessian_trace(loss, jnp.ones(3), key=jax.random.key(0)):.1f}")
      6.0

    Reference:
      Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990; ``traceh.py``
      of the official code of https://arxiv.org/abs/2310.04415.
    """

    def sample(key: jax.Array) -> jax.Array:
        signs = optax.tree.random_like(key, params, jax.random.rademacher)
        return _dot(signs, _times_hessian(loss, params, inputs, signs))

    return _mean(sample, key, samples)


def top_eigenvalue(
    loss: Callable[..., jax.Array], params: Any, *inputs: Any, key: jax.Array, iterations: int = 20
) -> jax.Array:
    r"""The Hessian's eigenvalue of largest magnitude, by power iteration.

    :math:`v \leftarrow Hv / \lVert Hv \rVert`, then :math:`v^\top H v`. The error falls as
    :math:`\lvert \lambda_2 / \lambda_1 \rvert^{2k}` with the number of iterations :math:`k`.

    Args:
      loss: Function of parameters and inputs that returns a scalar.
      params: Any tree of floats.
      inputs: Further arguments of ``loss``.
      key: PRNG key for the first direction.
      iterations: Number of Hessian products, which cost about two gradients each.

    Returns:
      A float32 scalar; negative if the largest curvature is.

    Raises:
      ValueError: If ``iterations`` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> loss = lambda w: jnp.sum(jnp.array([1.0, 2.0, 9.0]) * w**2) / 2
      >>> print(f"{lro.training.top_eigenvalue(loss, jnp.ones(3), key=jax.random.key(0)):.3f}")
      9.000

    Reference:
      Power iteration as in Yao et al., PyHessian, 2019, https://arxiv.org/abs/1912.07145.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1.")

    def unit(tree: Any) -> Any:
        norm = jnp.sqrt(_dot(tree, tree))
        scale = jnp.where(norm == 0, 0.0, 1 / jnp.where(norm == 0, 1.0, norm))
        return jax.tree.map(lambda x: (x.astype(jnp.float32) * scale).astype(x.dtype), tree)

    def iterate(_: Any, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        vector, _ = carry
        product = _times_hessian(loss, params, inputs, vector)
        return unit(product), _dot(vector, product)

    first = unit(optax.tree.random_like(key, params))
    return jax.lax.fori_loop(0, iterations, iterate, (first, jnp.zeros([], jnp.float32)))[1]


def _times_hessian(loss: Callable[..., jax.Array], params: Any, inputs: Any, vector: Any) -> Any:
    return jax.jvp(jax.grad(lambda p: loss(p, *inputs)), (params,), (vector,))[1]


def _dot(a: Any, b: Any) -> jax.Array:
    to_float32 = lambda tree: optax.tree.cast(tree, jnp.float32)
    return jnp.asarray(optax.tree.vdot(to_float32(a), to_float32(b)), jnp.float32)


def _mean(sample: Callable[[jax.Array], jax.Array], key: Any, samples: int) -> jax.Array:
    if key is None:
        raise ValueError("a random estimate needs a key, as jax.random.key(0).")
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1.")
    return jnp.mean(jax.lax.map(sample, jax.random.split(key, samples)))
