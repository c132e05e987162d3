"""A loss with its gradient taken ahead of the parameters, and the state that this needs."""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from lowrank_optax.optimizers.lookahead import Lookahead, Noise, step_back, zero_unless_finite
from lowrank_optax.optimizers.workers import (
    AxisName,
    mean,
    number_of_workers,
    over_groups,
    own_gradients,
    own_weights,
    refuse_sharded,
    worker_keys,
)

Variant = Literal["past_local", "past_global", "fresh", "same", "noise", "none"]


class ExtrapolationState(NamedTuple):
    """State of `extrapolated_value_and_grad`.

    Attributes:
      count: Number of gradients so far, int32.
      previous_gradient: The last gradient, in the parameters' shapes and dtypes; of
        ``"past_local"`` with several workers, one for each, ``[workers, ...]``. ``()`` for variants
        that need none. Zeros at the start, and after a gradient that was not finite.
      key: Of ``"noise"``, a typed key, the same at all steps and on all workers; otherwise ``()``.
    """

    count: Any
    previous_gradient: Any
    key: Any


@dataclasses.dataclass(frozen=True, eq=False)
class ExtrapolatedValueAndGrad:
    """What `extrapolated_value_and_grad` returns: pure functions, and what they were made with.

    Attributes:
      loss_fn: The loss.
      variant: Where to look.
      inner_learning_rate: How far.
      axis_name: The mesh axis of the workers.
      local_groups: Number of workers on each device.
      has_aux: Whether the loss returns more.
      look: What is made of a gradient.
      noise: What is drawn.
      seed: Of the noise.
    """

    loss_fn: Callable[..., Any]
    variant: Variant
    inner_learning_rate: optax.ScalarOrSchedule
    axis_name: AxisName | None
    local_groups: int | None
    has_aux: bool
    look: Lookahead
    noise: Noise
    seed: int

    def init(self, params: Any, workers: int | None = None) -> ExtrapolationState:
        """The state before the first step.

        Args:
          params: The parameters.
          workers: Number of workers of ``"past_local"`` on all devices: the size of the mesh axis
            times ``local_groups``. Needed with ``axis_name``; None for ``local_groups``. Of no
            account to other variants.

        Returns:
          The state. On several devices make it by
          ``jax.jit(init, static_argnums=1, out_shardings=...)``, with the partitions that
          `state_specs` gives: no device then holds the gradients of all workers.

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
          param_specs: Those of the parameters, which may be sharded over other axes than the
            workers'; a prefix of their tree, None if they are replicated.

        Returns:
          A state with a ``PartitionSpec`` for each array, or for a whole tree of them.
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
          *args: What the loss takes after ``params``: the batch, keys of dropout. With
            ``local_groups``, arrays ``[local_groups, ...]``.
          independent: Of ``"fresh"``, and needed there: arguments like ``args`` for the first pass,
            with a batch and keys of their own.
          **kwargs: Further arguments of the loss, shared by all groups and both passes.

        Returns:
          The value (with ``has_aux`` a pair), the gradient in the parameters' dtypes, and the new
          state; the loss and the gradient are means over all workers.

        Raises:
          ValueError: If ``independent`` is missing or of no use, the state is that of other
            workers, or parameters are sharded over the axis of the workers.
        """
        self._check_independent(independent)
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

        inputs = (
            own_gradients(state.previous_gradient, params, self.local_groups) if local else (),
            self._keys(state),
            args,
            args if independent is None else independent,
        )
        if self.local_groups is None:
            value, gradient, kept = worker(*inputs)
        else:
            value, gradient, kept = over_groups(worker, own, self.local_groups, inputs)
        return self._averaged(state, value, gradient, kept)

    def _point(
        self,
        own: Any,
        rate: jax.typing.ArrayLike,
        previous: Any,
        key: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Where a worker takes its gradient."""
        if self.variant == "none" or (isinstance(rate, int | float) and rate == 0):
            return own
        if self.variant in ("past_local", "past_global"):
            return step_back(own, rate, self.look(previous))

        def ahead(weights: Any) -> Any:
            if self.variant == "noise":
                return step_back(weights, rate, self.noise(key, weights))
            gradient = jax.grad(self.loss_fn, has_aux=self.has_aux)(weights, *args, **kwargs)
            gradient = gradient[0] if self.has_aux else gradient
            return step_back(weights, rate, self.look(zero_unless_finite(gradient)))

        return jax.lax.cond(jnp.not_equal(rate, 0), ahead, lambda weights: weights, own)

    def _averaged(
        self, state: ExtrapolationState, value: Any, gradient: Any, kept: Any
    ) -> tuple[Any, Any, ExtrapolationState]:
        """The means over the workers of the mesh axis, and the new state."""
        gradient = mean(gradient, self.axis_name)
        loss, *aux = value if self.has_aux else (value,)
        loss = mean(jnp.mean(loss), self.axis_name)
        previous = state.previous_gradient
        if self.variant == "past_global":
            previous = zero_unless_finite(gradient)
        elif self.variant == "past_local":
            previous = jax.tree.map(lambda g, old: g.reshape(old.shape), kept, previous)
        count = optax.safe_increment(state.count)
        value = (loss, *aux) if self.has_aux else loss
        return value, gradient, ExtrapolationState(count, previous, state.key)

    def _keys(self, state: ExtrapolationState) -> Any:
        """A key for the worker, or for each group."""
        if self.variant != "noise":
            return ()
        key = jax.random.fold_in(state.key, state.count)
        keys = worker_keys(key, self.axis_name, self.local_groups or 1)
        return keys[0] if self.local_groups is None else keys

    @property
    def _has_workers(self) -> bool:
        return self.axis_name is not None or self.local_groups is not None

    def _check_independent(self, independent: tuple[Any, ...] | None) -> None:
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
