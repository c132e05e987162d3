"""Statistics that arrive as gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.adapters.statistics import with_statistic


def loss(slot, rows, x, weights):
    out = with_statistic(x, rows @ slot)
    return jnp.sum(weights[:, None] * out**3)


def inputs(tokens=6, features=3):
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (tokens, features)), jax.random.normal(keys[1], (tokens, 4))


def test_the_gradient_is_the_mean_of_rows_whatever_the_loss():
    rows, x = inputs()
    for scale in (1e-6, 1.0, -50.0):
        got = jax.grad(loss)(jnp.zeros((3, 1)), rows, x, jnp.full(6, scale))
        np.testing.assert_allclose(got[:, 0], rows.mean(0), atol=1e-6)


def test_tokens_without_a_part_in_the_loss_do_not_count():
    rows, x = inputs()
    used = jnp.array([1.0, 0, 1, 1, 0, 0])
    got = jax.grad(loss)(jnp.zeros((3, 1)), rows, x, used)
    np.testing.assert_allclose(got[:, 0], (rows * used[:, None]).sum(0) / 6, atol=1e-6)


def test_the_output_and_its_gradient_are_untouched_and_remat_counts_once():
    rows, x = inputs()
    slot, ones = jnp.ones((3, 1)), jnp.ones(6)
    plain = jax.value_and_grad(lambda x: jnp.sum(x**3))(x)
    value, (of_slot, of_x) = jax.jit(jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 2)))(
        slot, rows, x, ones
    )
    np.testing.assert_allclose(value, plain[0], rtol=1e-6)
    np.testing.assert_allclose(of_x, plain[1], rtol=1e-6)
    np.testing.assert_allclose(of_slot[:, 0], rows.mean(0), atol=1e-6)


def test_layers_of_a_scan_have_statistics_of_their_own():
    rows, x = inputs()
    scales = jnp.array([1.0, 2.0])

    def scanned(slots):
        body = lambda y, layer: (with_statistic(y, (layer[1] * rows) @ layer[0]), None)
        return jnp.sum(jax.lax.scan(body, x, (slots, scales))[0] ** 2)

    got = jax.grad(scanned)(jnp.zeros((2, 3, 1)))
    np.testing.assert_allclose(got[..., 0], scales[:, None] * rows.mean(0), atol=1e-6)


def test_under_vmap_weights_of_tokens_are_summed_and_a_slot_of_ones_brings_their_sum():
    rows, x = inputs()
    used = jnp.array([1.0, 0, 1, 1, 0, 0])

    def by_example(slot):
        each = lambda *example: loss(slot, *(a[None] for a in example))
        return jnp.sum(jax.vmap(each)(jnp.pad(rows, ((0, 0), (0, 1)), constant_values=1), x, used))

    got = jax.grad(by_example)(jnp.zeros((4, 1)))
    np.testing.assert_allclose(got[3], 3, atol=1e-6)
    np.testing.assert_allclose(got[:3, 0] / got[3], (rows * used[:, None]).sum(0) / 3, atol=1e-6)


def test_forward_mode_is_refused_by_jax():
    rows, x = inputs()
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: with_statistic(x, rows @ jnp.zeros((3, 1))), (x,), (x,))
