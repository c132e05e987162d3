"""The orthogonal polar factor of a matrix, by products alone."""

import jax
import jax.numpy as jnp

from lowrank_optax.matrices.explicit_sharding import product

# Jordan's coefficients multiply small singular values by 3.4 a step, and leave all of them within
# 0.68 and 1.14; the convergent ones go on from there, with errors cubed at each step.
FAST, FAST_STEPS = (3.4445, -4.7750, 2.0315), 12
CONVERGENT, CONVERGENT_STEPS = (15 / 8, -10 / 8, 3 / 8), 4


def polar_factor(x: jax.Array) -> jax.Array:
    r""":math:`U V^\top` of :math:`X = U S V^\top`, a compact singular value decomposition.

    It is the gradient of the nuclear norm of ``x``. Singular values below about 1e-6 of the
    Frobenius norm are not told from zero: along such directions the result is between 0 and 1,
    which is a subgradient of the norm, too.

    Args:
      x: ``[*batch, m, n]``.

    Returns:
      float32 ``[*batch, m, n]`` (float64 for float64); zero for a matrix of zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> print(polar_factor(jnp.diag(jnp.array([3.0, -2.0]))).round(3))
      [[ 1.  0.]
       [ 0. -1.]]

    Reference:
      Björck and Bowie, An iterative algorithm for computing the best estimate of an orthogonal
      matrix, SIAM J. Numer. Anal., 1971; the coefficients of the first steps are from Jordan et
      al., Muon, 2024, https://kellerjordan.github.io/posts/muon.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if x.shape[-2] > x.shape[-1]:
        return polar_factor(x.mT).mT
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0.0)
    x = x / jnp.where(largest == 0, 1, largest)  # squares of it do not underflow
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    x = x / jnp.where(norm == 0, 1, norm)

    def step(coefficients: tuple[float, float, float], x: jax.Array) -> jax.Array:
        a, b, c = coefficients
        gram = product("...mn,...kn->...mk", x, x)
        cubic = b * gram + c * product("...mk,...kl->...ml", gram, gram)
        return a * x + product("...mk,...kn->...mn", cubic, x)

    x = jax.lax.fori_loop(0, FAST_STEPS, lambda _, x: step(FAST, x), x)
    return jax.lax.fori_loop(0, CONVERGENT_STEPS, lambda _, x: step(CONVERGENT, x), x)
