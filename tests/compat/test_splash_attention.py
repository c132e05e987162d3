"""What the library assumes of JAX's experimental attention kernel for TPUs, in its interpreter."""

from typing import Any

from close import assert_close
import jax
import numpy as np
import pytest

from lowrank_optax.compat import splash_attention


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "local_window_size": (40, 5), "scale": 0.3},
        pytest.param(
            {"is_causal": True, "local_window_size": None, "scale": None}, marks=pytest.mark.full
        ),
        pytest.param(
            {"is_causal": False, "local_window_size": (70, 70), "scale": None},
            marks=pytest.mark.full,
        ),
        pytest.param(
            {"is_causal": False, "local_window_size": None, "scale": None}, marks=pytest.mark.full
        ),
    ],
)
def test_it_equals_the_attention_of_jax(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    draw = lambda heads: rng.normal(size=(1, 128, heads, 64)).astype(np.float32)
    arrays, gradient = (draw(2), draw(1), draw(1)), draw(2)
    kernel = lambda *x: splash_attention.attention(
        *x, name="attention_context", interpret=True, **options
    )
    plain = lambda *x: jax.nn.dot_product_attention(*x, **options)
    results = []
    for fn in (kernel, plain):
        output, backward = jax.vjp(fn, *arrays)
        results.append((output, *backward(gradient)))
    assert_close(*results)


def test_what_it_saves_has_the_name_that_is_given() -> None:
    options = {"is_causal": True, "local_window_size": None, "scale": None, "interpret": True}
    loss = lambda *x: splash_attention.attention(*x, name="context_of_a_test", **options).sum()
    arrays = [jax.ShapeDtypeStruct((1, 128, 1, 64), np.float32)] * 3
    assert str(jax.make_jaxpr(jax.grad(loss))(*arrays)).count("context_of_a_test") == 2
