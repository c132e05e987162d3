"""FlyLoRA: a frozen sparse projection that routes tokens to ranks."""

import functools
import warnings

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.methods.flylora import are_largest
from lowrank_optax.adapters.operands import Lookup, Rows
from tests.adapters.compiled import compiled, gradient, layer_output

FlyLoRA = compiled(lro.adapters.FlyLoRA)
RNG = np.random.default_rng(0)
LAYERS, D_IN, D_OUT, TOKENS = 3, 20, 5, 7
WEIGHTS = RNG.normal(size=(LAYERS, D_IN, D_OUT)).astype(np.float32)
X = RNG.normal(size=(TOKENS, D_IN)).astype(np.float32)
SCORES = {
    "magnitude": lambda u, d: np.abs(u) + d,
    "signed": lambda u, d: u + d,
    "biased_magnitude": lambda u, d: np.abs(u + d),
}
NO_BALANCE = "ignore:score='biased_magnitude' cannot be balanced:UserWarning"


def drawn(method, weights=WEIGHTS):
    """Arrays of layers with random ``B`` and bias."""
    params = method.init(jax.random.key(0), weights)
    rng = np.random.default_rng(1)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
    trainable = jax.tree.map(draw, params.trainable)
    trainable["balance_bias"] *= 0.02  # of the size of u
    return params._replace(trainable=trainable)


def chosen(score, k):
    """The mask of the k largest by sorting, the lower index first where they are equal."""
    order = np.argsort(-score, axis=-1, kind="stable")[..., :k]
    return np.any(order[..., None] == np.arange(score.shape[-1]), axis=-2)


def double(p, *names):
    return (np.asarray(p[name], np.float64) for name in names)


@pytest.mark.filterwarnings(NO_BALANCE)
@pytest.mark.combinations(1)
@pytest.mark.parametrize("rank", [6, (6, 2, 4)])
@pytest.mark.parametrize("score", SCORES)
def test_output_and_gradients_are_those_of_the_definition(score, rank):
    method = FlyLoRA(rank=rank, active=2, alpha=3, score=score, std=0.4)
    params, g = drawn(method), RNG.normal(size=(TOKENS, D_OUT)).astype(np.float32)
    for layer in range(LAYERS):
        p, w = method.layer_arrays(params, layer), WEIGHTS[layer]
        own = rank if isinstance(rank, int) else rank[layer]
        a, b, d = double(p, "A", "B", "balance_bias")
        assert not a[:, own:].any()
        a, b, d = a[:, :own], b[:own], d[:own]
        u, scale = X @ a, 3 / own
        mask = chosen(SCORES[score](u, d), 2)
        y = layer_output(method, p, Rows(X), X @ w, weight=w)
        assert_close(y, X @ w + scale * (mask * u) @ b, 200)

        def loss(t, x, p=p, w=w):
            return jnp.sum(g * layer_output(method, p | t, Rows(x), x @ w, weight=w))

        trained = {name: p[name] for name in params.trainable}
        slopes, of_x = gradient(loss, trained, X, argnums=(0, 1))
        assert_close(slopes["B"][:own], scale * (mask * u).T @ g, 200)
        assert not slopes["B"][own:].any()
        assert_close(of_x, g @ w.T + scale * (mask * (g @ b.T)) @ a.T, 200)
        # What is said of the bias: the share of tokens that use a rank, less the mean.
        assert_close(slopes["balance_bias"][:own], mask.mean(0) - 2 / own, 8, size=1)
        assert not slopes["balance_bias"][own:].any()


def test_it_starts_at_the_layer_bit_for_bit_and_b_moves_in_the_first_step():
    method = FlyLoRA(rank=6, active=2)
    p = method.layer_arrays(method.init(jax.random.key(0), WEIGHTS), 0)
    y = X @ WEIGHTS[0]
    out = lambda b: layer_output(method, p | {"B": b}, Rows(X), y, weight=WEIGHTS[0])
    np.testing.assert_array_equal(out(p["B"]), y)
    assert gradient(lambda b: out(b).sum(), p["B"]).any()


