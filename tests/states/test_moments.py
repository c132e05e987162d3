"""Which arrays of a state are quantized, and as what."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.matrices.paths import path_string
from tests.states.low_bit_runs import kernel, low_bit, run


def in_codes(tx: Any, params: Any) -> set[str]:
    """Paths of what is quantized."""
    codes = jax.eval_shape(tx.init, params).codes
    return {path_string(path) for path, _ in jax.tree.leaves_with_path(codes)}


def test_every_moment_of_the_known_optimizers_is_found() -> None:
    cases = {
        "adam": (optax.adam(1e-3), {"0/mu", "0/nu"}),
        "adamw": (optax.adamw(1e-3), {"0/mu", "0/nu"}),
        "amsgrad": (optax.amsgrad(1e-3), {"0/mu", "0/nu", "0/nu_max"}),
        "lion": (optax.lion(1e-3), {"0/mu"}),
        "sgd": (optax.sgd(1e-3, momentum=0.9), {"0/trace"}),
        "adafactor": (optax.adafactor(1e-3, momentum=0.9), {"0/v", "4/ema"}),
        "adagrad": (optax.adagrad(1e-3), {"0/sum_of_squares"}),
        "ademamix": (optax.contrib.ademamix(1e-3), {"0/m1", "0/m2", "0/nu"}),
        "adan": (optax.adan(1e-3), {"0/m", "0/v", "0/n"}),
    }
    for name, (inner, expected) in cases.items():
        found = in_codes(lro.low_bit(inner), kernel((64, 64)))
        assert found == {f"{path}/kernel" for path in expected}, name


# The standard tier has one whose moments are of other names, and one with factors of a moment.
IN_FULL = [pytest.param(x, marks=pytest.mark.full) for x in ("lion", "sgd", "ademamix", "amsgrad")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adan", "adafactor", *IN_FULL])
def test_other_optimizers_stay_near_themselves_in_float32(name: str) -> None:
    """A difference of gradients may be negative: as a square it would be lost."""
    inner = {
        "adan": optax.adan(1e-2),
        "lion": optax.lion(1e-2),
        "sgd": optax.sgd(1e-2, momentum=0.9),
        "ademamix": optax.contrib.ademamix(1e-2),
        "adafactor": optax.adafactor(1e-2, momentum=0.9),
        "amsgrad": optax.amsgrad(1e-2),
    }[name]
    params = kernel()
    wide, narrow = (run(tx, params, 10)[0]["kernel"] for tx in (inner, low_bit(inner)))
    moved = np.linalg.norm(wide - params["kernel"])
    assert 0 < np.linalg.norm(narrow - wide) < 0.1 * moved


def test_small_arrays_stay_as_they_are() -> None:
    params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64), "edge": jnp.ones((4095,))}
    assert in_codes(lro.low_bit(optax.scale_by_adam()), params) == {"mu/kernel", "nu/kernel"}
    state = jax.jit(lro.low_bit(optax.scale_by_adam()).init)(params)
    assert state.inner.mu["kernel"] is None
    assert state.inner.nu["edge"].dtype == jnp.float32
    assert state.scales.mu["bias"] is None


def test_which_decides_for_embeddings_and_for_states_of_unknown_names() -> None:
    params = {"embed": jnp.ones((64, 64)), "kernel": jnp.ones((64, 64))}
    seen = {}

    def not_embed(path: str, x: jax.ShapeDtypeStruct) -> Any:
        seen[path] = (x.shape, x.dtype)
        return False if "embed" in path else None

    tx = lro.low_bit(optax.adam(1e-3), which=not_embed)
    assert in_codes(tx, params) == {"0/mu/kernel", "0/nu/kernel"}
    assert seen["0/mu/embed"] == ((64, 64), jnp.float32)
    assert "0/count" not in seen

    odd = optax.GradientTransformation(
        lambda p: {"slow": jax.tree.map(jnp.zeros_like, p)},
        lambda u, s, p=None: (u, {"slow": jax.tree.map(jnp.add, s["slow"], u)}),
    )
    with pytest.raises(ValueError, match=r"none of the arrays.*slow/embed.*which="):
        jax.eval_shape(lro.low_bit(odd).init, params)
    jax.eval_shape(lro.low_bit(odd).init, {"bias": jnp.ones(4)})  # nothing that is large enough
    for kind, value in (("signed", -1.0), ("unsigned", 1.0)):
        named = lro.low_bit(odd, which=lambda path, x, kind=kind: kind)
        assert in_codes(named, params) == {"slow/embed", "slow/kernel"}
        gradient = optax.tree.scale(value, params)
        state = jax.jit(lambda g, tx=named: tx.update(g, tx.init(g))[1])(gradient)
        assert np.all(state.scales["slow"]["kernel"] == 1)
    with pytest.raises(ValueError, match="which returned 'both' for 'slow/embed'"):
        lro.low_bit(odd, which=lambda path, x: "both").init(params)


def test_moments_that_are_all_small_are_refused_but_not_those_of_a_part() -> None:
    params = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
    message = r"largest moment, 'nu/kernel', has 64 elements, fewer than min_size=4096"
    with pytest.raises(ValueError, match=message):
        lro.low_bit(optax.scale_by_adam()).init(params)
    with pytest.raises(ValueError, match="fewer than min_size=4096"):
        lro.galore(1e-3, rank=2, state_bits=8).init(params)
    lro.low_bit(optax.sgd(1e-3)).init(params)  # has no moments, and needs none
    labels = {"kernel": "small", "bias": "rest"}
    both = {"small": lro.low_bit(optax.scale_by_adam()), "rest": optax.sgd(1e-3)}
    optax.partition(both, labels).init(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, r"^bits=2 must be 8 or 4\.$"),
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": 2.0}, "block_size=2.0"),
        ({"min_size": -1}, "min_size=-1"),
    ],
)
def test_bad_arguments_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lro.low_bit(optax.scale_by_adam(), **options)


def test_masks_and_partitions_inside_and_outside() -> None:
    params = {"embed": jnp.ones((64, 64)), "kernel": jnp.ones((64, 64))}
    mask = {"embed": False, "kernel": True}
    inside = lro.low_bit(optax.masked(optax.scale_by_adam(), mask))
    assert in_codes(inside, params) == {"inner_state/mu/kernel", "inner_state/nu/kernel"}
    outside = optax.masked(lro.low_bit(optax.scale_by_adam()), mask)
    codes = jax.eval_shape(outside.init, params).inner_state.codes
    assert codes.mu["kernel"].dtype == jnp.uint8
    labels = {"embed": "a", "kernel": "b"}
    both = {"a": optax.adam(1e-3), "b": optax.sgd(1e-3, momentum=0.9)}
    found = in_codes(lro.low_bit(optax.partition(both, labels)), params)
    assert {path.rsplit("/", 2)[-2] + path.rsplit("/", 1)[-1] for path in found} == {
        "muembed",
        "nuembed",
        "tracekernel",
    }
    new, state = run(lro.low_bit(optax.partition(both, labels)), params, 2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((new, state)))


@pytest.mark.slow
def test_projected_moments_are_quantized_inside_or_outside_and_the_basis_is_not() -> None:
    params, rule = kernel((16, 32)), lro.subspaces.randomized_svd(rank=8)
    inside = lro.scale_by_projection(low_bit(optax.scale_by_adam(), block_size=16), rule)
    outside = low_bit(lro.scale_by_projection(optax.scale_by_adam(), rule), block_size=16)
    state = jax.eval_shape(outside.init, params)
    assert in_codes(outside, params) == {"inner/mu/kernel", "inner/nu/kernel"}
    assert state.inner.basis["kernel"].dtype == jnp.float32
    assert state.codes.inner.mu["kernel"].shape == (8, 32)
    inner = jax.eval_shape(inside.init, params)
    assert inner.basis["kernel"].dtype == jnp.float32
    assert inner.inner.codes.mu["kernel"].dtype == jnp.uint8
    plain = lro.scale_by_projection(optax.scale_by_adam(), rule)
    wanted = np.asarray(run(plain, params, 3)[0]["kernel"])
    moved = np.linalg.norm(wanted - params["kernel"])
    for tx in (inside, outside):
        found = np.asarray(run(tx, params, 3)[0]["kernel"])
        assert np.linalg.norm(found - wanted) < 0.1 * moved
