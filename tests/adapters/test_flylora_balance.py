"""FlyLoRA's balance: the worked counts, what moves, and what it does over many steps."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Rows
from tests.adapters.nnx_models import Scanned, loss_of, tokens

flylora_balance, trainable = lro.adapters.flylora_balance, lro.adapters.trainable
COUNTS = (25, 23, 16, 20, 49, 13, 11, 43)
SIGNS = (0, 1, 1, 1, -1, 1, 1, -1)


def inputs_with_counts(counts: tuple[int, ...]) -> np.ndarray:
    """Two ranks for each token, so that rank ``i`` is used ``counts[i]`` times; ``A`` is one."""
    left, rows = np.array(counts), []
    while left.any():
        pair = np.argsort(-left, kind="stable")[:2]
        assert left[pair].all()
        left[pair] -= 1
        row = np.full(len(counts), 0.1)
        row[pair] = 3.0, -2.0
        rows.append(row)
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_worked_counts_of_a_step_give_the_worked_move(micro_batches: int) -> None:
    """T=100, k=2, r=8: counts of the whole step, not of its micro-batches, have the signs."""
    method, x = lro.adapters.FlyLoRA(rank=8, active=2), inputs_with_counts(COUNTS)
    assert x.shape == (100, 8)
    rng = np.random.default_rng(0)
    batches = rng.permutation(x).reshape(micro_batches, -1, 8)
    trained = {"B": jnp.ones((8, 3)), "balance_bias": jnp.zeros(8)}
    tx = optax.MultiSteps(flylora_balance(optax.sgd(1.0)), micro_batches)

    @jax.jit
    def step(trained, state, x):
        def loss(trained):
            p = trained | {"A": jnp.eye(8)}
            return jnp.sum(method.branch(p, Rows(x), y=jnp.zeros((len(x), 3)), weight=x) ** 3)

        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    state = tx.init(trained)
    for batch in batches:
        np.testing.assert_array_equal(trained["balance_bias"], np.zeros(8))
        trained, state = step(trained, state, batch)
    np.testing.assert_allclose(trained["balance_bias"], 1e-3 * np.array(SIGNS), rtol=1e-6, atol=0)


def spread_after(score: str, steps: int) -> tuple[int, int, float]:
    """The spread of counts before and after balancing on the same data, and the largest bias."""
    method = lro.adapters.FlyLoRA(rank=8, active=2, score=score)
    p = method.layer_arrays(method.init(jax.random.key(0), jnp.zeros((1, 64, 4))), 0)
    x = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    tx = flylora_balance(optax.set_to_zero())

    def counts(d):
        return jnp.sum(method.used(p | {"balance_bias": d}, x @ p["A"]), axis=0)

    def step(trained, _):
        def loss(trained):
            return jnp.sum(method.branch(p | trained, Rows(x), y=jnp.zeros((512, 4)), weight=x))

        updates, _ = tx.update(jax.grad(loss)(trained), tx.init(trained))
        return optax.apply_updates(trained, updates), None

    @jax.jit
    def run(trained):
        after, _ = jax.lax.scan(step, trained, length=steps)
        return counts(trained["balance_bias"]), counts(after["balance_bias"]), after["balance_bias"]

    before, after, d = run({"B": p["B"], "balance_bias": p["balance_bias"]})
    return int(jnp.ptp(before)), int(jnp.ptp(after)), float(jnp.max(jnp.abs(d)))


@pytest.mark.filterwarnings("ignore:score='biased_magnitude' cannot be balanced:UserWarning")
@pytest.mark.parametrize(
    "score", ["magnitude", pytest.param("signed", marks=pytest.mark.full), "biased_magnitude"]
)
def test_counts_are_balanced_unless_the_bias_is_inside_the_magnitude(score: str) -> None:
    before, after, bias = spread_after(score, 1000)
    assert before > 40
    if score == "biased_magnitude":
        assert after > 40
        assert bias == pytest.approx(1.0, rel=1e-3)  # it moved the same way in every step
    else:
        assert after <= 10
        assert bias < 0.5


def test_rounding_of_a_balanced_rank_is_zero_whatever_the_scale_and_inf_and_nan_move_nothing() -> (
    None
):
    tx = flylora_balance(optax.sgd(1.0), step=0.5)
    excess = jnp.array([[0.24, 3e-9, -0.24, 0.0], [jnp.nan, 0.1, -jnp.inf, -1e-9]])
    for scale in (1.0, 1e-6, 1e6):
        tree = {"B": jnp.ones(2), "balance_bias": scale * excess}
        updates, _ = jax.jit(tx.update)(tree, tx.init(tree))
        expected = [[-0.5, 0, 0.5, 0], [0, -0.5, 0, 0]]
        np.testing.assert_array_equal(updates["balance_bias"], expected)
        np.testing.assert_array_equal(updates["B"], -np.ones(2))


def test_the_inner_transformation_does_not_see_the_bias() -> None:
    """Neither clipping, nor decay, nor its state."""
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.5))
    tx = optax.inject_hyperparams(lambda step: flylora_balance(inner, step))(step=0.25)
    params = {"up": {"B": jnp.ones(4), "balance_bias": jnp.full(4, 7.0)}}
    gradient = {"up": {"B": jnp.full(4, 3.0), "balance_bias": jnp.array([1e4, -1e4, 0, 0])}}
    state = tx.init(params)
    shapes = [x.shape for x in jax.tree.leaves(state.inner_state)]
    assert shapes.count((4,)) == 2  # two moments of B
    updates, _ = jax.jit(tx.update)(gradient, state, params)
    alone, _ = inner.update(
        {"B": gradient["up"]["B"]}, inner.init({"B": params["up"]["B"]}), {"B": params["up"]["B"]}
    )
    np.testing.assert_allclose(updates["up"]["B"], alone["B"], rtol=1e-6)
    np.testing.assert_array_equal(updates["up"]["balance_bias"], [-0.25, 0.25, 0, 0])


def test_beside_others_in_a_partition_and_where_there_is_no_bias() -> None:
    labels = {"up": {"B": "fly", "balance_bias": "fly"}, "norm": "rest"}
    tx = optax.partition({"fly": flylora_balance(optax.sgd(1.0)), "rest": optax.sgd(2.0)}, labels)
    tree = {"up": {"B": jnp.ones(2), "balance_bias": jnp.array([1.0, -1.0])}, "norm": jnp.ones(1)}
    updates, _ = jax.jit(tx.update)(tree, tx.init(tree))
    np.testing.assert_allclose(updates["up"]["balance_bias"], [-1e-3, 1e-3])
    np.testing.assert_array_equal(updates["norm"], [-2.0])
    with pytest.raises(ValueError, match="no parameter is named 'balance_bias': attach FlyLoRA"):
        flylora_balance(optax.sgd(1.0)).init({"up": {"B": jnp.ones(2)}})


def test_unusable_arguments_are_refused() -> None:
    for step in (-1e-3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"step=.* must be finite and not negative"):
            flylora_balance(optax.sgd(1.0), step)


@nnx.jit
def train_step(model, optimizer, x):
    with_gradient = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, trainable))
    loss, grads = with_gradient(model, x)
    optimizer.update(model, grads)
    return loss


@pytest.mark.slow
def test_training_a_rematerialised_stack_moves_b_and_biases_and_never_the_projection() -> None:
    model = Scanned(2, nnx.Rngs(0), remat=True)
    lro.adapters.attach(model, lro.adapters.FlyLoRA(rank=4, active=1), rngs=0)
    arrays = model.blocks.up.adapters["default"].arrays
    a, b = (np.asarray(arrays[name][...]) for name in "AB")
    optimizer = nnx.Optimizer(model, flylora_balance(optax.adam(0.05), 2**-10), wrt=trainable)
    losses = [float(train_step(model, optimizer, tokens())) for _ in range(6)]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(arrays["A"][...], a)
    assert np.all(np.any(arrays["B"][...] != b, axis=(1, 2)))
    bias = np.asarray(arrays["balance_bias"][...])
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias % 2**-10, 0)  # steps of one size
    assert np.all(np.any(bias != 0, axis=1))