def test_rows_of_ranks_that_no_token_uses_get_no_gradient():
    method = FlyLoRA(rank=16, active=3)
    p = method.layer_arrays(drawn(method), 0)

    def rows(x):
        loss = lambda b: layer_output(
            method, p | {"B": b}, Rows(x), np.zeros((len(x), D_OUT), np.float32), weight=WEIGHTS[0]
        ).sum()
        return np.any(gradient(loss, p["B"]) != 0, axis=-1)

    assert rows(X[:1]).sum() == 3
    used = np.asarray(method.used(p, X[:4] @ p["A"]))
    np.testing.assert_array_equal(used.sum(-1), 3)
    np.testing.assert_array_equal(rows(X[:4]), used.any(0))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 32, "active": 8}, 16),
        ({"rank": 6, "active": 2}, 21),  # floor(64 * 2 / 6)
        ({"rank": 16, "active": 1, "density": 0.001}, 1),
        ({"rank": 8, "active": 2, "density": 0.29}, 18),  # floor(18.56)
        ({"rank": 8, "active": 2, "density": 1.0}, 64),
    ],
)
def test_every_column_of_the_projection_has_the_same_number_of_entries(options, expected):
    a = FlyLoRA(**options).init(jax.random.key(3), np.zeros((2, 64, 3), np.float32)).frozen["A"]
    np.testing.assert_array_equal(np.count_nonzero(a, axis=1), expected)
    # Layers and columns have places of their own.
    columns = (a != 0).transpose(0, 2, 1).reshape(-1, 64)
    assert expected in (1, 64) or len(np.unique(columns, axis=0)) == len(columns)


def test_a_density_that_is_a_whole_number_but_for_rounding_is_that_number():
    method = lro.adapters.FlyLoRA(rank=8, active=2, density=0.29)
    assert 100 * 0.29 < 29
    assert method.nonzeros(100, 8) == 29


def test_entries_have_the_stated_deviation_also_in_layers_of_different_ranks():
    shape = np.zeros((2, 2000, 1), np.float32)
    a = FlyLoRA(rank=(16, 4), active=2).init(jax.random.key(0), shape).frozen["A"]
    for layer, rank in enumerate((16, 4)):
        values = a[layer][a[layer] != 0]
        assert values.size == 2000 * 2  # n k / r in each of r columns
        assert abs(values.std() * rank - 1) < 5 / np.sqrt(2 * values.size)
    wide = FlyLoRA(rank=16, active=2, std=0.5).init(jax.random.key(0), shape).frozen["A"]
    assert abs(wide[wide != 0].std() - 0.5) < 0.02


def test_projections_of_two_tasks_are_nearly_orthogonal():
    """The specification's figures for n=4096, r=32, k=8: 0.0156 beside a diagonal of 1."""
    method, shape = FlyLoRA(), np.zeros((1, 4096, 1), np.float32)
    first, second = (method.init(jax.random.key(i), shape).frozen["A"][0] for i in range(2))
    across = first.T @ second
    assert abs(across.std() / (1024 / (32**2 * 64)) - 1) < 0.1
    assert abs(across.mean()) < 5 * 0.0156 / 32
    assert abs(np.diag(first.T @ first).mean() - 1) < 0.05


def test_the_same_key_gives_the_same_projection_alone_and_inside_jit():
    method, shape = lro.adapters.FlyLoRA(), jnp.zeros((2, 40, 3))
    eager = method.init(jax.random.key(5), shape).frozen["A"]
    jitted = jax.jit(method.init)(jax.random.key(5), shape).frozen["A"]
    np.testing.assert_array_equal(eager != 0, jitted != 0)
    assert_close(jitted, eager)
    assert not np.array_equal(eager != 0, method.init(jax.random.key(6), shape).frozen["A"] != 0)


def test_the_largest_are_those_of_sorting_and_ties_go_to_the_lower_index():
    score = RNG.integers(0, 4, size=(50, 32)).astype(np.float32)
    for k in (1, 8, 31):
        got = np.asarray(jax.jit(are_largest, static_argnums=1)(score, k))
        np.testing.assert_array_equal(got.sum(-1), k)
        np.testing.assert_array_equal(got, chosen(score, k))


@pytest.mark.filterwarnings(NO_BALANCE)
@pytest.mark.parametrize("score", SCORES)
def test_the_same_bias_for_all_ranks_changes_nothing_but_where_it_is_inside_the_magnitude(score):
    method = lro.adapters.FlyLoRA(rank=8, active=3, score=score)
    u = RNG.normal(size=(200, 8)).astype(np.float32)
    zero, same = (method.used({"balance_bias": jnp.full(8, c)}, u) for c in (0.0, 0.5))
    assert np.array_equal(zero, same) == (score != "biased_magnitude")
    for_one = method.used({"balance_bias": jnp.zeros(8).at[2].set(9.0)}, u)
    assert np.all(for_one[:, 2])
    assert not np.array_equal(for_one, zero)


