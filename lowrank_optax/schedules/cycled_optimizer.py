"""1cycle: an optimizer whose learning rate and momentum follow one cycle."""

from collections.abc import Callable
import functools
import inspect
from typing import Any

import jax.numpy as jnp
import optax

from lowrank_optax.schedules.cycle_schedules import Shape, one_cycle_schedules
from lowrank_optax.states.arguments import refuse_unused
from lowrank_optax.states.precision import in_float32, keep_dtypes

MOMENTUM_NAMES = ("momentum", "b1")


def one_cycle(
    optimizer_factory: Callable[..., optax.GradientTransformation],
    total_steps: int,
    max_learning_rate: float,
    *,
    low_div: float = 10.0,
    final_div: float = 1000.0,
    up: float = 0.45,
    down: float | None = 0.45,
    shape: Shape = "linear",
    max_momentum: float = 0.95,
    min_momentum: float = 0.85,
    momentum_name: str | None = "auto",
    dampen: bool = False,
    **hyperparams: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer whose learning rate and momentum follow `one_cycle_schedules`.

    It is ``optax.inject_hyperparams(optimizer_factory)``, with float32 schedules and arithmetic
    whatever the dtype of the parameters. ``optax.tree.get(state, "hyperparams")`` is a dict of the
    values at the last step, ``"learning_rate"`` and ``"momentum"`` or ``"b1"``. All other arguments
    of the factory are constants of the program, so that ranks and other integers need no
    ``static_args``.

    Momentum as in ``optax.sgd`` (and PyTorch), :math:`v \leftarrow m v + g`, makes steps of
    :math:`\eta / (1 - m)` in the long run: 6.7 :math:`\eta` at momentum 0.85, 20 :math:`\eta` at
    0.95. With ``dampen``, :math:`v \leftarrow m v + (1 - m) g`: the learning rate alone is the size
    of the steps, and has to be some ten times as large.

    Args:
      optimizer_factory: Makes an optimizer from ``learning_rate``, and ``momentum`` or ``b1`` if it
        takes one: ``optax.sgd``, ``optax.adamw``, ``lowrank_optax.galore``, ...
      total_steps: Number of optimizer steps, at least 3 (micro-batches of one do not count).
      max_learning_rate: The peak.
      low_div: See `one_cycle_schedules`, as for the next six.
      final_div: The peak over the last learning rate.
      up: Share of the first phase.
      down: Share of the second, or None.
      shape: ``"linear"`` or ``"cosine"``.
      max_momentum: At the start and at the end.
      min_momentum: Where the learning rate is highest.
      momentum_name: Which argument of the factory follows the momentum. ``"auto"``: ``momentum`` or
        ``b1``, whichever there is; without either, the learning rate cycles alone. None: that too,
        and momentum stays what the factory makes it.
      dampen: Multiply gradients by one minus the momentum; for optimizers that are linear in the
        gradients, such as ``optax.sgd``.
      **hyperparams: Other arguments of the factory, as they are.

    Returns:
      The optimizer, with the state of ``optax.inject_hyperparams``: for parameters in half
      precision the moments in it are float32.

    Raises:
      ValueError: If the factory has no argument ``learning_rate`` or ``momentum_name``, if one that
        cycles is among ``hyperparams``, or ``dampen`` is asked for without a momentum to cycle or
        with ``b1``; and as `one_cycle_schedules`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.schedules.one_cycle(optax.adamw, 100, 0.3, weight_decay=1e-4)
      >>> loss = lambda params: jnp.sum((params["bias"] - 2.0) ** 2)
      >>> def step(carry, _):
      ...     params, state = carry
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return (optax.apply_updates(params, updates), state), state.hyperparams
      >>> params = {"bias": jnp.zeros(3)}
      >>> (params, _), log = jax.lax.scan(step, (params, tx.init(params)), length=100)
      >>> print(f"{loss(params):.3f}", *(f"{name} {log[name][44]:.2f}" for name in sorted(log)))
      0.000 b1 0.85 learning_rate 0.30

    Reference:
      Smith, 2018, https://arxiv.org/abs/1803.09820, sections 4.1 to 4.3.
    """
    taken = inspect.signature(optimizer_factory).parameters
    momentum = _momentum_argument(taken, momentum_name)
    if momentum is None:
        names = " and ".join(MOMENTUM_NAMES)
        because = f"momentum_name=None or an optimizer_factory without {names}"
        refuse_unused(one_cycle, because, max_momentum=max_momentum, min_momentum=min_momentum)
    cycled = ["learning_rate"] if momentum is None else ["learning_rate", momentum]
    _check_factory(optimizer_factory, taken, cycled, hyperparams)
    factory = optimizer_factory
    if dampen and (momentum is None or momentum == "b1"):
        raise ValueError(
            f"dampen=True needs an optimizer with undamped momentum; {_name(optimizer_factory)} "
            + ("cycles none." if momentum is None else "weighs gradients by 1 - b1 itself.")
        )
    if dampen and momentum is not None:
        factory = _damped(factory, momentum)
    schedules = one_cycle_schedules(
        total_steps,
        max_learning_rate,
        low_div=low_div,
        final_div=final_div,
        up=up,
        down=down,
        shape=shape,
        max_momentum=max_momentum,
        min_momentum=min_momentum,
    )
    inject = optax.inject_hyperparams(factory, set(taken) - set(cycled), jnp.float32)
    tx = inject(**dict(zip(cycled, schedules, strict=False)), **hyperparams)
    return keep_dtypes(in_float32(tx))


def _damped(
    factory: Callable[..., optax.GradientTransformation], momentum: str
) -> Callable[..., optax.GradientTransformation]:
    """`factory` for gradients times one minus the momentum, with the same state."""

    @functools.wraps(factory)
    def make(**arguments: Any) -> optax.GradientTransformationExtraArgs:
        tx = optax.with_extra_args_support(factory(**arguments))

        def update_fn(updates: optax.Updates, *args: Any, **extra_args: Any) -> Any:
            updates = optax.tree.scale(1 - arguments[momentum], updates)
            return tx.update(updates, *args, **extra_args)

        return optax.GradientTransformationExtraArgs(tx.init, update_fn)

    return make


def _momentum_argument(taken: Any, momentum_name: str | None) -> str | None:
    if momentum_name == "auto":
        return next((name for name in MOMENTUM_NAMES if name in taken), None)
    return momentum_name


def _check_factory(
    factory: Callable[..., Any], taken: Any, cycled: list[str], hyperparams: dict[str, Any]
) -> None:
    for name in cycled:
        if name not in taken:
            raise ValueError(
                f"{_name(factory)} has no argument {name!r} that could cycle; it takes "
                f"{', '.join(taken)}."
            )
        if name in hyperparams:
            raise ValueError(
                f"{name}={hyperparams[name]!r} was given, but {name} cycles."
                + ("" if name == "learning_rate" else " To hold it, pass momentum_name=None.")
            )


def _name(factory: Callable[..., Any]) -> str:
    return getattr(factory, "__name__", repr(factory))
