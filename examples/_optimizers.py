"""From `--optimizer NAME --set key=value` to an optax transformation."""

from collections.abc import Callable, Iterable
import inspect
from typing import Any, NamedTuple

from _options import assign, closest, one_line
from _settings import InputError, Settings
import jax
import optax
import optax.contrib

import lowrank_optax as lro
from lowrank_optax.matrices import resolve_dimension_numbers

# Options that suit `llama-tiny` in the main job; every one gives way to --learning-rate or --set.
_PROJECTED = {"b2": 0.95, "rank": 32, "refresh_every": 50}
TUNED: dict[str, dict[str, Any]] = {
    "adamw": {"learning_rate": 3e-3, "b2": 0.95},
    "galore": {"learning_rate": 2e-2, **_PROJECTED, "scale": 0.25},
    "fira": {"learning_rate": 1e-2, **_PROJECTED, "scale": 0.25},
    "adarankgrad": {"learning_rate": 2e-2, **_PROJECTED, "scale": 0.25},
    "online_subspace_descent": {"learning_rate": 1e-2, "b2": 0.95, "rank": 32, "scale": 0.25},
    "dct_adamw": {"learning_rate": 5e-3, "b2": 0.95, "rank": 32},
    "apollo": {"learning_rate": 2e-2, **_PROJECTED},
    "apollo_mini": {"learning_rate": 1e-2, "b2": 0.95, "refresh_every": 50},
    "ldadam": {"learning_rate": 4e-3, "rank": 32},
}
LEARNING_RATE = 1e-3  # where neither the user, nor TUNED, nor the optimizer names one
_PERIODS = ("refresh_every", "update_proj_gap")  # optax's galore calls it by the second


class Chosen(NamedTuple):
    """An optimizer the user asked for, before there is a model."""

    name: str
    factory: Callable[..., optax.GradientTransformation]
    options: dict[str, Any]  # all but the learning rate
    learning_rate: float | None  # peak; None leaves it to the factory

    @property
    def refresh_every(self) -> int | None:
        """Steps between two refreshes of the basis; None where no fixed number is."""
        if self.factory is lro.adarankgrad:  # its `refresh_every` is only the longest stay
            return None
        parameters = inspect.signature(self.factory).parameters
        for name in _PERIODS:
            if name in parameters:
                return self.options.get(name, parameters[name].default)
        return None

    def describe(self, schedule: str) -> str:
        """Says in one line what will run."""
        parts = [f"{key}={value}" for key, value in self.options.items()]
        if self.learning_rate is not None:
            course = schedule if _takes_schedule(self.factory) else "constant"
            parts.insert(0, f"learning_rate={self.learning_rate:g} ({course})")
        return f"{self.name}: {', '.join(parts)}"


def choose(
    names: Iterable[str], settings: Iterable[str], learning_rate: float | None
) -> list[Chosen]:
    """Finds optimizers by name and gives each its options.

    Args:
      names: optimizers exported by lowrank_optax, optax or optax.contrib, looked up in this order;
        "optax.contrib.galore" is looked up in optax.contrib only.
      settings: `key=value` for every optimizer that takes the option, `name.key=value` for one.
      learning_rate: peak learning rate of all of them; None means their own.

    Raises:
      InputError: for an unknown optimizer or option, naming the closest ones there are.
    """
    factories = {name: find_factory(name) for name in names}
    options = {name: dict(TUNED.get(name, {})) for name in factories}
    for name in factories:
        if learning_rate is not None:
            options[name]["learning_rate"] = learning_rate
    taken = {name: list(inspect.signature(f).parameters) for name, f in factories.items()}
    for name, option, value in assign(settings, taken, "optimizer"):
        options[name][option] = value
    return [_chosen(name, factories[name], options[name]) for name in factories]


def _chosen(name: str, factory: Callable, options: dict[str, Any]) -> Chosen:
    default = inspect.signature(factory).parameters["learning_rate"].default
    if default is inspect.Parameter.empty:
        default = LEARNING_RATE
    rate = options.pop("learning_rate", default)
    if rate is not None and not (isinstance(rate, int | float) and 0 < rate < float("inf")):
        raise InputError(f"the learning rate of {name} must be a positive number, not {rate!r}")
    return Chosen(name, factory, options, rate)