def test_with_all_ranks_active_it_is_lora_with_a_frozen_projection():
    method = FlyLoRA(rank=4, active=4, alpha=6)
    params = method.init(jax.random.key(0), WEIGHTS)
    assert set(params.trainable) == {"B"}
    assert np.all(params.frozen["A"] != 0)
    b = RNG.normal(size=params.trainable["B"].shape).astype(np.float32)
    p = method.layer_arrays(params._replace(trainable={"B": b}), 1)
    plain = compiled(lro.adapters.LoRAFA)(rank=4, alpha=6)
    options = {"weight": WEIGHTS[1]}
    y = layer_output(method, p, Rows(X), X @ WEIGHTS[1], **options)
    assert_close(y, layer_output(plain, p, Rows(X), X @ WEIGHTS[1], **options))
    assert_close(X @ method.merged(p, WEIGHTS[1]).weight, y, 100)
    first, second = method.to_lora(p)
    assert_close(first @ second, method.delta(p, WEIGHTS[1]), 100)
    tree, pytree = {"w": WEIGHTS[1]}, lro.adapters.pytree
    adapter = pytree.init(jax.random.key(0), tree, method.method).replace({"w": {"B": b[1]}})
    assert_close(
        X @ pytree.effective(tree, adapter)["w"], X @ pytree.factored(tree, adapter)["w"], 100
    )


def test_a_routed_change_has_no_matrix_and_becomes_a_lora_only_with_its_error():
    method = lro.adapters.FlyLoRA(rank=8, active=2, alpha=4)
    p = method.layer_arrays(drawn(method), 0)
    for function in (method.delta, method.merged, method.unmerged):
        with pytest.raises(TypeError, match="FlyLoRA depends on the layer's input: no matrix"):
            function(p, WEIGHTS[0])
    with pytest.raises(TypeError, match="routes each token to 2 ranks, which no LoRA does"):
        method.to_lora(p)
    first, second, error = method.unrouted_lora(p, X)
    a, b, d = double(p, "A", "B", "balance_bias")
    assert_close(first @ second, 0.5 * a @ b, 100)
    u = X @ a
    routed = (chosen(np.abs(u) + d, 2) * u) @ b
    assert_close(error, np.linalg.norm(u @ b - routed) / np.linalg.norm(routed), 200)
    assert 0.1 < error < 10
    untrained = method.init(jax.random.key(0), WEIGHTS)
    assert method.unrouted_lora(method.layer_arrays(untrained, 0), X).relative_error == 0
    with pytest.raises(ValueError, match=r"x of shape \(7, 19\) must be \[..., 20\]"):
        method.unrouted_lora(p, X[:, 1:])


def test_unrouted_changes_of_tasks_are_averaged_and_added_exactly():
    method = lro.adapters.FlyLoRA(rank=8, active=2)
    a = [method.init(jax.random.key(i), WEIGHTS[:1]).frozen["A"][0] for i in range(3)]
    b = RNG.normal(size=(3, 8, D_OUT)).astype(np.float32)
    bias = np.zeros(8, np.float32)

    def change(a, b):
        first, second, _ = method.unrouted_lora({"A": a, "B": b, "balance_bias": bias}, X)
        return first @ second

    # Tasks that share A: the mean of B is the mean of the changes.
    mean = np.mean([change(a[0], each) for each in b], axis=0)
    assert_close(change(a[0], b.mean(0)), mean, 100)
    # Tasks with their own A: ranks side by side are the sum.
    total = sum(change(*each) for each in zip(a, b, strict=True))
    joined = 2 * np.concatenate(a, axis=1) @ np.concatenate(b)
    assert_close(joined, total, 100)


