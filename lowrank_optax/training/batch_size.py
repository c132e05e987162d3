"""AdAdaGrad: batches that grow when the noise of the gradient asks for it."""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lowrank_optax.states.arguments import refuse_unused
from lowrank_optax.training.gradient_noise import GradientNoise, ratio

BatchSizeTest = Literal["norm", "inner_product", "augmented"]
Bucket = Literal["power_of_two", "multiple"]

# Consecutive tests with noise around a zero gradient, before the batch becomes the largest.
_PATIENCE = 3
_LARGEST = 2**31 - 1


class BatchSizeState(NamedTuple):
    """State of `AdaptiveBatchSize`: scalars, to be saved with a checkpoint.

    Attributes:
      batch_size: Number of examples in the next batch, int32.
      samples: Number of examples in all batches so far, int32, at most 2³¹ - 1.
      count: Number of measurements so far, int32.
      zeros: Number of consecutive tests with noise around a zero gradient, int32.
      variance: Moving average of one example's variance, float32.
      variance_along: The same along the mean gradient, float32; 0 if no test needs it.
      signal: Moving average of the squared norm of the gradient without noise, float32.
    """

    batch_size: jax.Array
    samples: jax.Array
    count: jax.Array
    zeros: jax.Array
    variance: jax.Array
    variance_along: jax.Array
    signal: jax.Array

    @property
    def noise_scale(self) -> jax.Array:
        """The batch size at which noise equals signal; infinite without a signal."""
        return ratio(self.variance, self.signal)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveBatchSize:
    r"""A batch size that grows until the gradient's noise passes a test.

    With the variance :math:`V` of one example's gradient, :math:`V_{ip}` of its inner product with
    the mean gradient :math:`g`, and :math:`V_{or} = V - V_{ip} / \lVert g \rVert^2` orthogonal to
    it, the tests and the sizes that just pass them are

    .. math::
      \text{norm:} \quad b = \frac{V}{\eta^2 \lVert g \rVert^2} \qquad
      \text{inner product:} \quad b = \frac{V_{ip}}{\theta^2 \lVert g \rVert^4} \qquad
      \text{orthogonality:} \quad b = \frac{V_{or}}{\nu^2 \lVert g \rVert^2}

    and the batch never shrinks: :math:`b_{k+1} = \min(b_{\max}, \max(b_k, b))`, rounded up to one
    of `sizes`. The norm test converges to :math:`(1 / \eta^2 - 1)` times the `noise_scale
    <GradientNoise.noise_scale>`; with :math:`\eta \ge 1` it never grows the batch.

    A step computes the gradient and its noise on ``state.batch_size`` examples with
    `accumulate_with_noise`, updates the parameters, and calls `observe`. All methods are pure, and
    those that take a state may be jitted.

    Args:
      initial: First batch size.
      maximum: Bound of the batch size.
      test: ``"norm"``, ``"inner_product"``, or ``"augmented"``: inner product and orthogonality.
        The last two need noise with ``inner_product=True``.
      eta: Threshold of the norm test. The official code has 0.1 for all three thresholds, and its
        runs up to 0.5.
      theta: Threshold of the inner-product test.
      nu: Threshold of the orthogonality test; 1.0 in the official runs.
      micro_batch_size: Number of examples that a device processes at a time.
      devices: Number of devices that share a batch. All sizes are multiples of the unit
        ``micro_batch_size * devices``.
      test_interval: Number of measurements from one test to the next.
      decay: Decay of the moving averages of noise and signal that are tested, 0.9 to 0.99 if few
        groups make them noisy. 0.0 tests each measurement alone, as the paper does.
      bucket: ``"power_of_two"``: sizes are ``initial`` times powers of two, so that a jitted step
        is compiled for few sizes. ``"multiple"``: they are multiples of the unit.
      dataset_size: Number of examples: a bound like ``maximum``.

    Raises:
      ValueError: If a number is out of range, or ``initial`` is not a multiple of the unit.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> control = lro.training.AdaptiveBatchSize(initial=4, maximum=64, eta=0.5)
      >>> state = control.init()
      >>> noise = lro.training.GradientNoise(
      ...     squared_norm=jnp.float32(1.0), variance=jnp.float32(5.0), batch_size=jnp.float32(4)
      ... )
      >>> state = control.observe(state, noise)
      >>> print(f"{control.required(noise):.0f}", state.batch_size, state.samples)
      20 32 4
      >>> control.sizes
      (4, 8, 16, 32, 64)

    Reference:
      Lau et al., AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods, 2024,
      https://arxiv.org/abs/2402.11215, Algorithm 1; https://arxiv.org/abs/2412.21124.
    """

    initial: int
    maximum: int
    test: BatchSizeTest = "norm"
    eta: float = 0.1
    theta: float = 0.1
    nu: float = 0.1
    micro_batch_size: int = 1
    devices: int = 1
    test_interval: int = 1
    decay: float = 0.0
    bucket: Bucket = "power_of_two"
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        for name in ("initial", "micro_batch_size", "devices", "test_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("eta", "theta", "nu"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        for name, known in (("test", BatchSizeTest), ("bucket", Bucket)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be one of {get_args(known)}."
                )
        used = {"norm": ("eta",), "inner_product": ("theta",), "augmented": ("theta", "nu")}
        for name in {"eta", "theta", "nu"} - set(used[self.test]):
            refuse_unused(AdaptiveBatchSize, f"test={self.test!r}", **{name: getattr(self, name)})
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be at least 0 and below 1.")
        if self.initial % self.unit:
            raise ValueError(
                f"initial={self.initial} must be a multiple of micro_batch_size * devices = "
                f"{self.unit}."
            )
        if self.largest < self.initial:
            bound = f"dataset_size={self.dataset_size}"
            if self.dataset_size is None or self.maximum < self.dataset_size:
                bound = f"maximum={self.maximum}"
            raise ValueError(f"{bound} must be at least initial={self.initial}.")
        if self.largest > _LARGEST // 2:
            raise ValueError(f"maximum={self.maximum} must be below 2**30.")

    @property
    def unit(self) -> int:
        """One micro-batch per device; all sizes are multiples of it."""
        return self.micro_batch_size * self.devices

    @property
    def largest(self) -> int:
        """The largest multiple of the unit within the bounds."""
        bound = self.maximum if self.dataset_size is None else min(self.maximum, self.dataset_size)
        return bound // self.unit * self.unit

    @property
    def sizes(self) -> tuple[int, ...]:
        """All possible sizes in ascending order: a step is compiled at most once for each."""
        if self.bucket == "multiple":
            return tuple(range(self.initial, self.largest + 1, self.unit))
        doublings = [self.initial]
        while 2 * doublings[-1] < self.largest:
            doublings.append(2 * doublings[-1])
        return (*doublings, self.largest) if self.largest > self.initial else (self.initial,)

    def init(self) -> BatchSizeState:
        """The state before the first batch."""
        initial, zero = jnp.asarray(self.initial, jnp.int32), jnp.zeros([], jnp.int32)
        return BatchSizeState(initial, zero, zero, zero, *[jnp.zeros([])] * 3)

    def required(self, noise: GradientNoise) -> jax.Array:
        """The batch size that just passes the test, neither rounded nor bounded; float32.

        Infinite if the gradient is zero and noise is not; zero without noise.

        Raises:
          ValueError: If the test needs an inner-product variance that was not measured.
        """
        return self._required(noise.variance, self._along(noise), noise.squared_norm)

    def observe(self, state: BatchSizeState, noise: GradientNoise | None) -> BatchSizeState:
        """The state after a batch of ``state.batch_size`` examples.

        Args:
          state: From `init` or the last `observe`.
          noise: Noise measured on the batch, before gradients are clipped. With None, or if it is
            not finite, only the examples are counted.

        Raises:
          ValueError: If the test needs an inner-product variance that was not measured.
        """
        samples = jnp.minimum(state.samples, _LARGEST - state.batch_size) + state.batch_size
        counted = state._replace(samples=samples)
        if noise is None:
            return counted
        count = state.count + 1
        weight = jnp.maximum(1.0 - self.decay, 1.0 / count)
        average = lambda old, new: old + weight * (new - old)
        averaged = counted._replace(
            count=count,
            variance=average(state.variance, noise.variance),
            variance_along=average(state.variance_along, self._along(noise)),
            signal=average(state.signal, noise.signal),
        )
        noise_left = averaged.variance / state.batch_size
        squared_norm = averaged.signal + noise_left  # as a gradient of this batch size has it
        is_zero = (squared_norm <= 1e-6 * noise_left) & (averaged.variance > 0)
        zeros = jnp.where(is_zero, state.zeros + 1, 0)
        required = self._required(averaged.variance, averaged.variance_along, squared_norm)
        required = jnp.where(is_zero, jnp.where(zeros >= _PATIENCE, jnp.inf, 0.0), required)
        size = jnp.maximum(state.batch_size, self._rounded(required))
        tested = averaged._replace(batch_size=size, zeros=zeros)

        where = lambda condition, *states: jax.tree.map(
            lambda a, b: jnp.where(condition, a, b), *states
        )
        finite = jnp.isfinite(noise.variance) & jnp.isfinite(noise.squared_norm)
        return where(finite, where(count % self.test_interval == 0, tested, averaged), counted)

    def _required(self, variance: jax.Array, along: jax.Array, norm: jax.Array) -> jax.Array:
        if self.test == "norm":
            return ratio(variance, self.eta**2 * norm)
        size = ratio(along, self.theta**2 * norm)
        if self.test == "inner_product":
            return size
        across = jnp.maximum(variance - along, 0.0)
        return jnp.maximum(size, ratio(across, self.nu**2 * norm))

    def _along(self, noise: GradientNoise) -> jax.Array:
        """The variance along the gradient's direction, if the test needs it."""
        if self.test == "norm":
            return jnp.zeros([])
        if noise.inner_product_variance is None:
            raise ValueError(
                f"test={self.test!r} needs the variance of inner products: measure the noise with "
                "inner_product=True."
            )
        positive = noise.squared_norm > 0
        norm = jnp.where(positive, noise.squared_norm, 1.0)
        return jnp.where(positive, noise.inner_product_variance / norm, 0.0)

    def _rounded(self, required: jax.Array) -> jax.Array:
        """The smallest size that is at least ``required``, or the largest."""
        # Bounded before it is cast to an integer, for infinity.
        least = jnp.ceil(jnp.minimum(required, 2.0**30)).astype(jnp.int32)
        if self.bucket == "multiple":
            return jnp.minimum(-(-least // self.unit) * self.unit, self.largest)
        sizes = jnp.asarray(self.sizes, jnp.int32)
        return sizes[jnp.minimum(jnp.searchsorted(sizes, least), len(sizes) - 1)]
