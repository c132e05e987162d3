"""From `--adapter NAME --set key=value` to a method of `lowrank_optax.adapters` and its optimizer.

One row of `RECIPES` is one adapter: which class, the learning rate that suits it, and the optimizer
where the method has one of its own.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
import inspect
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

from _options import assign, closest, one_line
from _settings import InputError
from flax import nnx
import optax

import lowrank_optax as lro

Tx: TypeAlias = optax.GradientTransformation
Rate: TypeAlias = optax.ScalarOrSchedule


class Adapted(NamedTuple):
    """What an optimizer may ask of what it trains."""

    model: nnx.Module  # with its adapters
    steps: int  # of the run


def adamw(
    learning_rate: Rate,
    adapted: Adapted,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
) -> Tx:
    """AdamW, what all adapters are trained with that have no way of their own."""
    del adapted
    return optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)


def around_adamw(change: Callable[..., Tx]) -> Callable[..., Tx]:
    """`change(tx, learning_rate, adapted, ...)` of AdamW, with the options of both."""
    own, common = (inspect.signature(f).parameters.values() for f in (change, adamw))
    names = [p.name for p in common if p.kind is inspect.Parameter.KEYWORD_ONLY]

    @functools.wraps(change)
    def optimizer(learning_rate: Rate, adapted: Adapted, **options: Any) -> Tx:
        of_adamw = {name: options.pop(name) for name in names if name in options}
        tx = adamw(learning_rate, adapted, **of_adamw)
        return change(tx, learning_rate, adapted, **options)

    merged = [*common, *(p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY)]
    vars(optimizer)["__signature__"] = inspect.Signature(merged)
    return optimizer


def lora_plus(
    learning_rate: Rate,
    adapted: Adapted,
    *,
    ratio: float = 16.0,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
) -> Tx:
    """AdamW whose steps are longer for the second factor."""
    del adapted
    return lro.adapters.lora_plus_adamw(learning_rate, ratio, b1, b2, weight_decay=weight_decay)


@around_adamw
def lora_fa_projected(tx: Tx, rate: Rate, adapted: Adapted) -> Tx:
    """AdamW on the gradients whose change is closest to that of the whole weight."""
    del rate
    factors = lro.adapters.lora_fa_factors(adapted.model)
    return optax.chain(lro.adapters.lora_fa_projection(factors), tx)


@around_adamw
def aflora(
    tx: Tx,
    rate: Rate,
    adapted: Adapted,
    *,
    warmup_fraction: float = 0.1,
    final_fraction: float = 0.5,
    exponent: float = 3.0,
    mode: Literal["quantile", "fraction"] = "quantile",
) -> Tx:
    """AdamW that freezes the factors one by one; the fractions are of the run's steps."""
    del rate
    steps = adapted.steps
    return lro.adapters.aflora_freezing(
        tx,
        steps,
        warmup_steps=int(warmup_fraction * steps),
        final_steps=int(final_fraction * steps),
        exponent=exponent,
        mode=mode,
    )


@around_adamw
def lamda(tx: Tx, rate: Rate, adapted: Adapted, *, eta: float = 0.3) -> Tx:
    """AdamW that freezes the second factor row by row, in the fraction `eta` of the steps."""
    del rate
    return lro.adapters.lamda_freezing(tx, adapted.steps, eta)


@around_adamw
def flylora(tx: Tx, rate: Rate, adapted: Adapted, *, balance_step: float = 1e-3) -> Tx:
    """AdamW, with the ranks balanced over the tokens."""
    del rate, adapted
    return lro.adapters.flylora_balance(tx, balance_step)


@around_adamw
def sora(tx: Tx, rate: Rate, adapted: Adapted, *, penalty: float = 0.5) -> Tx:
    """AdamW, with the gates shrunk after each step; gates at zero are ranks to cut."""
    del adapted
    return lro.adapters.soft_threshold_gates(tx, rate, penalty)


@around_adamw
def prilora(tx: Tx, rate: Rate, adapted: Adapted, *, every: int = 40, fraction: float = 0.5) -> Tx:
    """AdamW, with the least important entries of the first factor set to zero now and then."""
    del rate, adapted
    return lro.adapters.prilora_pruning(tx, every, fraction)


class Recipe(NamedTuple):
    """How an adapter is made and trained."""

    method: str | None  # the name of its class; None trains all weights instead
    learning_rate: float  # peak: the best of benchmarks/adapters.py
    options: Mapping[str, Any] = MappingProxyType(
        {}
    )  # of the method; they win over --rank, --alpha
    optimizer: Callable[..., Tx] = adamw


