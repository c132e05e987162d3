"""Optimizers by name, their options, and schedules."""

from _optimizers import TUNED, choose, find_factory, make_schedule
from _settings import InputError
from close import assert_close
import jax
import numpy as np
import optax
import pytest

import lowrank_optax as lro


def test_name_is_looked_up_here_before_optax() -> None:
    assert find_factory("galore") is lro.galore
    assert find_factory("optax.contrib.galore") is optax.contrib.galore
    assert find_factory("adamw") is optax.adamw
    assert find_factory("muon") is optax.contrib.muon


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("adamww", "did you mean adamw"),
        ("scale_by_adam", "did you mean"),  # has no learning rate: no optimizer by itself
        ("apply_updates", "optax"),
        ("no.such.module", "lowrank_optax, optax or optax.contrib"),
    ],
)
def test_unknown_optimizer_is_refused_with_the_closest_names(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"no optimizer '{name}'.*{hint}"):
        choose([name], [], None)


def test_option_goes_to_all_that_take_it_and_a_named_one_to_one_alone() -> None:
    adamw, galore = choose(["adamw", "galore"], ["b1=0.8", "galore.b2=0.95", "rank=7"], None)
    assert adamw.options == {**_tuned("adamw"), "b1": 0.8}
    assert galore.options == {**_tuned("galore"), "b1": 0.8, "b2": 0.95, "rank": 7}


def _tuned(name: str) -> dict:
    return {k: v for k, v in TUNED[name].items() if k != "learning_rate"}


def test_values_are_python_literals_or_text() -> None:
    settings = ["momentum=0.9", "nesterov=True", "accumulator_dtype=bfloat16"]
    (sgd,) = choose(["sgd"], settings, None)
    assert sgd.options == {"momentum": 0.9, "nesterov": True, "accumulator_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rnak=3", "galore has no option 'rnak': did you mean rank"),
        ("adam.b1=0.9", "no optimizer 'adam' in this run"),
        ("rank", "write it as key=value"),
        ("learning_rate=-1", "must be a positive number, not -1"),
        ("learning_rate=fast", "must be a positive number, not 'fast'"),
    ],
)
def test_bad_option_is_refused(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose(["galore"], [setting], None)


def test_learning_rate_is_the_closest_one_said() -> None:
    assert choose(["adamw"], [], None)[0].learning_rate == TUNED["adamw"]["learning_rate"]
    assert choose(["adamw"], [], 0.5)[0].learning_rate == 0.5
    assert choose(["adamw"], ["adamw.learning_rate=0.2"], 0.5)[0].learning_rate == 0.2
    assert choose(["lion"], [], None)[0].learning_rate == 1e-3
    assert choose(["prodigy"], [], None)[0].learning_rate == 1.0  # its own default


def test_refresh_period_is_the_option_or_the_default() -> None:
    names = ["adamw", "galore", "optax.contrib.galore"]
    adamw, galore, contrib = choose(names, ["galore.refresh_every=9"], None)
    assert (adamw.refresh_every, galore.refresh_every, contrib.refresh_every) == (None, 9, 200)


def test_refreshes_that_follow_the_gradients_have_no_period() -> None:
    (adarankgrad,) = choose(["adarankgrad"], ["refresh_every=9"], None)
    assert adarankgrad.refresh_every is None


@pytest.mark.parametrize(
    ("kind", "middle", "end"), [("constant", 1, 1), ("cosine", 0.55, 0.1), ("linear", 0.5, 0)]
)
def test_schedule_rises_to_one_and_falls_to_its_end(kind: str, middle: float, end: float) -> None:
    schedule = jax.jit(make_schedule(kind, steps=110, warmup=10))
    assert_close([schedule(i) for i in range(10)], (np.arange(1, 11) / 10).tolist())
    got = [float(schedule(i)) for i in (10, 60, 110)]
    np.testing.assert_allclose(got, [1, middle, end], atol=1e-6)


def test_wsd_is_constant_until_the_last_fifth() -> None:
    schedule = jax.jit(make_schedule("wsd", steps=100, warmup=10))
    got = [float(schedule(i)) for i in (10, 50, 80, 90, 100)]
    np.testing.assert_allclose(got, [1, 1, 1, 0.5, 0], atol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert float(make_schedule("cosine", steps=10, warmup=0)(0)) == 1
