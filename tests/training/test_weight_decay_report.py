"""Reading, printing and drawing what was recorded."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax.training import (
    adam_elr,
    measurements,
    monitor_weight_decay,
)

DOCS = Path(__file__).parents[2] / "docs"
PARAMS = {
    "embed": np.ones((5, 2), np.float32),
    "kernel": np.full((3, 2), 2, np.float32),
    "bias": np.zeros(2, np.float32),
}
GRADS = jax.tree.map(np.ones_like, PARAMS)
TX = optax.chain(
    optax.adamw(0.1, weight_decay=0.2),
    monitor_weight_decay(learning_rate=0.1, weight_decay=0.2),
)


@jax.jit
def step(params: Any, state: Any) -> tuple[Any, Any]:
    updates, state = TX.update(GRADS, state, params)
    return optax.apply_updates(params, updates), state


def history(steps: int = 3) -> list[Any]:
    params, state, seen = PARAMS, jax.jit(TX.init)(PARAMS), []
    for _ in range(steps):
        params, state = step(params, state)
        seen.append(measurements(state))
    return seen


def test_ratios_are_measured_over_predicted() -> None:
    numbers = history()[-1]["matrices"]
    for name, measured in (("norm", "weight_norm"), ("rotation", "rotation")):
        ratio = numbers[measured] / numbers[f"equilibrium_{name}"]
        assert numbers[f"{name}_ratio"] == pytest.approx(ratio)


def test_printed_they_are_a_table() -> None:
    numbers = history(1)[0]
    head, *rows = str(numbers).splitlines()
    assert head.split()[:3] == ["group", "norm", "of"]
    assert [row.split()[0] for row in rows] == ["all", "biases", "embeddings", "matrices"]
    # The norm of the kernel, and its effective learning rate.
    assert rows[-1].split()[1] == f"{24**0.5:.3g}"
    assert f"{0.1 / 24:.3g}" in rows[-1].split()
    tx = monitor_weight_decay()
    run = jax.jit(lambda params: tx.update(GRADS, tx.init(params), params)[1])
    unknown = measurements(run(PARAMS))
    assert "–" in str(unknown)


def test_a_state_without_a_monitor_or_with_two_is_refused() -> None:
    with pytest.raises(ValueError, match="holds 0 states"):
        measurements(optax.adam(1e-3).init(PARAMS))
    with pytest.raises(ValueError, match="holds 2 states"):
        measurements((TX.init(PARAMS), TX.init(PARAMS)))


def test_names_of_groups_survive_any_alphabet() -> None:
    tx = monitor_weight_decay(groups=lambda path: "η " + path)
    assert list(measurements(tx.init(PARAMS))) == ["all", "η bias", "η embed", "η kernel"]


@pytest.mark.slow
def test_adams_effective_learning_rate_is_that_of_its_raw_second_moment() -> None:
    tx = optax.adam(1e-3, b2=0.9)
    first = (np.arange(5) == 0).astype(np.float32)
    sparse = GRADS | {"embed": GRADS["embed"] * first[:, None]}
    _, state = jax.jit(lambda grads: tx.update(grads, tx.init(PARAMS)))(sparse)
    rates = adam_elr(state, 1e-3, eps=1e-4)
    often, never = 1e-3 / (0.1**0.5 + 1e-4), 1e-3 / 1e-4
    assert rates["matrices"]["median"] == pytest.approx(often, rel=1e-5)
    assert rates["embeddings"]["median"] == pytest.approx(never, rel=1e-5)
    mean = (8 * never + 10 * often) / 18
    assert rates["all"]["mean"] == pytest.approx(mean, rel=1e-5)
    assert rates["all"]["median"] == pytest.approx(often, rel=1e-5)
    jitted = jax.jit(adam_elr)(state, 1e-3, 1e-4)
    assert jitted["all"]["mean"] == pytest.approx(mean, rel=1e-5)
    renamed = adam_elr(state, 1e-3, groups=lambda path: "mine" if path == "kernel" else None)
    assert list(renamed) == ["all", "mine"]


def test_a_state_without_a_second_moment_is_refused() -> None:
    with pytest.raises(KeyError, match="nu"):
        adam_elr(optax.sgd(0.1).init(PARAMS), 0.1)
    codes = {"nu": jnp.zeros((3, 2), jnp.uint8)}
    with pytest.raises(TypeError, match="uint8"):
        adam_elr(codes, 0.1)
    assert adam_elr(optax.adam(0.1).init({}), 0.1) == {}


@pytest.mark.slow
def test_a_plot_draws_groups_and_their_equilibrium(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(DOCS)
    from plots import plot_weight_decay

    path = tmp_path / "decay.png"
    steps = history()
    figure = plot_weight_decay(steps, path)
    assert path.stat().st_size > 10_000
    norms = figure.axes[0].lines
    assert [line.get_label() for line in norms[::2]] == ["biases", "embeddings", "matrices"]
    np.testing.assert_allclose(
        norms[4].get_ydata(), [numbers["matrices"]["weight_norm"] for numbers in steps]
    )
    np.testing.assert_allclose(
        norms[5].get_ydata(), [numbers["matrices"]["equilibrium_norm"] for numbers in steps]
    )
    assert len(plot_weight_decay(steps, groups=["all"]).axes[3].lines) == 1
    with pytest.raises(ValueError, match="history is empty"):
        plot_weight_decay([])
    with pytest.raises(ValueError, match="nothing"):
        plot_weight_decay(steps, groups=["nothing"])
