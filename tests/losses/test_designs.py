"""What the designs compute, save and refuse."""

from functools import partial
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.compat.jax import ClosedJaxpr, Jaxpr, jaxpr_of, parameters, primitive_name
from lowrank_optax.losses.linear_head.plain import plain_token_sums
from lowrank_optax.losses.linear_head.recompute import token_sums
from lowrank_optax.losses.linear_head.tiles import Head, Operands, TokenSums, Words
from tests.losses.numpy_loss import numpy_loss

loss_of = lro.losses.linear_cross_entropy
DESIGNS = ["recompute", "forward"]
TOKENS, WIDTH, WORDS = 5, 3, 7


@pytest.fixture(scope="module")
def core() -> tuple[Operands, Words, TokenSums]:
    """Two pairs, a bias, two words that do not count, and cotangents."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    hidden = normal(TOKENS, WIDTH), normal(TOKENS, 2)
    operands = Operands(hidden, (normal(WORDS, WIDTH), normal(2, WORDS)), normal(WORDS))
    words = Words(jnp.array([0, 3, 4, -1, 2]), jnp.array(5))
    return operands, words, TokenSums(*(normal(TOKENS) for _ in range(4)))


def gradients(function: Any, head: Head, core: Any) -> Any:
    """Of the sums, weighted with the cotangents."""
    operands, words, cotangents = core

    @jax.jit
    def run(operands):
        sums, pull = jax.vjp(lambda operands: function(head, operands, words), operands)
        return sums, pull(cotangents)

    return run(operands)


FACTS = {"axes": (1, 0), "soft_cap": 2.0, "wants_sum": True, "wants_expected": True}


@pytest.fixture(scope="module")
def plain(core) -> Any:
    return gradients(plain_token_sums, Head(**FACTS), core)


@pytest.mark.parametrize(
    ("words", "tokens"), [(1, 2), (3, TOKENS), (WORDS, 3), (WORDS + 1, TOKENS)]
)
def test_sums_in_chunks_of_any_size_have_the_gradients_of_the_whole(core, plain, words, tokens):
    head = Head(**FACTS, words=words, tokens=tokens)
    assert_close(gradients(token_sums, head, core), plain, 64)


def test_a_chunk_whose_words_all_have_a_bias_of_minus_infinity_counts_nothing(core):
    operands, _, cotangents = core
    operands = operands._replace(bias=operands.bias.at[:4].set(-jnp.inf))
    words = Words(jnp.array([4, 5, 6, -1, 4]), None)
    given = operands, words, cotangents._replace(logit_sum=None, expected_logit=None)
    expected = gradients(plain_token_sums, Head((1, 0)), given)
    assert_close(gradients(token_sums, Head((1, 0), words=3, tokens=2), given), expected, 64)


@pytest.mark.parametrize(
    ("bias", "options"),
    [(np.full(7, -200.0), {"valid_vocabulary": 5}), (np.repeat([0.0, -np.inf], [5, 2]), {})],
    ids=["logits below -88 beside words that do not count", "words with a bias of -inf"],
)
@pytest.mark.parametrize("chunk_bytes", ["off", 100])
def test_words_that_add_nothing_to_an_entropy_leave_it_finite(bias, options, chunk_bytes):
    rng = np.random.default_rng(4)
    hidden, head, labels = rng.normal(size=(6, 3)), rng.normal(size=(3, 7)), np.arange(6) % 5

    def function(hidden, bias, head, **options):
        loss, values = loss_of(
            hidden, head, labels, bias=bias, return_values=True, chunk_bytes=chunk_bytes, **options
        )
        return loss + values.entropy.sum()

    run = lambda *given, **options: jax.jit(
        jax.value_and_grad(lambda *x: function(*x, given[2], **options), (0, 1))
    )(*given[:2])
    value, (dh, db) = run(hidden, bias, head, **options)
    expected, (dh_of_5, db_of_5) = run(hidden, bias[:5], head[:, :5])
    assert_close((value, dh, db), (expected, dh_of_5, np.pad(db_of_5, (0, 2))), 400, size=1.0)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_loss_scale_reaches_gradients_before_they_are_rounded_to_float16(design):
    """Shares of 1e-7 are below the normal numbers of float16, and times 2^15 they are not."""
    rng = np.random.default_rng(9)
    hidden, head = (rng.normal(size=shape).astype(np.float16) for shape in ((6, 3), (3, 5)))
    labels, weights = np.arange(6) % 5, np.full(6, 1e-7, np.float32)
    function = lambda h, w: (
        2.0**15 * loss_of(h, w, labels, weights=weights, design=design, reduction="sum")
    )
    found = jax.jit(jax.grad(function, (0, 1)))(hidden, head)
    _, *expected, _ = numpy_loss(hidden, head, labels)
    assert_close(found, tuple(2.0**15 * 6e-7 * x for x in expected), 4, dtype=jnp.float16)


def test_gradients_of_bfloat16_hidden_states_wait_for_the_backward_pass_in_bfloat16():
    hidden, head = jnp.ones((256, 4), jnp.bfloat16), jnp.ones((4, 1500), jnp.bfloat16)
    function = lambda h: loss_of(h, head, jnp.zeros(256, int), design="forward", chunk_bytes=1)
    saved = jax.make_jaxpr(lambda h: jax.vjp(function, h)[1])(hidden).out_avals
    assert "float32" not in {str(x.dtype) for x in saved if x.shape == hidden.shape}


def test_gradients_of_logits_add_up_to_the_cotangents(core):
    """A shift of all logits changes lse, the label's logit and the sum by known amounts."""
    operands, words, cotangents = core
    head = Head((1, 0), wants_sum=True, wants_expected=False, words=3, tokens=2)
    wanted = cotangents._replace(expected_logit=None)
    function = lambda b: token_sums(head, operands._replace(bias=b), words)
    by_bias = jax.jit(lambda b: jax.vjp(function, b)[1](wanted)[0])(operands.bias)
    has_label = np.asarray(words.labels) >= 0
    shares = wanted.label_logit * has_label + wanted.lse + 5 * wanted.logit_sum
    assert_close(by_bias.sum(), shares.sum(), 32, size=np.abs(shares).sum())