def test_half_precision_routes_as_float32_does():
    """Of scores in bfloat16 many are equal, and others change places."""
    method = FlyLoRA(rank=32, active=8)
    p = method.layer_arrays(drawn(method), 0)
    x = jnp.asarray(RNG.normal(size=(400, D_IN)), jnp.bfloat16)
    p["A"] = np.asarray(jnp.asarray(p["A"], jnp.bfloat16), np.float32)
    exact = np.asarray(x, np.float32) @ p["A"]
    d = p["balance_bias"]
    mask = chosen(np.abs(exact) + d, 8)
    y = np.zeros((400, D_OUT), jnp.bfloat16)
    out = layer_output(method, p, Rows(x), y, weight=WEIGHTS[0])
    assert out.dtype == jnp.bfloat16
    expected = 2 * (mask * exact) @ p["B"]
    size = 2 * (mask * np.abs(exact)) @ np.abs(p["B"])
    assert_close(out, expected, 4, size=size, dtype=jnp.bfloat16)
    rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float32)
    assert (chosen(np.abs(rounded) + d, 8) != mask).any()
    method = FlyLoRA(rank=4, active=2, param_dtype=jnp.bfloat16)
    params = method.init(jax.random.key(0), WEIGHTS)
    dtypes = {name: x.dtype for name, x in (params.trainable | params.frozen).items()}
    assert dtypes == {"A": jnp.bfloat16, "B": jnp.bfloat16, "balance_bias": jnp.float32}


def test_experts_and_rows_of_a_table_are_routed_each_by_its_own():
    method = FlyLoRA(rank=6, active=2)
    params = drawn(method)
    stack = method.stack_arrays(params, LAYERS)
    x = RNG.normal(size=(LAYERS, TOKENS, D_IN)).astype(np.float32)
    y = np.zeros((LAYERS, TOKENS, D_OUT), np.float32)
    out = layer_output(method, stack, Rows(x), y, weight=WEIGHTS)
    loss = lambda d: layer_output(
        method, stack | {"balance_bias": d}, Rows(x), y, weight=WEIGHTS
    ).sum()
    slots = gradient(loss, stack["balance_bias"])
    for expert in range(LAYERS):
        p = method.layer_arrays(params, expert)
        alone = layer_output(method, p, Rows(x[expert]), y[expert], weight=WEIGHTS[expert])
        assert_close(out[expert], alone, 100)
        used = np.asarray(method.used(p, x[expert] @ p["A"]))
        # Tokens are counted over all experts.
        assert_close(slots[expert], (used.mean(0) - 1 / 3) / LAYERS, 8, size=1)
    p, index = method.layer_arrays(params, 0), np.array([[3, 0], [19, 3]])
    zeros, one_hot = (lambda *n: np.zeros((*n, D_OUT), np.float32)), np.eye(D_IN, dtype=np.float32)
    lookup = Lookup(index, jnp.dtype(jnp.float32))
    rows = layer_output(method, p, lookup, zeros(2, 2), weight=WEIGHTS[0])
    products = layer_output(method, p, Rows(one_hot), zeros(D_IN), weight=WEIGHTS[0])
    assert_close(rows, products[index])


def test_the_backward_pass_keeps_of_each_token_its_ranks_and_a_mask():
    from jax._src.ad_checkpoint import saved_residuals

    method, weight = lro.adapters.FlyLoRA(rank=8, active=2), jnp.ones((64, 48))
    p = method.layer_arrays(method.init(jax.random.key(0), weight[None]), 0)
    trained, x = {k: p[k] for k in ("B", "balance_bias")}, jnp.ones((100, 64))

    def out(trained, x):
        return method.branch(p | trained, Rows(x), y=jnp.zeros((100, 48)), weight=weight)

    found = [aval for aval, of in saved_residuals(out, trained, x) if "broadcast_in_dim" not in of]
    kept = sorted((aval.shape, str(aval.dtype)) for aval in found if aval.shape[:1] == (100,))
    assert kept == [
        ((100, 8), "bool"),
        ((100, 8), "float32"),
    ]


def test_a_scanned_stack_routes_and_counts_as_its_layers_do_also_rematerialised():
    method = lro.adapters.FlyLoRA(rank=6, active=2)
    square = RNG.normal(size=(LAYERS, D_IN, D_IN)).astype(np.float32) / 5
    params = drawn(method, square)

    def layer(x, of_layer):
        w, p = of_layer
        y = x @ w
        return jnp.tanh(y + method.branch(p, Rows(x), y=y, weight=w)), None

    def loss(trainable, kind):
        stack = (square, trainable | params.frozen)
        if kind == "loop":
            x = X
            for i in range(LAYERS):
                x, _ = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], stack))
        else:
            x, _ = jax.lax.scan(jax.checkpoint(layer) if kind == "remat" else layer, X, stack)
        return jnp.sum(x[:4] ** 2)  # the others are padding

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, slopes = both(params.trainable, "loop")
    for kind in ("scan", "remat"):
        other, others = both(params.trainable, kind)
        assert_close(other, value, 100)
        assert_close(others["B"], slopes["B"], 200)
        assert_close(others["balance_bias"], slopes["balance_bias"], 8, size=1)
    p = method.layer_arrays(params, 0)
    used = np.asarray(method.used(p, X[:4] @ p["A"]))
    assert_close(slopes["balance_bias"][0], (used - 1 / 3).sum(0) / TOKENS, 8, size=1)


