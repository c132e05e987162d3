"""With words and tokens over devices, the loss and its gradients are those of one device."""

import re
from typing import Any

from close import assert_close
import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import lowrank_optax as lro

TOKENS, WIDTH, WORDS, VALID = 64, 6, 1032, 1029
NAMES = ("hidden", "head", "bias")
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "valid_vocabulary": VALID}


@pytest.fixture(scope="module")
def arguments() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    labels = rng.integers(0, VALID, TOKENS)
    labels[:20] = -100  # unevenly over the devices
    return normal(TOKENS, WIDTH), normal(WIDTH, WORDS), normal(WORDS), labels


def losses(options: dict[str, Any]) -> Any:
    def loss(hidden, head, bias, labels):
        loss, values = lro.losses.linear_cross_entropy(
            hidden, head, labels, bias=bias, return_values=True, **OPTIONS, **options
        )
        return loss, values

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)


@pytest.fixture(scope="module")
def one_device(arguments) -> Any:
    return jax.jit(losses({}))(*arguments)


@pytest.mark.parametrize("inside", [True, False])
def test_words_and_tokens_over_eight_devices(arguments, one_device, inside):
    """With the gradient taken inside of `jax.shard_map`, and outside."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    names = {"token_axis_name": "data", "vocabulary_axis_name": "model"}
    specs = P("data"), P(None, "model"), P("model"), P("data")
    if inside:
        out = (P(), P("data")), specs[:3]
        run = jax.shard_map(losses(names), mesh=mesh, in_specs=specs, out_specs=out)
    else:
        loss = lambda *given: lro.losses.linear_cross_entropy(
            *given[:2], given[3], bias=given[2], return_values=True, **OPTIONS, **names
        )
        mapped = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=(P(), P("data")))
        run = jax.value_and_grad(mapped, (0, 1, 2), has_aux=True)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    assert_close(jax.jit(run)(*map(put, arguments, specs)), one_device, 100)


@pytest.mark.parametrize("design", ["recompute", "forward"])
def test_tokens_over_devices_without_values(arguments, one_device, design):
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    loss = lambda hidden, head, bias, labels: lro.losses.linear_cross_entropy(
        hidden, head, labels, bias=bias, design=design, token_axis_name="data", **OPTIONS
    )
    specs = P("data"), P(), P(), P("data")
    step = jax.value_and_grad(loss, (0, 1, 2))
    run = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), specs[:3]))
    (expected, _), gradients = one_device
    assert_close(jax.jit(run)(*arguments), (expected, gradients), 100)


def test_tokens_placed_by_the_compiler(arguments, one_device):
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    specs = P("data"), P(), P(), P("data")
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    assert_close(jax.jit(losses({}))(*map(put, arguments, specs)), one_device, 100)


def test_explicit_axes_are_refused_outside_of_shard_map(arguments, one_device):
    hidden, head, bias, labels = arguments
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    hidden = jax.device_put(hidden, NamedSharding(mesh, P("data")))
    labels = jax.device_put(labels, NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="hidden is sharded over explicit mesh axes"):
        lro.losses.linear_cross_entropy(hidden, head, labels)
    loss = lambda hidden, labels: lro.losses.linear_cross_entropy(
        hidden, head, labels, bias=bias, token_axis_name="data", **OPTIONS
    )
    specs = {"in_specs": (P("data"), P("data")), "out_specs": P()}
    (expected, _), (dh, _, _) = one_device
    found = jax.jit(jax.value_and_grad(jax.shard_map(loss, mesh=mesh, **specs)))(hidden, labels)
    assert_close(found, (expected, dh), 100)


@pytest.mark.parametrize(
    ("names", "specs", "message"),
    [
        # Each device would add up the same words: a loss that is larger by log 4.
        ({"vocabulary_axis_name": "model"}, (P(), P(), P()), "head must be sharded over 'model'"),
        ({"token_axis_name": "data"}, (P(), P(), P()), "hidden and labels must be .* over 'data'"),
        (
            {"token_axis_name": ("data", "model")},
            (P("data"), P(), P("data")),
            "hidden and labels must be sharded over 'model'",
        ),
    ],
)
def test_what_is_the_same_on_all_devices_of_a_named_axis_is_refused(
    arguments, names, specs, message
):
    hidden, head, _, labels = arguments
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    loss = lambda *given: lro.losses.linear_cross_entropy(*given, reduction="sum", **names)
    mapped = lambda specs: jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mapped(specs), hidden, head, labels)
    axes = P(names.get("token_axis_name")), P(None, names.get("vocabulary_axis_name"))
    assert jax.eval_shape(mapped((*axes, axes[0])), hidden, head, labels).shape == ()


def test_a_device_all_of_whose_words_have_a_bias_of_minus_infinity(arguments):
    hidden, head, bias, labels = arguments
    head, bias = head[:, :16], bias[:16].copy()
    bias[12:] = -np.inf
    labels = np.where(labels < 0, labels, labels % 12)
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,))
    loss = lambda hidden, head, bias, name: lro.losses.linear_cross_entropy(
        hidden, head, labels, bias=bias, vocabulary_axis_name=name
    )
    mapped = jax.shard_map(
        lambda *given: loss(*given, "model"),
        mesh=mesh,
        in_specs=(P(), P(None, "model"), P("model")),
        out_specs=P(),
    )
    found = jax.jit(jax.value_and_grad(mapped, (0, 1, 2)))(hidden, head, bias)
    one = jax.jit(jax.value_and_grad(lambda *given: loss(*given, None), (0, 1, 2)))
    expected, (dh, dw, db) = one(hidden, head[:, :12], bias[:12])
    widened = np.pad(dw, ((0, 0), (0, 4))), np.pad(db, (0, 4))
    assert_close(found, (expected, (dh, *widened)), 100)


def test_collectives_over_words_are_three_of_a_number_a_token_and_one_of_the_hidden_states(
    arguments,
):
    mesh = jax.make_mesh((8,), ("model",), (AxisType.Auto,))
    specs = P(), P(None, "model"), P()
    loss = lambda hidden, head, labels: lro.losses.linear_cross_entropy(
        hidden, head, labels, vocabulary_axis_name="model"
    )
    step = jax.value_and_grad(loss, (0, 1))
    run = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), specs[:2]))
    hidden, head, _, labels = arguments
    text = jax.jit(run).lower(hidden, head, labels).as_text()
    found = re.findall(r'"stablehlo\.(all_\w+|reduce_scatter|collective_\w+)"', text)
    results = re.findall(r"\}\) : \(tensor<([\dx]+)xf32>\) -> tensor<[\dx]+xf32>", text)
    assert found == ["all_reduce"] * 4
    assert sorted(results) == sorted([str(TOKENS)] * 3 + [f"{TOKENS}x{WIDTH}"])
