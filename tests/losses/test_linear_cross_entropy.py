"""The loss and its gradients equal those of the formulas, in both designs."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.losses.numpy_loss import numpy_loss

loss_of = lro.losses.linear_cross_entropy
DESIGNS = ["recompute", "forward"]

HIDDEN = np.array([[1.0, 2.0], [0.0, -1.0], [3.0, 1.0]])
HEAD = np.array([[1.0, 0.0, -1.0, 0.5], [0.0, 1.0, 1.0, -0.5]])
LABELS = np.array([1, 0, -100])
WEIGHTS = np.array([3.0, 1.0, 1.0])
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.01, "soft_cap": 2.0, "weights": WEIGHTS}
# Options, loss, dh[0] and dW[0, 0]: calculated by hand, to the digits printed.
WORKED = [
    ({}, 0.9084257194439946, [0.011288785506, -0.135052009760], 0.101185653241),
    (
        {"label_smoothing": 0.1},
        0.9834257194439946,
        [0.005038785506, -0.103802009760],
        0.088685653241,
    ),
    ({"z_loss": 0.01}, 0.9495969232106634, [0.011875272032, -0.116091858662], 0.106442553746),
    ({"soft_cap": 2.0}, 1.017184719167878, [0.014062591681, -0.033211527207], 0.096772959637),
    ({"weights": WEIGHTS}, 0.7530384187281097, [0.016933178259, -0.202578014639], 0.151778479861),
    (EVERYTHING, 1.0231935168691937, [0.013262639653, -0.019790281999], 0.137167075150),
]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(("options", "loss", "by_hidden", "by_head"), WORKED)
def test_worked_numbers(design, options, loss, by_hidden, by_head):
    with jax.enable_x64(True):
        function = lambda h, w: loss_of(h, w, LABELS, design=design, **options)
        value, (dh, dw) = jax.jit(jax.value_and_grad(function, (0, 1)))(HIDDEN, HEAD)
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, loss, rtol=1e-12)
    np.testing.assert_allclose(dh[0], by_hidden, atol=1e-12)
    np.testing.assert_allclose(dw[0, 0], by_head, atol=1e-12)
    np.testing.assert_array_equal(dh[2], 0)


@pytest.mark.parametrize("design", DESIGNS)
def test_worked_numbers_of_a_lora(design):
    a, b = np.ones((2, 1)), np.array([[0.5, -0.5, 0.0, 1.0]])
    with jax.enable_x64(True):
        function = lambda a, b: loss_of(
            HIDDEN[:2], HEAD, LABELS[:2], lora=(a, b, 1.0), design=design
        )
        value, (da, db) = jax.jit(jax.value_and_grad(function, (0, 1)))(a, b)
    np.testing.assert_allclose(value, 2.070378722925773, rtol=1e-12)
    np.testing.assert_allclose(da[:, 0], [0.55365769, 1.21867800], atol=1e-8)
    np.testing.assert_allclose(db[0], [0.99736938, -1.55256323, 0.05782447, 0.49736938], atol=1e-8)


TOKENS, WIDTH, WORDS, VALID = 300, 6, 1300, 1290
SMALL = 8 * TOKENS * 640  # bytes, for three chunks of words
TILES = 8 * 512 * 128  # for chunks of tokens too


def random_arguments(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    labels = rng.integers(0, VALID, TOKENS)
    labels[::7] = -1
    return {
        "hidden": normal(TOKENS, WIDTH),
        "head": normal(WIDTH, WORDS),
        "labels": labels,
        "bias": normal(WORDS),
        "a": normal(WIDTH, 2),
        "b": normal(2, WORDS),
        "weights": rng.uniform(0.1, 2, TOKENS).astype(np.float32),
    }


@pytest.fixture(scope="module")
def arguments() -> dict[str, np.ndarray]:
    return random_arguments()


@pytest.fixture(scope="module")
def expected(arguments) -> Any:
    """With every option, and a LoRA of scale 0.5."""
    given = arguments
    change = 0.5 * given["a"].astype(np.float64) @ given["b"]
    loss, dh, dw, db = numpy_loss(
        given["hidden"],
        given["head"] + change,
        given["labels"],
        bias=given["bias"],
        weights=given["weights"],
        **OPTIONS,
    )
    return loss, dh, dw, db, 0.5 * dw @ given["b"].T, 0.5 * given["a"].T.astype(np.float64) @ dw


OPTIONS: dict[str, Any] = {
    "ignore_label": -1,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "soft_cap": 3.0,
    "valid_vocabulary": VALID,
}


@pytest.mark.parametrize(
    ("design", "chunk_bytes", "head_axis"),
    [
        ("recompute", SMALL, 0),
        ("recompute", TILES, 1),
        ("forward", 1, 0),
        ("forward", None, 1),
        ("auto", "off", 0),
    ],
)
def test_every_option_at_once_equals_numpy(arguments, expected, design, chunk_bytes, head_axis):
    @jax.jit
    def gradients(hidden, head, bias, a, b):
        def loss(hidden, head, bias, a, b):
            return loss_of(
                hidden.reshape(3, 100, WIDTH),
                head,
                arguments["labels"].reshape(3, 100),
                bias=bias,
                lora=(a, b, 0.5),
                head_axis=head_axis,
                weights=arguments["weights"].reshape(3, 100),
                chunk_bytes=chunk_bytes,
                design=design,
                **OPTIONS,
            )

        return jax.value_and_grad(loss, (0, 1, 2, 3, 4))(hidden, head, bias, a, b)

    head = arguments["head"].T if head_axis else arguments["head"]
    rest = (arguments[name] for name in ("bias", "a", "b"))
    value, (dh, dw, db, da, db_) = gradients(arguments["hidden"], head, *rest)
    assert dw.shape == head.shape
    dw = np.asarray(dw).T if head_axis else dw
    assert_close((value, dh, dw, db, da, db_), tuple(map(np.asarray, expected)), 40)


def test_the_chunks_of_these_tests_are_several_and_ragged():
    plan = lambda **options: lro.losses.chunk_plan(
        jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((WIDTH, WORDS), jnp.float32),
        **options,
    )
    by_words = plan(design="recompute", chunk_bytes=SMALL)
    tiles = plan(design="recompute", chunk_bytes=TILES)
    by_tokens = plan(design="forward", chunk_bytes=1)
    assert (by_words.words, by_words.tokens) == (512, TOKENS)
    assert (tiles.words, tiles.tokens) == (WORDS, 128)
    assert (by_tokens.design, by_tokens.tokens) == ("forward", 128)


@pytest.mark.parametrize("design", DESIGNS)
def test_bfloat16_is_near_the_formulas(arguments, design):
    names = ("hidden", "head", "bias")
    given = [jnp.asarray(arguments[name], jnp.bfloat16) for name in names]
    function = lambda h, w, b: loss_of(
        h, w, arguments["labels"], bias=b, design=design, ignore_label=-1
    )
    value, gradients = jax.jit(jax.value_and_grad(function, (0, 1, 2)))(*given)
    loss, *expected = numpy_loss(
        given[0],
        given[1],
        arguments["labels"],
        bias=np.asarray(given[2], np.float64),
        ignore_label=-1,
    )
    assert value.dtype == jnp.float32
    assert {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
    assert_close(value, np.float64(loss), 4, dtype=jnp.bfloat16)
    assert_close(tuple(gradients), tuple(expected), 4, dtype=jnp.bfloat16)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_bfloat16_sum_over_many_chunks_of_tokens_is_rounded_once(design):
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(64 * 128, 4)) + 1, jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(4, 16)), jnp.bfloat16)
    labels = rng.integers(0, 2, 64 * 128)
    function = lambda w: loss_of(hidden, w, labels, design=design, chunk_bytes=1)
    _, _, expected, _ = numpy_loss(hidden, head, labels)
    assert_close(jax.jit(jax.grad(function))(head), expected, 1, dtype=jnp.bfloat16)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_traced_cotangent_scales_every_gradient(design):
    @jax.jit
    def gradients(factor):
        function = lambda h, w, s: (
            loss_of(h, w, LABELS, weights=s, design=design, reduction="sum") * (3 / factor)
        )
        return jax.grad(function, (0, 1, 2))(HIDDEN, HEAD, WEIGHTS)

    dh, dw, ds = gradients(2.0)
    _, by_hidden, by_head, _ = numpy_loss(HIDDEN, HEAD, LABELS, weights=WEIGHTS)
    total = WEIGHTS[:2].sum()
    assert_close((dh, dw), (1.5 * total * by_hidden, 1.5 * total * by_head), 32)
    losses = np.array([0.597651118012, 1.219200320876, 0])
    assert_close(ds, 1.5 * losses, 32)


@pytest.mark.parametrize("design", DESIGNS)
def test_losses_of_tokens_have_gradients_of_their_own_by_hidden_states(design):
    @jax.jit
    def gradients(hidden, cotangent):
        function = lambda h: loss_of(h, HEAD, LABELS, reduction="none", design=design)
        losses, pull = jax.vjp(function, hidden)
        return losses, *pull(cotangent)

    losses, dh = gradients(HIDDEN, np.array([3.0, 0.5, 7.0]))
    assert_close(losses, np.array([0.597651118012, 1.219200320876, 0]), 8)
    _, by_hidden, _, _ = numpy_loss(HIDDEN, HEAD, LABELS)
    assert_close(dh, 2 * by_hidden * np.array([[3.0], [0.5], [0]]), 32)


def test_values_give_the_gradients_of_direct_preference_optimization():
    """Log-probabilities summed over sequences, in a loss of their difference."""
    rng = np.random.default_rng(2)
    hidden, head = rng.normal(size=(4, 5, 3)), rng.normal(size=(3, 11))
    labels = rng.integers(0, 11, (4, 5))

    def dpo(log_probability):
        chosen, rejected = log_probability.sum(1).reshape(2, 2)
        return -jax.nn.log_sigmoid(0.1 * (chosen - rejected)).mean()

    def chunked(hidden, head):
        _, values = loss_of(hidden, head, labels, return_values=True)
        return dpo(values.log_probability) + 0.01 * values.entropy.sum(), values

    def plain(hidden, head):
        log_p = jax.nn.log_softmax(hidden @ head)
        picked = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        return dpo(picked) + 0.01 * entropy.sum(), (picked, entropy)

    with jax.enable_x64(True):
        run = lambda f: jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, head)
        ((value, values), gradients), ((other, (picked, entropy)), others) = (
            run(chunked),
            run(plain),
        )
    assert_close((value, gradients), (other, others), 100)
    assert_close((values.log_probability, values.entropy), (picked, entropy), 100)
    assert_close(values.lse, np.log(np.exp(hidden @ head).sum(-1)), 100)