def test_a_constant_on_all_logits_moves_lse_alone():
    rng = np.random.default_rng(1)
    hidden, head, labels = rng.normal(size=(6, 3)), rng.normal(size=(3, 9)), np.arange(6)

    @jax.jit
    def run(shift):
        function = lambda h: loss_of(h, head, labels, bias=jnp.full(9, shift), return_values=True)
        return jax.value_and_grad(function, has_aux=True)(jnp.asarray(hidden, jnp.float32))

    (loss, values), dh = run(0.0)
    (shifted, others), dh_shifted = run(5.0)
    assert_close((shifted, dh_shifted), (loss, dh), 64, size=5.0)
    assert_close(others.lse, values.lse + 5, 8)


@pytest.mark.parametrize("design", DESIGNS)
def test_huge_logits_stay_finite(design):
    hidden = jnp.array([[1e2], [-1e2]])
    head = jnp.array([[1e2, -1e2, 0.0]])
    function = lambda h, w: loss_of(h, w, np.array([1, 1]), design=design)
    value, (dh, dw) = jax.jit(jax.value_and_grad(function, (0, 1)))(hidden, head)
    assert_close(
        (value, dh, dw), (1e4, jnp.array([[100.0], [0.0]]), jnp.array([[50.0, -50, 0]])), 8
    )


