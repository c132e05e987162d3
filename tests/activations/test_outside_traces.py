"""Numbers computed beside a trace."""

from typing import NoReturn

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.activations.sampling import outside_of_traces


def test_values_are_concrete_inside_a_trace() -> None:
    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        return x * float(outside_of_traces(lambda: np.asarray(jnp.sin(1.0))))

    assert_close(traced(jnp.float32(2)), 2 * np.sin(1))


def test_a_machine_where_jax_has_no_cpu_computes_where_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(**_: str) -> NoReturn:
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", none)
    assert outside_of_traces(lambda: float(jnp.float32(3))) == 3
