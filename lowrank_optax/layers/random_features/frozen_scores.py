"""Attention with frozen random scores, which is linear in what is trained, and its kernel."""

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
import numpy as np

from lowrank_optax.layers.random_features.feature_maps import PRNG
from lowrank_optax.matrices.explicit_sharding import vary_like
from lowrank_optax.matrices.orthonormal import in_turn

ScoreMean = Literal["zero", "identity"]
ScoreWeights = Literal["relu", "softmax"]

HEADS_AT_ONCE = 64
NODES = 64  # of the quadrature in the kernel


def score_matrices(
    key: jax.Array,
    heads: Sequence[int] | jax.Array,
    width: int,
    *,
    std: float = 0.5,
    mean: ScoreMean = "zero",
) -> jax.Array:
    """Draw the frozen matrices ``[M, D, D]`` of some heads, each from the key and its number.

    Args:
      key: PRNG key of the layer, threefry2x32.
      heads: Numbers of the heads, ``[M]``.
      width: Width ``D`` of the padded tokens, one more than that of the tokens.
      std: Standard deviation of the entries; 1/2 gives scores of variance 1 for tokens of norm 1.
      mean: Mean of the matrices: ``"zero"``, or ``"identity"`` with a last diagonal entry of 0,
        which centres a score at the product of query and key.

    Raises:
      ValueError: If the mean is unknown, the standard deviation is not positive, or the key is not
        of the implementation threefry2x32.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> lro.layers.score_matrices(jax.random.key(0), range(3), 5).shape
      (3, 5, 5)

    Reference:
      Fu et al., 2023, https://arxiv.org/abs/2307.11353.
    """
    check_scores(std, mean)
    if str(jax.random.key_impl(key)) != PRNG:
        # Under vmap others draw what depends on the heads drawn with them.
        raise ValueError(
            f"key is a key of {jax.random.key_impl(key)}, with which matrices would depend on how "
            f"many are drawn at once: use jax.random.key(seed, impl={PRNG!r})."
        )
    shape = (width, width)
    draw = lambda head: jax.random.normal(jax.random.fold_in(key, head), shape, jnp.float32)
    noise = std * jax.vmap(draw)(jnp.asarray(heads))
    if mean == "identity":
        noise += jnp.eye(width, dtype=noise.dtype).at[-1, -1].set(0)
    return noise


def frozen_score_features(
    query: jax.Array,
    keys: jax.Array,
    matrices: jax.Array,
    *,
    mask: jax.Array | None = None,
    weights: ScoreWeights = "relu",
) -> jax.Array:
    """Compute the features of attention with given score matrices: means of keys.

    Args:
      query: Queries ``[..., T, d]``.
      keys: Keys ``[..., N, d]``.
      matrices: Score matrices ``[M, D, D]`` with ``D = d + 1``: tokens are padded with a 1.
      mask: Booleans that broadcast to ``[..., T, N]``: whether a query sees a key.
      weights: ``"relu"``, ``relu(score) / n`` with the number ``n`` of visible keys, or
        ``"softmax"``.

    Returns:
      Features ``[..., T, M, D]`` in float32 at least, 0 where no key is visible.

    Raises:
      ValueError: If widths do not fit, the mask is not bool or the weights are unknown.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> score = jnp.array([[[1, -1, 0.5], [0, 2, -1], [0.5, 0, 1]]])
      >>> print(lro.layers.frozen_score_features(jnp.array([[1.0, 0]]), jnp.eye(2), score))
      [[[1.5  0.25 1.75]]]

    Reference:
      Fu et al., 2023, https://arxiv.org/abs/2307.11353.
    """
    check_weights(weights)
    if not query.shape[-1] + 1 == keys.shape[-1] + 1 == matrices.shape[-1]:
        raise ValueError(
            f"query {query.shape} and keys {keys.shape} must have the same width, one less than "
            f"the matrices {matrices.shape}."
        )
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask must be bool, True where a query sees a key, got {mask.dtype}.")
    query, keys = padded(query), padded(keys)
    shape = jnp.broadcast_shapes(
        (*query.shape[:-1], keys.shape[-2]), () if mask is None else mask.shape
    )
    mask = jnp.ones(shape, bool) if mask is None else jnp.broadcast_to(mask, shape)
    mask = mask[..., None, :]
    projected = jnp.einsum("...td,mde->...tme", query, matrices)
    scores = jnp.einsum("...tme,...ne->...tmn", projected, keys)
    if weights == "relu":
        count = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
        mixed = jnp.where(mask, jax.nn.relu(scores), 0) / count
    else:
        mixed = jnp.where(mask, jax.nn.softmax(scores, axis=-1, where=mask), 0)
    return jnp.einsum("...tmn,...ne->...tme", mixed, keys)