@pytest.mark.parametrize("design", DESIGNS)
def test_an_ignored_token_may_be_nan(design):
    rng = np.random.default_rng(3)
    hidden, head = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(3, 5))
    labels = np.array([1, -100, 4, -100])
    broken = hidden.copy()
    broken[1] = np.nan
    function = lambda h, w: loss_of(h, w, labels, design=design, return_values=False)
    value, gradients = jax.jit(jax.value_and_grad(function, (0, 1)))(broken, head)
    loss, dh, dw, _ = numpy_loss(hidden, head, labels)
    assert_close((value, gradients), (np.float64(loss), (dh, dw)), 32)


def made_shapes(program: Jaxpr | ClosedJaxpr) -> set[tuple[tuple[int, ...], Any, str]]:
    """Shape, dtype and operation of everything that a program makes, in its loops too."""
    found = set()
    for equation in jaxpr_of(program).eqns:
        for x in equation.outvars:
            aval: Any = x.aval
            found.add((aval.shape, str(aval.dtype), primitive_name(equation)))
        for inner in jax.tree.leaves(
            list(parameters(equation).values()),
            is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr),
        ):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                found |= made_shapes(inner)
    return found


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("lora", [False, True])
def test_nothing_of_a_frozen_head_s_size_is_made(design, lora):
    hidden, head = jnp.ones((256, 4), jnp.bfloat16), jnp.ones((4, 1500), jnp.bfloat16)
    labels = jnp.zeros(256, jnp.int32)
    a, b = jnp.ones((4, 2)), jnp.ones((2, 1500))

    def loss(trained, head):
        hidden, pair = trained
        pair = (*pair, 1.0) if pair else None
        return loss_of(hidden, head, labels, lora=pair, design=design, chunk_bytes=6 * 256 * 512)

    run = lambda of: jax.make_jaxpr(jax.grad(loss, of))((hidden, (a, b) if lora else ()), head)
    shapes = lambda of: {shape for shape, _, _ in made_shapes(run(of))}
    assert head.shape not in shapes(0)
    assert head.shape in shapes(1)
    assert (256, 1500) not in shapes((0, 1))


@pytest.mark.parametrize("design", DESIGNS)
def test_products_of_bfloat16_have_bfloat16_operands(design):
    hidden, head = jnp.ones((256, 4), jnp.bfloat16), jnp.ones((4, 1500), jnp.bfloat16)
    function = lambda h, w: loss_of(h, w, jnp.zeros(256, jnp.int32), design=design, chunk_bytes=1)
    text = jax.jit(jax.grad(function, (0, 1))).lower(hidden, head).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) >= 3
    assert all("bf16" in line.split("->")[0].rsplit(":", 1)[1] for line in products)
    assert not any("f32" in line.split("->")[0].rsplit(":", 1)[1] for line in products)


def test_a_gradient_born_projected_is_the_projection_of_the_head_s_gradient():
    rng = np.random.default_rng(5)
    hidden, head = rng.normal(size=(9, 4)), rng.normal(size=(4, 12))
    labels, basis = rng.integers(0, 12, 9), np.linalg.qr(rng.normal(size=(4, 2)))[0]
    slot = jnp.zeros((2, 12))
    function = lambda slot: loss_of(hidden, head, labels, lora=(basis, slot, 1))
    _, _, dw, _ = numpy_loss(hidden, head, labels)
    assert_close(jax.jit(jax.grad(function))(slot), basis.T @ dw, 32)