def test_options_out_of_range_are_refused():
    for options, message in (
        ({"active": 0}, "active=0 must be at least 1"),
        ({"active": 33}, "active=33 must be at most the rank, 32"),
        ({"rank": (8, 4), "active": 5}, "at most the rank, 4"),
        ({"density": 0.0}, "density=0.0 must be above 0"),
        ({"density": 1.5}, "density=1.5 must be above 0"),
        ({"alpha": float("inf")}, "alpha=inf must be finite"),
        ({"alpha": 0}, "alpha=0 must be finite and not 0"),
        ({"std": 0.0}, "std=0.0 must be finite"),
        ({"score": "loudest"}, "score='loudest' must be one of"),
        ({"rank": 0}, "rank=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            lro.adapters.FlyLoRA(**options)
    with pytest.raises(TypeError, match=r"active=8.0 must be an int"):
        lro.adapters.FlyLoRA(active=8.0)
    with pytest.warns(UserWarning, match="'biased_magnitude' cannot be balanced"):
        lro.adapters.FlyLoRA(score="biased_magnitude")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # with all ranks active there is nothing to balance
        lro.adapters.FlyLoRA(rank=8, score="biased_magnitude")


@functools.partial(jax.jit, static_argnums=0)
def fitted(method, key, target, x):
    """The adapter's output on ``x`` after 200 steps towards the change ``target``."""
    n, m = target.shape
    params = method.init(key, jnp.zeros((1, n, m)))
    tx = optax.adam(optax.linear_schedule(0.02, 0, 200))
    if "balance_bias" in params.trainable:
        tx = lro.adapters.flylora_balance(tx, step=0.0)

    def out(trained, x):
        p = method.layer_arrays(params._replace(trainable=trained), 0)
        return method.branch(p, Rows(x), y=jnp.zeros((len(x), m)), weight=target)

    def step(carry, number):
        trained, state = carry
        x = jax.random.normal(jax.random.fold_in(key, number), (128, n))
        loss = lambda t: jnp.mean(jnp.square(out(t, x) - x @ target))
        updates, state = tx.update(jax.grad(loss)(trained), state)
        return (optax.apply_updates(trained, updates), state), None

    start = params.trainable, tx.init(params.trainable)
    return out(jax.lax.scan(step, start, jnp.arange(200))[0][0], x)


@pytest.mark.full
def test_the_sum_of_adapters_of_tasks_that_share_a_direction_harms_each_less():
    """The specification's miniature: LoRA counts the shared direction twice."""
    keys = jax.random.split(jax.random.key(0), 6)

    def low_rank(key):
        u, v = jax.random.split(key)
        return jax.random.normal(u, (128, 4)) @ jax.random.normal(v, (4, 32)) / np.sqrt(4 * 128)

    targets = [low_rank(keys[0]) + 0.3 * low_rank(key) for key in keys[1:3]]
    x = jax.random.normal(keys[5], (1024, 128))
    rise = {}
    for method in (lro.adapters.LoRA(rank=8, alpha=16), lro.adapters.FlyLoRA()):
        outs = [fitted(method, key, d, x) for key, d in zip(keys[3:5], targets, strict=True)]
        error = lambda out, d: float(jnp.sum((out - x @ d) ** 2) / jnp.sum((x @ d) ** 2))
        alone = [error(out, d) for out, d in zip(outs, targets, strict=True)]
        merged = [error(sum(outs), d) for d in targets]
        rise[type(method).__name__] = (max(alone), max(merged))
    assert rise["LoRA"][0] < 0.02
    assert rise["LoRA"][1] > 0.9
    # That a frozen projection reaches little of any change is the price.
    assert 0.7 < rise["FlyLoRA"][0] < 0.9
    assert rise["FlyLoRA"][1] < rise["FlyLoRA"][0]
