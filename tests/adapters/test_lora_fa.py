"""LoRA-FA: the frozen factor, and what its backward pass keeps."""

from flax import nnx
import jax
from jax.ad_checkpoint import print_saved_residuals
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import parameter_count
from lowrank_optax.adapters.operands import Lookup, Rows
from tests.adapters.compiled import layer_output

LoRA, LoRAFA = lro.adapters.LoRA, lro.adapters.LoRAFA
KEY = jax.random.key(0)
LAYERS, TOKENS, WIDTH, RANK = 3, 17, 24, 2


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def arrays(method, d_in=7, d_out=5, layers=1):
    """One layer's arrays, no factor of them zero."""
    params = method.init(KEY, np.zeros((layers, d_in, d_out)))
    return method.layer_arrays(params, 0) | {"B": jnp.asarray(normal(3, method.rank, d_out))}


def test_starts_as_the_base_model_with_half_the_parameters():
    weights, x = normal(0, 2, 7, 5), jnp.asarray(normal(1, 4, 7))
    method = LoRAFA(rank=3, alpha=5)
    params = method.init(KEY, weights)
    assert set(params.trainable) == {"B"}
    assert set(params.frozen) == {"A"}
    assert parameter_count(params.trainable) == 2 * 3 * 5
    y = layer_output(
        method, method.layer_arrays(params, 1), Rows(x), x @ weights[1], weight=weights[1]
    )
    np.testing.assert_array_equal(y, x @ weights[1])
    np.testing.assert_array_equal(
        params.frozen["A"], LoRA(rank=3).init(KEY, weights).trainable["A"]
    )


@pytest.mark.slow
def test_output_and_gradients_are_those_of_lora():
    w, x, g = (jnp.asarray(normal(i, *s)) for i, s in enumerate([(7, 5), (4, 7), (4, 5)]))
    p = arrays(LoRAFA(rank=3, alpha=5))

    def loss(b, x, method):
        return jnp.sum(g * layer_output(method, p | {"B": b}, Rows(x), x @ w, weight=w))

    (fa, of_fa), (plain, of_plain) = (
        jax.value_and_grad(loss, argnums=(0, 1))(p["B"], x, kind(rank=3, alpha=5))
        for kind in (LoRAFA, LoRA)
    )
    assert fa == plain
    jax.tree.map(np.testing.assert_array_equal, of_fa, of_plain)


def test_the_change_lies_in_the_columns_of_a():
    p, w = arrays(LoRAFA(rank=3, alpha=5)), jnp.zeros((7, 5))
    delta = np.asarray(LoRAFA(rank=3, alpha=5).delta(p, w), np.float64)
    a = np.asarray(p["A"], np.float64)
    outside = delta - a @ np.linalg.pinv(a) @ delta
    assert np.abs(outside).max() < 1e-6 * np.abs(delta).max()


@pytest.mark.parametrize("rank", [3, (1, 3)])
def test_a_can_have_orthonormal_columns_within_each_rank(rank):
    method = LoRAFA(rank=rank, orthonormal=True)
    a = np.asarray(method.init(KEY, np.zeros((2, 7, 5))).frozen["A"])
    ranks = rank if isinstance(rank, tuple) else (rank, rank)
    for one, r in zip(a, ranks, strict=True):
        np.testing.assert_allclose(one.T @ one, np.diag(np.arange(3) < r), atol=1e-6)


def test_more_orthonormal_columns_than_rows_are_refused():
    with pytest.raises(ValueError, match="4 inputs have no 8 orthonormal directions"):
        LoRAFA(rank=8, orthonormal=True).init(KEY, np.zeros((1, 4, 5)))


def test_of_an_embedding_the_trained_factor_is_the_zero_one():
    table, index = normal(0, 1, 30, 6), jnp.array([[3, 7]])
    method = LoRAFA(rank=2)
    params = method.init(KEY, table, embedding=True)
    assert not params.trainable["B"].any()
    p = method.layer_arrays(params, 0)
    look = lambda b: layer_output(
        method, p | {"B": b}, Lookup(index), table[0][index], weight=jnp.asarray(table[0])
    )
    np.testing.assert_array_equal(look(p["B"]), table[0][index])
    assert jax.grad(lambda b: look(b).sum())(p["B"]).all()


def scanned(method, w, params):
    """The loss of a scanned stack of adapted linear layers, of trained arrays and input."""

    def loss(trainable, x):
        def layer(x, of_layer):
            w, p = of_layer
            return layer_output(method, p, Rows(x), x @ w, weight=w), None

        return jnp.sum(jax.lax.scan(layer, x, (w, trainable | params.frozen))[0])

    return loss


@pytest.mark.parametrize(("method", "keeps_input"), [(LoRAFA, False), (LoRA, True)])
def test_a_scanned_stack_keeps_as_many_numbers_of_a_token_as_the_rank(method, keeps_input):
    w, x = jnp.asarray(normal(0, LAYERS, WIDTH, WIDTH)), jnp.asarray(normal(1, TOKENS, WIDTH))
    method = method(rank=RANK)
    params = method.init(KEY, w)
    _, backward = jax.vjp(scanned(method, w, params), params.trainable, x)
    kept = {r.shape for r in jax.tree.leaves(backward)}
    assert (LAYERS, TOKENS, RANK) in kept
    assert ((LAYERS, TOKENS, WIDTH) in kept) == keeps_input
    # Nothing else of the size of the tokens.
    rest = {s for s in kept if TOKENS in s} - {(LAYERS, TOKENS, RANK)}
    assert rest == ({(LAYERS, TOKENS, WIDTH)} if keeps_input else set())