def find_factory(name: str) -> Callable[..., optax.GradientTransformation]:
    """Finds the function `name(learning_rate, ...)` that makes an optimizer."""
    modules = {"lowrank_optax": lro, "optax": optax, "optax.contrib": optax.contrib}
    qualifier, _, function = name.rpartition(".")
    if qualifier:
        modules = {k: v for k, v in modules.items() if k == qualifier}
    for module in modules.values():
        if function in dir(module) and _is_optimizer(function, getattr(module, function)):
            return getattr(module, function)
    known = {f for m in modules.values() for f in dir(m) if _is_optimizer(f, getattr(m, f))}
    hint = closest(function, known) or "choose a function with a learning_rate as first argument"
    raise InputError(
        f"there is no optimizer {name!r} in lowrank_optax, optax or optax.contrib: {hint}"
    )


def _is_optimizer(name: str, function: Any) -> bool:
    if name.startswith(("_", "scale_by_")) or not inspect.isfunction(function):
        return False
    return next(iter(inspect.signature(function).parameters), None) == "learning_rate"


def make_optimizer(
    chosen: Chosen,
    model: Any,
    params: Any,
    schedule: optax.Schedule,
    rank_penalty: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation, telling it which leaves of the model are matrices.

    Args:
      chosen: what the user asked for.
      model: the Flax module, whose layer types say which leaves are matrices.
      params: its parameters.
      schedule: learning rate by step, as a multiple of the peak.
      rank_penalty: weight of the penalty on directions of Maestro layers, if any.

    Raises:
      InputError: if the factory refuses its options, or has no learning rate for the penalty.
    """
    peak, options = chosen.learning_rate, dict(chosen.options)
    parameters = inspect.signature(chosen.factory).parameters
    if peak is not None:
        follows = _takes_schedule(chosen.factory)
        options["learning_rate"] = (lambda count: peak * schedule(count)) if follows else peak
    for option, convert in _MATRIX_OPTIONS.items():
        if option in parameters and option not in options:
            options[option] = convert(lro.weight_dimension_numbers(model), params)
    try:
        tx = optax.with_extra_args_support(chosen.factory(**options))
        if rank_penalty is None:
            return tx
        if peak is None:
            raise ValueError("--rank-penalty needs --learning-rate")
        return optax.chain(tx, lro.layers.maestro.prox(options["learning_rate"], rank_penalty))
    except (TypeError, ValueError) as error:
        raise InputError(f"{chosen.name}: {one_line(error)}") from None


def in_few_bits(
    tx: optax.GradientTransformationExtraArgs, settings: Settings
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with its state in fewer bits, and for weights in bfloat16, as settings say."""
    bits = settings.state_bits
    if bits != 32:
        tx = lro.low_bit(tx, bits)
    if settings.rounding is None:
        return tx
    wide = lro.in_float32(tx)
    if settings.rounding == "nearest":
        return wide
    return optax.chain(wide, lro.round_updates(settings.rounding, settings.seed))


def _takes_schedule(factory: Callable) -> bool:
    annotation = inspect.signature(factory).parameters["learning_rate"].annotation
    words = ("Callable", "Schedule")  # optax.ScalarOrSchedule, spelled out or by name
    return annotation is inspect.Parameter.empty or any(w in str(annotation) for w in words)


def _for_muon(rule: Any, params: Any) -> Any:
    """Spells the dimension numbers in the class that optax.contrib.muon asks for."""
    specs = [
        spec and optax.contrib.MuonDimensionNumbers(spec.reduction_axis, spec.output_axis)
        for spec in resolve_dimension_numbers(rule, params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), specs)


# The names optimizers give to the argument that says which leaves are matrices.
_MATRIX_OPTIONS = {
    "weight_dimension_numbers": lambda rule, params: rule,
    "muon_weight_dimension_numbers": _for_muon,
}


def make_schedule(kind: str, steps: int, warmup: int) -> optax.Schedule:
    """Makes the learning rate by step as a multiple of its peak, after a linear warm-up.

    Args:
      kind: "constant"; "cosine", down to a tenth; "linear", down to zero; or "wsd" (warm-up,
        stable, decay), constant until a linear fall to zero over the last fifth.
      steps: steps of the run.
      warmup: steps until the peak.
    """
    rest = max(steps - warmup, 1)
    fall = max(steps // 5, 1)
    after = {
        "constant": optax.constant_schedule(1.0),
        "cosine": optax.cosine_decay_schedule(1.0, rest, alpha=0.1),
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "wsd": optax.linear_schedule(1.0, 0.0, fall, transition_begin=max(rest - fall, 0)),
    }[kind]
    if not warmup:
        return after
    rise = optax.linear_schedule(1.0 / warmup, 1.0, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])
