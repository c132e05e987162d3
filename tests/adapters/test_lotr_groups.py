"""Which layers share LoTR's factors, and that they do, in a decoder run by a scan and in a list."""

import dataclasses
import functools
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import parameter_count
from lowrank_optax.adapters.methods.lotr import layer_of
from lowrank_optax.models import Decoder, decoder_config

nnx = pytest.importorskip("flax.nnx")
LoTR = lro.adapters.LoTR

CONFIG = dataclasses.replace(
    decoder_config("llama-tiny", vocab_size=32),
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    initializer_range=0.3,
)
TOKENS = np.arange(12).reshape(2, 6) % 32


def close(x: jax.Array, y: jax.Array) -> None:
    """To rounding, and not zero."""
    size = float(np.abs(y).max())
    assert size > 0
    np.testing.assert_allclose(x, y, atol=1e-4 * size)


def test_numbers_of_layers_are_read_off_paths() -> None:
    for path, expected in (
        ("blocks/attention/query", ("blocks/attention/query", None)),
        ("blocks/7/attention/query", ("blocks/attention/query", 7)),
        ("blocks/7/experts/2/up", ("blocks/experts/up", 7)),
        ("layers_7/Dense_1", ("layers/Dense_1", 7)),
        ("Dense_7/kernel", ("Dense", 7)),
        ("layers/7", ("layers", 7)),
        ("7", ("", 7)),
        ("conv1/proj", ("conv1/proj", None)),
    ):
        assert layer_of(path) == expected


def groups_of(method: Any, layers: dict[str, tuple[int, int]]) -> set[frozenset[str]]:
    found: dict[Any, set[str]] = {}
    for path, shape in layers.items():
        found.setdefault(method.group(path, shape), set()).add(path)
    return {frozenset(paths) for paths in found.values()}


LAYERS = {
    f"{part}/{i}/{name}": (8, 4 if name == "key" else 8)
    for part in ("encoder", "decoder")
    for i in range(3)
    for name in ("query", "key", "output")
}


def test_groups_by_shape_kind_block_and_function() -> None:
    shapes = groups_of(LoTR(), LAYERS)
    assert {len(g) for g in shapes} == {6, 12}
    kinds = groups_of(LoTR(group_by="kind"), LAYERS)
    assert all(len(g) == 6 and len({p.rsplit("/", 1)[1] for p in g}) == 1 for g in kinds)
    blocks = groups_of(LoTR(group_by="kind_and_block", block_size=2), LAYERS)
    assert frozenset({"encoder/0/query", "encoder/1/query"}) in blocks
    assert frozenset({"decoder/2/key"}) in blocks
    assert len(blocks) == 2 * 2 * 3
    attention = groups_of(LoTR(group_by=lambda path, shape: path.split("/")[0]), LAYERS)
    assert len(attention) == 4  # the parts of the model, and shapes that cannot share apart


def test_one_shared_side_lets_the_other_differ() -> None:
    assert len(groups_of(LoTR(share="input"), LAYERS)) == 1
    assert len(groups_of(LoTR(share="output"), LAYERS)) == 2
    assert len(groups_of(LoTR(share="input", group_by="kind"), LAYERS)) == 3


def test_another_rank_is_another_group() -> None:
    groups = {LoTR(rank=r).group("query", (8, 8)) for r in (2, 3, (3, 1))}
    assert len(groups) == 2


def split(model: Any) -> Any:
    return nnx.split(model, lro.adapters.trainable, ...)


def flat(state: Any) -> dict[tuple[Any, ...], jax.Array]:
    found = nnx.to_flat_state(state)
    return {tuple(map(str, path)): variable[...] for path, variable in found}


def with_values(state: Any, values: Any) -> Any:
    """The same state with values of a function of the path and the old value."""
    leaf = lambda path, x: values(
        tuple(str(getattr(k, "key", k)) for k in path if hasattr(k, "key")), x
    )
    return jax.tree_util.tree_map_with_path(leaf, state)