@pytest.mark.parametrize("trained", [("x", "B"), ("x", "A", "B")])
def test_jax_lists_the_input_as_a_residual_only_if_a_is_trained(trained, capsys):
    method, w = LoRAFA(rank=RANK), jnp.asarray(normal(0, WIDTH, WIDTH))
    p = arrays(method, WIDTH, WIDTH)
    everything = {"x": jnp.asarray(normal(1, TOKENS, WIDTH)), "A": p["A"], "B": p["B"]}
    constant = {k: v for k, v in everything.items() if k not in trained}

    def loss(free):
        every = free | constant
        return jnp.sum(layer_output(method, every, Rows(every["x"]), every["x"] @ w, weight=w))

    print_saved_residuals(loss, {k: everything[k] for k in trained})
    listed = capsys.readouterr().out
    assert f"f32[{TOKENS},{RANK}]" in listed
    assert (f"f32[{TOKENS},{WIDTH}]" in listed) == ("A" in trained)


class Linears(nnx.Module):
    """A scanned stack of linear layers."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs))
        self.layers = make(rngs.split(LAYERS))

    def __call__(self, x):
        step = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return step(x, self.layers)


@pytest.mark.parametrize(("method", "keeps_input"), [(LoRAFA, False), (LoRA, True)])
def test_so_does_a_scanned_nnx_model(method, keeps_input):
    model, x = Linears(nnx.Rngs(0)), jnp.asarray(normal(1, TOKENS, WIDTH))
    lro.adapters.attach(model, method(rank=RANK), ".*", rngs=0)
    graph, trainable, rest = nnx.split(model, lro.adapters.trainable, ...)
    # Variables of the outside cannot be updated within a trace: these are new ones.
    inside = lambda: jax.tree.map(lambda x: x, rest)
    loss = lambda trainable, x: nnx.merge(graph, trainable, inside())(x).sum()
    _, backward = jax.vjp(loss, trainable, x)
    kept = {r.shape for r in jax.tree.leaves(backward)}
    assert (LAYERS, TOKENS, RANK) in kept
    assert ((LAYERS, TOKENS, WIDTH) in kept) == keeps_input


def products(jaxpr):
    """Shapes of all products of matrices, also of inner programs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for value in equation.params.values():
            inner = value if isinstance(value, tuple | list) else [value]
            for sub in inner:
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield from products(sub)


@pytest.mark.parametrize(
    "method", [LoRA(rank=RANK), LoRAFA(rank=RANK), lro.adapters.DoRA(rank=RANK)]
)
def test_no_gradient_of_the_weight_is_in_the_program(method):
    d_in, d_out = 24, 31
    w, x = jnp.asarray(normal(0, 1, d_in, d_out)), jnp.asarray(normal(1, TOKENS, d_in))
    params = method.init(KEY, w)

    def loss(trainable, x):
        p = method.layer_arrays(params._replace(trainable=trainable), 0)
        return jnp.sum(jnp.sin(layer_output(method, p, Rows(x), x @ w[0], weight=w[0])))

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params.trainable, x)
    shapes = set(products(program.jaxpr))
    assert (TOKENS, RANK) in shapes
    assert not {(d_in, d_out), (d_out, d_in)} & shapes


def temporaries(method, activation, layers=8, tokens=512, width=64, hidden=256):
    """Bytes of temporaries of the compiled gradient of a scanned stack of MLPs."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    up, down = array(layers, width, hidden), array(layers, hidden, width)
    first, second = method.init(KEY, up), method.init(KEY, down)

    def loss(trained, frozen, up, down, x):
        def layer(x, of_layer):
            up, down, p, q = of_layer
            h = activation(layer_output(method, p, Rows(x), x @ up, weight=up))
            return x + layer_output(method, q, Rows(h), h @ down, weight=down), None

        p, q = (t | f for t, f in zip(trained, frozen, strict=True))
        return jnp.mean(jnp.square(jax.lax.scan(layer, x, (up, down, p, q))[0]))

    both = [(first.trainable, second.trainable), (first.frozen, second.frozen)]
    lowered = jax.jit(jax.grad(loss)).lower(*both, up, down, array(tokens, width))
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "activation", [jax.nn.silu, pytest.param(jax.nn.relu, marks=pytest.mark.full)]
)
def test_compiled_temporaries_are_a_quarter_below_those_of_lora(activation):
    fa, plain = (temporaries(kind(rank=8), activation) for kind in (LoRAFA, LoRA))
    assert fa < 0.75 * plain


def test_also_beside_an_activation_that_keeps_five_arrays_itself():
    fa, plain = (temporaries(kind(rank=8), jax.nn.gelu) for kind in (LoRAFA, LoRA))
    # Less are the input of the layer and that of its second product, nothing is more.
    assert plain - fa >= 8 * 512 * (64 + 256) * 4