def test_designs_are_used_as_planned():
    """Products by the tokens' logits: two and one more for each gradient when recomputed."""
    hidden, head = jnp.ones((4, 3)), jnp.ones((3, 8))
    labels = jnp.zeros(4, jnp.int32)

    def products(of: Any, **options: Any) -> int:
        function = partial(loss_of, labels=labels, **options)
        program = jax.make_jaxpr(jax.grad(lambda h, w: function(h, w), of))(hidden, head)
        return str(program).count("dot_general")

    assert products((0, 1), design="recompute") == 4
    assert products((0, 1), design="forward") == 3
    assert products(0, design="recompute") == 3
    assert products(0, design="forward") == products(1, design="forward") == 2
    assert products((0, 1)) == 3
    assert products((0, 1), chunk_bytes="off") == 3
    assert str(jax.make_jaxpr(lambda h: loss_of(h, head, labels))(hidden)).count("dot_general") == 1
    bf16 = lambda **o: lro.losses.chunk_plan(
        jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16),
        jax.ShapeDtypeStruct((2048, 32_000), jnp.bfloat16),
        **o,
    )
    assert bf16().design == "recompute"
    assert bf16(chunk_bytes=2**30).design == "forward"
    assert bf16(head_trained=False, chunk_bytes=2**25).design == "forward"
    assert bf16(one_factor=False, chunk_bytes=2**30).design == "recompute"
    assert bf16(chunk_bytes="off").design == "plain"
    assert bf16(chunk_bytes=2**20, design="recompute")[1:3] == (2048, 128)


def test_one_compiled_function_may_be_differentiated_by_different_arguments():
    rng = np.random.default_rng(6)
    hidden, head, labels = rng.normal(size=(4, 3)), rng.normal(size=(3, 5)), np.arange(4)
    jitted = jax.jit(lambda h, w: loss_of(h, w, labels))
    expected = numpy_loss(hidden, head, labels)[1:3]
    assert_close(jax.grad(jitted)(hidden, head), expected[0], 32)
    assert_close(jax.grad(jitted, 1)(hidden, head), expected[1], 32)
    assert_close(jax.grad(jax.checkpoint(jitted), (0, 1))(hidden, head), expected, 32)


def test_a_batch_of_heads_by_vmap():
    rng = np.random.default_rng(7)
    hidden, heads, labels = rng.normal(size=(4, 3)), rng.normal(size=(2, 3, 5)), np.arange(4)
    function = jax.value_and_grad(lambda w: loss_of(hidden, w, labels, design="recompute"))
    losses, found = jax.jit(jax.vmap(function))(heads)
    each = [numpy_loss(hidden, head, labels) for head in heads]
    assert_close(losses, np.array([loss for loss, *_ in each]), 16)
    assert_close(found, np.array([dw for _, _, dw, _ in each]), 32)


@pytest.mark.parametrize(
    ("labels", "weights"),
    [(np.zeros(0, np.int32), None), (np.full(3, -100), None), (np.arange(3), [1.0, 2.0, -3.0])],
)
def test_where_weights_add_up_to_zero_the_mean_and_its_gradients_are_zero(labels, weights):
    hidden = jnp.arange(2.0 * len(labels)).reshape(-1, 2)
    head = jnp.arange(8.0).reshape(2, 4)
    weights = None if weights is None else jnp.array(weights)
    function = lambda h, w: loss_of(h, w, labels, weights=weights)
    value, gradients = jax.jit(jax.value_and_grad(function, (0, 1)))(hidden, head)
    for x in (value, *gradients):
        np.testing.assert_array_equal(x, 0)


def test_labels_out_of_range_are_refused_or_nan():
    hidden, head = jnp.ones((3, 2)), jnp.ones((2, 4))
    function = lambda h, labels: loss_of(h, head, labels, reduction="none").sum()
    gradients = jax.jit(jax.value_and_grad(function))
    for wrong in (4, -1):
        labels = np.array([0, wrong, -100])
        with pytest.raises(ValueError, match=rf"label {wrong} is out of range: .* 0 to 3"):
            jax.jit(lambda h: loss_of(h, head, labels))(hidden)  # noqa: B023
        value, gradient = gradients(hidden, labels)
        assert np.isnan(value)
        assert np.isnan(gradient).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(gradients(hidden, np.array([0, 3, 2], np.uint16))[0])
    with pytest.raises(ValueError, match=r"label 3 is out of range: .* 0 to 2"):
        loss_of(hidden, head, np.array([0, 3, 2]), valid_vocabulary=3)