@functools.cache
def stacked() -> Any:
    return Decoder(CONFIG, rngs=nnx.Rngs(0), scan_layers=True)


def decoder(scan: bool, method: Any, where: str = "query|value", **options: Any) -> Any:
    """The same model either way, with an adapter."""
    model = nnx.clone(stacked())
    if not scan:
        listed = Decoder(CONFIG, rngs=nnx.Rngs(0), scan_layers=False)
        state, whole = nnx.state(listed, nnx.Param), flat(nnx.state(model, nnx.Param))

        def value(path: tuple[str, ...], old: jax.Array) -> jax.Array:
            del old
            if path[0] == "blocks":
                return whole[path[0], *path[2:]][int(path[1])]
            return whole[path]

        nnx.update(listed, with_values(state, value))
        model = listed
    return lro.adapters.attach(model, method, where, rngs=0, **options)


def loss_and_gradient(model: Any, seed: int | None = 1) -> tuple[jax.Array, dict[Any, jax.Array]]:
    """Of the trained arrays, set by their names and layers so that both forms agree."""

    def value(path: tuple[str, ...], old: jax.Array) -> jax.Array:
        kind = [n for n in path if n in ("query", "value", "key") or n.startswith("None")]
        layers = [int(n) for n in path if n.isdigit()]
        draw = lambda s, shape: np.random.default_rng([s, len(kind), *shape]).normal(size=shape)
        name = path[-1]
        if path[0] == "adapter_groups":
            base = sum(map(ord, name))
            return jnp.asarray(
                np.broadcast_to(draw(base, old.shape[-2:]), old.shape) * 0.3, old.dtype
            )
        base = sum(map(ord, kind[0] + name))
        if layers:
            return jnp.asarray(draw(base + 1000 * layers[0], old.shape) * 0.3, old.dtype)
        each = [draw(base + 1000 * i, old.shape[1:]) for i in range(old.shape[0])]
        return jnp.asarray(np.stack(each) * 0.3, old.dtype)

    graph, trained, rest = split(model)
    trained = trained if seed is None else with_values(trained, value)

    @jax.jit
    @jax.value_and_grad
    def loss(trained: Any) -> jax.Array:
        logits = nnx.merge(graph, trained, rest)(TOKENS[:, :-1])
        return jnp.mean(jnp.sin(logits) * jnp.arange(32))

    result, gradient = loss(trained)
    return result, {path: np.asarray(x) for path, x in flat(gradient).items()}


