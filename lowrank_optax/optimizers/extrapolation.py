"""Extrapolation for large-batch training: gradients taken at a point ahead of the weights."""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.optimizers.lookahead import (
    Direction,
    Distribution,
    check_inner_learning_rate,
    direction_from,
    noise_from,
)
from lowrank_optax.optimizers.workers import (
    AxisName,
    number_of_workers,
    over_groups,
    own_gradients,
    own_weights,
    refuse_sharded,
    worker_keys,
)
from lowrank_optax.states.arguments import refuse_unused
from lowrank_optax.states.precision import to_float32

Variant = Literal["past_local", "past_global", "fresh", "same", "noise", "none"]


class ExtrapolationState(NamedTuple):
    """State of `extrapolated_value_and_grad`.

    Attributes:
      count: Number of gradients so far, int32.
      previous_gradient: Last gradient, in the parameters' shapes and dtypes; for ``"past_local"``
        one per worker, ``[workers, ...]``. Zeros at the start and after a gradient that was not
        finite; ``()`` for variants without it.
      key: PRNG key of ``"noise"``, the same at all steps and on all workers; otherwise ``()``.
    """

    count: Any
    previous_gradient: Any
    key: Any


@dataclasses.dataclass(frozen=True, eq=False)
class ExtrapolatedValueAndGrad:
    """Result of `extrapolated_value_and_grad`: pure functions, and the arguments they have.

    Attributes:
      loss_fn, variant, inner_learning_rate, axis_name, local_groups, has_aux, seed: The arguments.
      direction: Function from a gradient to the direction of extrapolation.
      noise: Function from a key and parameters to a random direction.
    """

    loss_fn: Callable[..., Any]
    variant: Variant
    inner_learning_rate: optax.ScalarOrSchedule
    axis_name: AxisName | None
    local_groups: int | None
    has_aux: bool
    direction: Callable[[Any], Any]
    noise: Callable[[jax.Array, Any], Any]
    seed: int

    def init(self, params: Any, workers: int | None = None) -> ExtrapolationState:
        """The state before the first step.

        Args:
          params: The parameters.
          workers: Number of workers of ``"past_local"`` on all devices, needed with ``axis_name``:
            the size of the mesh axis times ``local_groups``.

        Returns:
          The state. On several devices call ``jax.jit(init, static_argnums=1, out_shardings=...)``
          with the partitions of `state_specs`: no device then holds the gradients of all workers.

        Raises:
          ValueError: If ``workers`` is missing or does not fit ``local_groups``, or parameters are
            sharded over the axis of the workers.
        """
        refuse_sharded(params, self.axis_name)
        previous: Any = ()
        if self.variant == "past_local" and (self._has_workers or workers is not None):
            count = number_of_workers(workers, self.axis_name, self.local_groups)
            previous = jax.tree.map(lambda w: jnp.zeros((count, *w.shape), w.dtype), params)
        elif self.variant in ("past_local", "past_global"):
            previous = optax.tree.zeros_like(params)
        key = jax.random.key(self.seed) if self.variant == "noise" else ()
        return ExtrapolationState(jnp.zeros([], jnp.int32), previous, key)

    def state_specs(self, param_specs: Any = None) -> ExtrapolationState:
        """The partitions of the state, for ``shard_map`` and, on a mesh, ``out_shardings``.

        Args:
          param_specs: Partitions of the parameters over other axes than the workers', a prefix of
            their tree; None if they are replicated.
        """
        param_specs = PartitionSpec() if param_specs is None else param_specs
        previous: Any = ()
        if self.variant == "past_global":
            previous = param_specs
        elif self.variant == "past_local":
            leading = (self.axis_name,) if self._has_workers else ()
            is_spec = lambda x: isinstance(x, PartitionSpec)
            local = lambda spec: PartitionSpec(*leading, *spec)
            previous = jax.tree.map(local, param_specs, is_leaf=is_spec)
        key = PartitionSpec() if self.variant == "noise" else ()
        return ExtrapolationState(PartitionSpec(), previous, key)

    def __call__(
        self,
        params: Any,
        state: ExtrapolationState,
        *args: Any,
        independent: tuple[Any, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, ExtrapolationState]:
        """The loss ahead of ``params``, its gradient there, and the new state.

        Args:
          params: The weights, not extrapolated.
          state: The state; inside ``shard_map`` the worker's part of it.
          *args: Further positional arguments of the loss: the batch, keys of dropout. With
            ``local_groups``, arrays ``[local_groups, ...]``.
          independent: Tuple like ``args`` for the first pass of ``"fresh"``, with a batch and keys
            of its own.
          **kwargs: Further arguments of the loss, shared by all groups and both passes.

        Returns:
          The value (with ``has_aux`` a pair), the gradient in the parameters' dtypes, and the new
          state. Loss and gradient are means over all workers.

        Raises:
          ValueError: If ``independent`` is missing or without effect, the state is that of other
            workers, or parameters are sharded over the axis of the workers.
        """
        if (independent is None) == (self.variant == "fresh"):
            raise ValueError(
                f"variant={self.variant!r} with independent={independent!r}: 'fresh', and no other "
                "variant, takes independent=(batch, ...), the loss's arguments in the first pass."
            )
        if independent is not None and not isinstance(independent, tuple):
            raise ValueError(
                "independent must be a tuple of the loss's arguments after params, such as "
                f"(batch,), not a {type(independent).__name__}."
            )
        own = own_weights(params, self.axis_name)
        rate = self.inner_learning_rate
        rate = rate(state.count) if callable(rate) else rate
        local = self.variant == "past_local"

        def worker(previous: Any, key: Any, args: Any, first: Any) -> tuple[Any, Any, Any]:
            previous = previous if local else state.previous_gradient
            point = self._point(own, rate, previous, key, first, kwargs)
            value_and_grad = jax.value_and_grad(self.loss_fn, has_aux=self.has_aux)
            value, gradient = value_and_grad(point, *args, **kwargs)
            return value, gradient, zero_unless_finite(gradient) if local else ()

        keys: Any = ()
        if self.variant == "noise":
            key = jax.random.fold_in(state.key, state.count)
            keys = worker_keys(key, self.axis_name, self.local_groups)
        previous = state.previous_gradient
        inputs = (
            own_gradients(previous, params, self.local_groups) if local else (),
            keys,
            args,
            args if independent is None else independent,
        )
        if self.local_groups is None:
            value, gradient, saved = worker(*inputs)
        else:
            value, gradient, saved = over_groups(worker, own, self.local_groups, inputs)
        mean = lambda x: x if self.axis_name is None else jax.lax.pmean(x, self.axis_name)
        gradient = mean(gradient)
        loss, *aux = value if self.has_aux else (value,)
        loss = mean(jnp.mean(loss))
        if self.variant == "past_global":
            previous = zero_unless_finite(gradient)
        elif local:
            previous = jax.tree.map(lambda g, old: g.reshape(old.shape), saved, previous)
        count = optax.safe_increment(state.count)
        value = (loss, *aux) if self.has_aux else loss
        return value, gradient, ExtrapolationState(count, previous, state.key)

    def _point(
        self, own: Any, rate: Any, previous: Any, key: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Where a worker takes its gradient."""
        if self.variant == "none" or (isinstance(rate, int | float) and rate == 0):
            return own
        back = lambda w, zeta: (to_float32(w) - rate * zeta).astype(w.dtype)
        if self.variant in ("past_local", "past_global"):
            return jax.tree.map(back, own, self.direction(previous))

        def ahead(weights: Any) -> Any:
            if self.variant == "noise":
                return jax.tree.map(back, weights, self.noise(key, weights))
            gradient = jax.grad(self.loss_fn, has_aux=self.has_aux)(weights, *args, **kwargs)
            gradient = gradient[0] if self.has_aux else gradient
            return jax.tree.map(back, weights, self.direction(zero_unless_finite(gradient)))

        return jax.lax.cond(jnp.not_equal(rate, 0), ahead, lambda weights: weights, own)

    @property
    def _has_workers(self) -> bool:
        return self.axis_name is not None or self.local_groups is not None


def zero_unless_finite(gradient: Any) -> Any:
    """The tree, or zeros if its norm, and so any of its numbers, is not finite."""
    finite = jnp.isfinite(optax.tree.norm(to_float32(gradient)))
    return jax.tree.map(lambda g: jnp.where(finite, g, jnp.zeros_like(g)), gradient)


def extrapolated_value_and_grad(
    loss_fn: Callable[..., Any],
    variant: Variant,
    inner_learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName | None = None,
    local_groups: int | None = None,
    has_aux: bool = False,
    direction: Direction = "gradient",
    max_norm: jax.typing.ArrayLike | None = None,
    noise: Distribution = "normal",
    filter_normalized: bool = False,
    weight_dimension_numbers: DimensionNumbersRule = None,
    seed: int = 0,
) -> ExtrapolatedValueAndGrad:
    r"""``jax.value_and_grad``, with the gradient taken at a point ahead of the parameters.

    With weights :math:`w`, worker :math:`k` of :math:`K` and its own batch,

    .. math::
      h_t^k = w_t - \hat\gamma_t \zeta_t^k, \qquad
      g_t^k = \nabla f(h_t^k; \mathrm{batch}_t^k), \qquad
      g_t = \tfrac{1}{K} \sum_k g_t^k,

    where :math:`\zeta_t^k` is

    - ``"past_local"``: :math:`g_{t-1}^k`, the worker's own last gradient, without a second pass;
    - ``"past_global"``: :math:`g_{t-1}`, their mean;
    - ``"same"``: :math:`\nabla f(w_t; \mathrm{batch}_t^k)`, on the same batch;
    - ``"fresh"``: :math:`\nabla f(w_t; \cdot)` on an independent batch: stochastic extragradient;
    - ``"noise"``: random numbers of mean 0 and variance 1;
    - ``"none"``: 0.

    Any optimizer uses :math:`g_t` as the gradient and applies its update to :math:`w_t`. The first
    step of the past variants, and a step after a gradient that was not finite, is not extrapolated.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)``: the mean over the worker's batch, a scalar;
        with ``has_aux`` a pair of it and more.
      variant: Direction of the extrapolation, as above.
      inner_learning_rate: Step :math:`\hat\gamma \ge 0`: a float, a traced scalar, or a schedule of
        the number of gradients so far; best a fixed fraction of the optimizer's rate. If it is 0,
        the first pass of ``"same"`` and ``"fresh"`` is skipped.
      axis_name: Mesh axis or axes of the data-parallel workers, under ``jax.shard_map`` (or
        ``jax.vmap``): losses and gradients are averaged over it, and parameters must be replicated
        over it. None elsewhere, also under ``jit`` with a sharded batch.
      local_groups: Number of workers on each device, which run in turn with the memory of one. The
        positional arguments then have a first axis of this size: micro-batches are workers.
      has_aux: Whether the loss returns auxiliary outputs. They come only from the pass at
        :math:`h`, for each worker; stacked with ``local_groups``.
      direction: How a gradient becomes :math:`\zeta`: ``"gradient"``, unchanged; ``"normalized"``,
        each weight's gradient divided by its root mean square, so that :math:`\hat\gamma` has the
        scale of Adam's learning rates; or a function of the tree of gradients (in float32).
      max_norm: Largest norm of :math:`\zeta` over all leaves; None for no bound.
      noise: Distribution of ``"noise"``, ``"normal"`` or ``"uniform"``.
      filter_normalized: Whether noise is multiplied by the norm of its weight's column;
        :math:`\hat\gamma \sqrt{d}` is then the relative perturbation of a column of :math:`d`
        weights.
      weight_dimension_numbers: Which leaves are matrices, and how: see `scale_by_projection`. It
        tells ``"normalized"`` which layers are stacked, and ``filter_normalized`` the columns (the
        last axis counts those of other leaves).
      seed: Seed of the noise; the step and the worker's number are folded in.

    Returns:
      ``f`` with ``state = f.init(params)`` and ``value, gradients, state = f(params, state,
      *args)``: see `ExtrapolatedValueAndGrad`. For ``"fresh"``, ``independent=(batch, ...)`` are
      the arguments of the first pass.

    Raises:
      ValueError: If an argument is out of range, or has no effect on this variant.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> loss = lambda params, x: 0.5 * jnp.sum((params["w"] - x) ** 2)
      >>> tx = optax.adam(0.1)
      >>> value_and_grad = lro.extrapolated_value_and_grad(loss, "past_local", 0.1)
      >>> params = {"w": jnp.zeros(2)}
      >>> opt_state, state = tx.init(params), value_and_grad.init(params)
      >>> for x in (jnp.ones(2), jnp.ones(2)):
      ...     value, gradients, state = value_and_grad(params, state, x)
      ...     updates, opt_state = tx.update(gradients, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(gradients["w"].round(3))  # of the second step, at 0.1 + 0.1
      [-0.8 -0.8]

    Reference:
      Lin et al., Extrapolation for Large-batch Training in Deep Learning, 2020,
      https://arxiv.org/abs/2006.05720: the framework, and EXTRAP-SGD, which is ``"past_local"``.
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant={variant!r} must be one of {', '.join(get_args(Variant))}.")
    if local_groups is not None and local_groups < 1:
        raise ValueError(f"local_groups={local_groups} must be at least 1, or None.")
    check_inner_learning_rate(inner_learning_rate)
    unused: dict[str, Any] = {}
    if variant != "noise":
        unused |= {"noise": noise, "filter_normalized": filter_normalized}
    if variant in ("noise", "none"):
        unused |= {"direction": direction, "max_norm": max_norm}
    if not (filter_normalized if variant == "noise" else direction == "normalized"):
        unused["weight_dimension_numbers"] = weight_dimension_numbers
    refuse_unused(extrapolated_value_and_grad, f"variant={variant!r}", **unused)
    return ExtrapolatedValueAndGrad(
        loss_fn,
        variant,
        inner_learning_rate,
        axis_name,
        local_groups,
        has_aux,
        direction_from(direction, max_norm, weight_dimension_numbers),
        noise_from(noise, filter_normalized, weight_dimension_numbers),
        seed,
    )