HIDDEN, HEAD, LABELS = np.ones((3, 2)), np.ones((2, 4)), np.zeros(3, np.int32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"design": "chunked"}, "design='chunked' must be one of 'auto', 'recompute', 'forward'"),
        ({"reduction": "max"}, "reduction='max' must be one of"),
        ({"head_axis": 1}, r"head \(2, 4\) must have 2 features, .* head_axis=1"),
        ({"head_axis": -1}, "head_axis=-1 must be 0"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5 must be a number from 0 to 1"),
        ({"z_loss": -1.0}, "z_loss=-1.0 must be a finite number"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be a positive number"),
        ({"chunk_bytes": 0}, "chunk_bytes=0 must be a positive number"),
        ({"chunk_bytes": "off", "design": "forward"}, "chunk_bytes='off' is the plain loss"),
        ({"bias": np.ones(3)}, r"bias \(3,\) must be \(4,\)"),
        ({"lora": (np.ones((2, 1)), np.ones((1, 3)), 1)}, "lora must be A"),
        ({"weights": np.ones(2)}, r"weights \(2,\) must have the labels' shape \(3,\)"),
        ({"valid_vocabulary": 5}, "valid_vocabulary=5 must be from 1 to 4"),
        ({"valid_vocabulary": 2.5}, "valid_vocabulary=2.5 must be an integer or None"),
        ({"ignore_label": 0.5}, "ignore_label=0.5 must be an integer or None"),
        ({"reduction": "none", "token_axis_name": "data"}, "leave token_axis_name out"),
        ({"design": "forward", "return_values": True}, "take design='recompute'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loss_of(HIDDEN, HEAD, LABELS, **options)


def test_bad_arrays_are_refused():
    with pytest.raises(TypeError, match="hidden must be floating point, got int32"):
        loss_of(LABELS.reshape(3, 1), HEAD[:1], LABELS)
    with pytest.raises(TypeError, match="head must be floating point, got int8"):
        loss_of(HIDDEN, HEAD.astype(np.int8), LABELS)
    with pytest.raises(TypeError, match="B of lora must be floating point, got int32"):
        loss_of(HIDDEN, HEAD, LABELS, lora=(HIDDEN.T, np.ones((3, 4), np.int32), 1))
    with pytest.raises(TypeError, match="labels must be integers, got float32"):
        loss_of(HIDDEN, HEAD, LABELS.astype(np.float32))
    with pytest.raises(ValueError, match=r"labels \(2,\) must have the shape of hidden \(3, 2\)"):
        loss_of(HIDDEN, HEAD, LABELS[:2])
    none = partial(loss_of, labels=LABELS, reduction="none", design="forward")
    with pytest.raises(ValueError, match="reduction='none' has no gradient by a head"):
        jax.vjp(lambda w: none(HIDDEN, w), HEAD)


def test_a_plan_refuses_what_the_loss_refuses():
    with pytest.raises(ValueError, match=r"head \(4, 2\) must have 2 features"):
        lro.losses.chunk_plan(HIDDEN, HEAD.T)
    with pytest.raises(ValueError, match="design='forward' needs one_factor=True"):
        lro.losses.chunk_plan(HIDDEN, HEAD, design="forward", one_factor=False)


@pytest.mark.parametrize("design", DESIGNS)
def test_what_is_allocated_is_a_chunk_and_the_gradient_of_the_hidden_states(design):
    of = jax.ShapeDtypeStruct
    hidden, head = of((1024, 128), jnp.float32), of((128, 8192), jnp.float32)
    function = lambda h, w, y: loss_of(h, w, y, design=design, chunk_bytes=2**22)
    step = jax.jit(jax.value_and_grad(function, (0, 1)))
    compiled = step.lower(hidden, head, of((1024,), jnp.int32)).compile()
    plan = lro.losses.chunk_plan(hidden, head, design=design, chunk_bytes=2**22)
    allocated = compiled.memory_analysis().temp_size_in_bytes
    assert plan.temporary_bytes / 2 < allocated < 1.1 * (plan.temporary_bytes + 4 * 1024 * 128)