def frozen_score_attention(
    query: jax.Array,
    keys: jax.Array,
    kernel: jax.Array,
    key: jax.Array,
    *,
    mask: jax.Array | None = None,
    std: float = 0.5,
    mean: ScoreMean = "zero",
    weights: ScoreWeights = "relu",
) -> jax.Array:
    """Compute the sum over heads of frozen features times trained values.

    The matrices are drawn again in each call, 64 heads at once, and in the backward pass: neither
    they nor the scores of all heads are in memory.

    Args:
      query: Queries ``[..., T, d]``.
      keys: Keys ``[..., N, d]``.
      kernel: Trained values ``[M D, out]`` of all heads.
      key: PRNG key of the matrices.
      mask: As for `frozen_score_features`.
      std: As for `score_matrices`.
      mean: As for `score_matrices`.
      weights: As for `frozen_score_features`.

    Returns:
      Outputs ``[..., T, out]`` in float32 at least.

    Raises:
      ValueError: If widths do not fit, or as for `score_matrices` and `frozen_score_features`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> x, kernel = jnp.ones((7, 4)), jnp.ones((100 * 5, 2))
      >>> lro.layers.frozen_score_attention(x, x, kernel, jax.random.key(0)).shape
      (7, 2)

    Reference:
      Fu et al., 2023, https://arxiv.org/abs/2307.11353.
    """
    check_scores(std, mean)
    width = query.shape[-1] + 1
    if kernel.shape[0] % width:
        raise ValueError(
            f"kernel {kernel.shape} must have a multiple of d + 1 = {width} rows: one matrix of "
            "values for each head."
        )
    num_heads = kernel.shape[0] // width
    at_once = min(num_heads, HEADS_AT_ONCE)
    blocks = -(-num_heads // at_once)
    dtype = jnp.promote_types(jnp.promote_types(query.dtype, kernel.dtype), jnp.float32)
    rows = jnp.pad(kernel.astype(dtype), ((0, blocks * at_once * width - len(kernel)), (0, 0)))
    values = rows.reshape(blocks, at_once, width, kernel.shape[1])

    @jax.checkpoint
    def body(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        heads, values = block
        matrices = score_matrices(key, heads, width, std=std, mean=mean)
        features = frozen_score_features(query, keys, matrices, mask=mask, weights=weights)
        return total + jnp.einsum("...tme,meo->...to", features, values), None

    shape = jnp.broadcast_shapes((*query.shape[:-1], 1), (*keys.shape[:-2], 1, 1))
    start = jnp.zeros((*shape[:-1], kernel.shape[1]), dtype)
    heads = jnp.arange(blocks * at_once).reshape(blocks, at_once)
    start = vary_like(start, (query, keys, kernel, mask))
    return jax.lax.scan(body, start, (heads, values))[0]


def infinite_head_kernel(
    query: jax.Array,
    keys: jax.Array,
    other_query: jax.Array,
    other_keys: jax.Array,
    *,
    std: float = 0.5,
    mean: ScoreMean = "zero",
) -> jax.Array:
    r"""Compute the kernel that the mean over infinitely many heads of ``φ · φ'`` tends to.

    For two scores with means ``a``, ``b`` and correlation :math:`\rho`, in units of their standard
    deviations, the product of their positive parts has the mean

    .. math:: h(a) h(b) + \rho \Phi(a) \Phi(b) + \frac{1}{2\pi} \int_0^{\arcsin\rho}
        (\rho - \sin\theta) \, e^{-(a^2 + b^2 - 2ab\sin\theta) / 2\cos^2\theta} d\theta

    with :math:`h(a) = a\Phi(a) + \varphi(a)`, integrated by Gauss and Legendre's rule.

    Args:
      query: Query ``[d]``.
      keys: Keys ``[N, d]`` of the same example.
      other_query: Query ``[d]`` of another example.
      other_keys: Keys ``[N', d]`` of the other example.
      std: As for `score_matrices`.
      mean: As for `score_matrices`.

    Returns:
      A scalar, in float32 at least.

    Raises:
      ValueError: If the mean is unknown or the standard deviation is not positive.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> x = jnp.array([1.0, 0]), jnp.eye(2)
      >>> print(f"{lro.layers.infinite_head_kernel(*x, *x):.5f}")
      0.65225

    Reference:
      Cho and Saul, 2009, for zero means; Fu et al., 2023, https://arxiv.org/abs/2307.11353.
    """
    check_scores(std, mean)
    q, x, p, y = map(padded, (query, keys, other_query, other_keys))
    norm = lambda z: jnp.sqrt(jnp.sum(jnp.square(z), axis=-1))
    s, t = std * norm(q) * norm(x), std * norm(p) * norm(y)
    products = x @ y.T
    rho = jnp.clip(std**2 * (q @ p) * products / (s[:, None] * t), -1, 1)
    shift = 0.0 if mean == "zero" else 1.0
    a = (shift * (x[:, :-1] @ q[:-1]) / s)[:, None]
    b = (shift * (y[:, :-1] @ p[:-1]) / t)[None, :]
    density = lambda z: jnp.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    positive_part = lambda z: z * ndtr(z) + density(z)
    angle = jnp.arcsin(rho)

    def node(total: jax.Array, rule: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        part, weight = rule
        sine, cosine = jnp.sin(angle * part), jnp.cos(angle * part)
        exponent = jnp.square(a - b * sine) / (2 * jnp.square(cosine)) + b * b / 2
        return total + weight * angle * (rho - sine) * jnp.exp(-exponent), None

    nodes, rule_weights = np.polynomial.legendre.leggauss(NODES)
    rule = jnp.asarray((nodes + 1) / 2, rho.dtype), jnp.asarray(rule_weights / 2, rho.dtype)
    integral = jax.lax.scan(node, jnp.zeros_like(rho), rule)[0]
    both = positive_part(a) * positive_part(b) + rho * ndtr(a) * ndtr(b) + integral / (2 * np.pi)
    return jnp.mean(products * s[:, None] * t * both)


def fit_ridge(features: jax.Array, targets: jax.Array, penalty: float) -> jax.Array:
    """Fit the values of `frozen_score_attention` in closed form.

    Args:
      features: Features ``[n, F]``, one example a row: ``φ`` of all heads, flattened.
      targets: Targets ``[n, out]``.
      penalty: Positive number that multiplies the squares of the values.

    Returns:
      The minimizer ``[F, out]`` of ``|features @ values - targets|² + penalty |values|²``, by the
      smaller of the two systems, of size ``F`` or ``n``.

    Raises:
      ValueError: If the penalty is not positive or shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> print(lro.layers.fit_ridge(jnp.array([[1.0], [2.0]]), jnp.array([[2.0], [4.0]]), 5.0))
      [[1.]]

    Reference:
      Fu et al., 2023, https://arxiv.org/abs/2307.11353.
    """
    if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets):
        raise ValueError(
            "features and targets must be [n, F] and [n, out], got shapes "
            f"{features.shape} and {targets.shape}."
        )
    if not isinstance(penalty, jax.core.Tracer) and not penalty > 0:
        raise ValueError(f"penalty={penalty} must be positive.")
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    features, targets = features.astype(dtype), targets.astype(dtype)
    examples, count = features.shape
    dual = examples < count
    gram = features @ features.T if dual else features.T @ features
    right = targets if dual else features.T @ targets
    size = len(gram)
    system = jnp.concatenate([gram + penalty * jnp.eye(size, dtype=dtype), right], axis=1)
    found = in_turn(
        lambda x: jax.scipy.linalg.solve(x[:, :size], x[:, size:], assume_a="pos"), system
    )
    return features.T @ found if dual else found


def padded(x: jax.Array) -> jax.Array:
    """Tokens ``[..., d + 1]``, in float32 at least, with a 1 behind."""
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def check_scores(std: float, mean: str) -> None:
    """Raise ValueError unless there are such score matrices."""
    if not isinstance(std, jax.core.Tracer) and not 0 < std < np.inf:
        raise ValueError(f"std={std} must be a positive number.")
    if mean not in get_args(ScoreMean):
        raise ValueError(f"mean={mean!r} must be 'zero' or 'identity'.")


def check_weights(weights: str) -> None:
    """Raise ValueError unless scores can become such weights."""
    if weights not in get_args(ScoreWeights):
        raise ValueError(f"weights={weights!r} must be 'relu' or 'softmax'.")