RECIPES: dict[str, Recipe] = {
    "lora": Recipe("LoRA", 1.5e-2),
    "rslora": Recipe("LoRA", 9e-3, {"rank_stabilized": True}),
    "dora": Recipe("DoRA", 1.5e-2),
    "pissa": Recipe("PiSSA", 3e-3),
    "lora_fa": Recipe("LoRAFA", 3e-2),
    "lora_fa_projected": Recipe("LoRAFA", 3e-2, {}, lora_fa_projected),
    "lora_plus": Recipe("LoRA", 3e-3, {}, lora_plus),
    "lotr": Recipe("LoTR", 3e-2),
    "aflora": Recipe("AFLoRA", 3e-2, {}, aflora),
    "lamda": Recipe("LaMDA", 6e-3, {}, lamda),
    "vera": Recipe("VeRA", 9e-2, {"rank": 256, "alpha": None}),
    "miss": Recipe("MiSS", 3e-3, {"alpha": None}),
    "miss_bat": Recipe("MiSSBat", 3e-3, {"alpha": None}),
    "randlora": Recipe("RandLoRA", 1e-3, {"alpha": None}),
    "sara": Recipe("SaRA", 9e-3, {"fraction": 0.1}),
    "sora": Recipe("SoRA", 1.5e-2, {}, sora),
    "prilora": Recipe("PRILoRA", 1.5e-2, {}, prilora),
    "flylora": Recipe("FlyLoRA", 1.5e-2, {"rank": 32, "active": 8, "alpha": None}, flylora),
    # A number a direction: it takes many, and has no scale.
    "svfit": Recipe("SVFit", 6e-2, {"rank": 64, "alpha": None}),
    "full": Recipe(None, 3e-3),
}


class Chosen(NamedTuple):
    """An adapter the user asked for, before there is a model."""

    name: str
    recipe: Recipe
    options: dict[str, Any]  # of the method
    training: dict[str, Any]  # of its optimizer
    learning_rate: float  # peak

    @property
    def rank(self) -> int | None:
        """What `--rank` or `--set` made it; None for what has none."""
        return self.options.get("rank")

    def method(self) -> lro.adapters.Adapter | None:
        """The method with its options; None where all weights are trained.

        Raises:
          InputError: if the method refuses them.
        """
        if self.recipe.method is None:
            return None
        try:
            return getattr(lro.adapters, self.recipe.method)(**self.options)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.name}: {one_line(error)}") from None

    def optimizer(
        self, schedule: optax.Schedule, adapted: Adapted
    ) -> optax.GradientTransformationExtraArgs:
        """What trains it, with a learning rate by step as a multiple of the peak."""
        rate = lambda count: self.learning_rate * schedule(count)
        tx = self.recipe.optimizer(rate, adapted, **self.training)
        return optax.with_extra_args_support(tx)

    def describe(self, schedule: str) -> str:
        """Says in one line what will run."""
        options = self.options | self.training
        spelled = "".join(f", {key}={value}" for key, value in options.items())
        return f"{self.name}: learning_rate={self.learning_rate:g} ({schedule}){spelled}"


def choose(
    names: Iterable[str],
    settings: Iterable[str],
    learning_rate: float | None,
    rank: int,
    alpha: float | None,
) -> list[Chosen]:
    """Finds adapters by name and gives each its options.

    Args:
      names: of rows of `RECIPES`.
      settings: `key=value` for every adapter that takes the option, `name.key=value` for one.
      learning_rate: peak learning rate of all of them; None means their own.
      rank: of all that take one.
      alpha: of all that take one; None leaves it to them.

    Raises:
      InputError: for an unknown adapter or option, naming the closest ones there are, or for an
        option that the method refuses.
    """
    recipes = {name: _find(name) for name in names}
    taken = {name: _taken(recipe) for name, recipe in recipes.items()}
    given: dict[str, dict[str, Any]] = {}
    for name, recipe in recipes.items():
        rate = recipe.learning_rate if learning_rate is None else learning_rate
        common = {"rank": rank} | ({} if alpha is None else {"alpha": alpha})
        given[name] = {k: v for k, v in common.items() if k in taken[name]}
        given[name] |= {"learning_rate": rate, **recipe.options}
    for name, option, value in assign(settings, taken, "adapter"):
        given[name][option] = value
    chosen = [_chosen(name, recipes[name], given[name]) for name in recipes]
    for each in chosen:
        each.method()
    return chosen


def _chosen(name: str, recipe: Recipe, given: dict[str, Any]) -> Chosen:
    rate = given.pop("learning_rate")
    if not (isinstance(rate, int | float) and 0 < rate < float("inf")):
        raise InputError(f"the learning rate of {name} must be a positive number, not {rate!r}")
    training = {k: v for k, v in given.items() if k in _optimizer_options(recipe)}
    options = {k: v for k, v in given.items() if k not in training}
    return Chosen(name, recipe, options, training, rate)


def _find(name: str) -> Recipe:
    if name not in RECIPES:
        hint = closest(name, RECIPES) or f"there are {', '.join(RECIPES)}"
        raise InputError(f"there is no adapter {name!r}: {hint}")
    return RECIPES[name]


def _taken(recipe: Recipe) -> list[str]:
    method = recipe.method and getattr(lro.adapters, recipe.method)
    options = [field.name for field in dataclasses.fields(method)] if method else []
    return ["learning_rate", *options, *_optimizer_options(recipe)]


def _optimizer_options(recipe: Recipe) -> list[str]:
    parameters = inspect.signature(recipe.optimizer).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