def shared_and_cores(gradient: dict[Any, jax.Array]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Gradients of shared arrays by group and name, and of cores ``[L, ...]`` by layer's name."""
    shared = {p[-2:]: x for p, x in gradient.items() if p[0] == "adapter_groups"}
    cores: dict[Any, Any] = {}
    for path, x in gradient.items():
        if path[0] != "adapter_groups":
            cores.setdefault((path[path.index("adapters") - 1], path[-1]), []).append(x)
    return shared, {k: x[0] if len(x) == 1 else np.stack(x) for k, x in cores.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "share", ["both", *(pytest.param(side, marks=pytest.mark.full) for side in ("input", "output"))]
)
def test_a_scan_and_a_list_give_the_same_loss_and_gradients(share: Any) -> None:
    method = LoTR(rank=2, alpha=3, share=share)
    results = [loss_and_gradient(decoder(scan, method)) for scan in (True, False)]
    assert_close(results[0][0], results[1][0], 100)
    (shared, cores), (shared_listed, cores_listed) = (shared_and_cores(g) for _, g in results)
    assert shared.keys() == shared_listed.keys()
    assert cores.keys() == cores_listed.keys()
    for ours, theirs in ((shared, shared_listed), (cores, cores_listed)):
        for name, x in ours.items():
            close(x, theirs[name])


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_gradient_of_a_shared_factor_is_the_sum_over_separate_copies(scan: bool) -> None:
    by_kind = loss_and_gradient(decoder(scan, LoTR(rank=2, group_by="kind")))
    alone = LoTR(rank=2, group_by="kind_and_block", block_size=1)
    copies = loss_and_gradient(decoder(scan, alone))
    assert_close(by_kind[0], copies[0], 100)
    shared, cores = shared_and_cores(by_kind[1])
    separate, cores_of_copies = shared_and_cores(copies[1])
    assert len(shared) == 4
    assert sum(x.shape[0] if x.ndim == 3 else 1 for x in separate.values()) == 12
    for kind in ("query", "value"):
        for name in "AB":
            of_kind = lambda found, k=kind, n=name: [
                x for (group, own), x in found.items() if k in group and own == n
            ]
            total = sum(x.sum(0) if x.ndim == 3 else x for x in of_kind(separate))
            (one,) = of_kind(shared)
            close(one, total)
        close(cores[kind, "core"], cores_of_copies[kind, "core"])


@pytest.mark.slow
def test_blocks_of_two_layers_agree_in_a_scan_and_in_a_list() -> None:
    method = LoTR(rank=2, group_by="kind_and_block", block_size=2)
    models = [decoder(scan, method) for scan in (True, False)]
    counts = [parameter_count(nnx.state(m, lro.adapters.trainable)) for m in models]
    # Of query [8, 8] and value [8, 4], two blocks each, and three cores each.
    assert counts == [2 * (2 * 16 + 2 * 12) + 6 * 4] * 2
    results = [loss_and_gradient(m) for m in models]
    assert_close(results[0][0], results[1][0], 100)
    shared, listed = (shared_and_cores(g)[0] for _, g in results)
    for name in "AB":
        in_scan = {g: x for (g, n), x in shared.items() if n == name}
        in_list = {g: x for (g, n), x in listed.items() if n == name}
        for kind in ("query", "value"):
            (blocks,) = [x for g, x in in_scan.items() if kind in g]
            apart = [in_list[g] for g in sorted(g for g in in_list if kind in g)]
            close(blocks, np.stack(apart))


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_counts_of_a_model_are_the_formula(scan: bool) -> None:
    model = decoder(scan, LoTR(rank=3), "query|output")  # six weights [8, 8]
    assert parameter_count(nnx.state(model, lro.adapters.trainable)) == 3 * 8 + 6 * 9 + 3 * 8
    # Queries [8, 8], keys and values [8, 4] share the side of their input.
    model = decoder(scan, LoTR(rank=3, share="input"), "query|key|value")
    count = parameter_count(nnx.state(model, lro.adapters.trainable))
    assert count == 3 * 8 + 3 * (3 * 8 + 2 * 3 * 4)


def test_layers_of_another_rank_have_factors_of_their_own() -> None:
    model = decoder(True, LoTR(rank=2), "query|output", rank_pattern={"output": 3})
    arrays = jax.tree.leaves(nnx.state(model, lro.adapters.trainable))
    assert sorted(x.shape for x in arrays) == [
        (3, 2, 2),
        (3, 3, 3),
        *[(8, 2)] * 2,
        *[(8, 3)] * 2,
    ]


def test_gradients_flow_through_frozen_weights_to_the_layers_below() -> None:
    class Two(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.first = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
            self.second = nnx.Linear(4, 4, use_bias=False, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(self.first(x))

    model = lro.adapters.attach(Two(nnx.Rngs(0)), LoTR(rank=2), rngs=1)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    wrt = nnx.DiffState(0, lro.adapters.trainable)
    loss = lambda model: jnp.sum(model(x) ** 2) / 2
    gradient = flat(nnx.jit(nnx.grad(loss, argnums=wrt))(model))
    state = flat(nnx.state(model, lro.adapters.trainable))
    arrays = {p[-1]: np.asarray(a) for p, a in state.items()}
    kernels = [np.asarray(layer.kernel[...]) for layer in (model.first, model.second)]
    back = x @ kernels[0] @ kernels[1] @ kernels[1].T
    expected = (x @ arrays["A"]).T @ (back @ arrays["B"])
    (found,) = [g for p, g in gradient.items() if p[0] == "first"]
    close(found, expected)
