"""Agreement with bitsandbytes, where it is installed: its maps, codes and 8-bit AdamW, on CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.quantization import BlockFormat, Quantized, code_map, dequantize, quantize

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")
BLOCK = 256


def theirs(x: np.ndarray, signed: bool, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales. On CPU theirs of float64 are the nearest; of float32, near the nearest."""
    table = bitsandbytes.functional.create_dynamic_map(signed=signed)
    numbers = torch.from_numpy(x.astype(dtype))
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(numbers, table, BLOCK)
    return codes.numpy().reshape(x.shape), scales.numpy()


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_theirs(signed: bool) -> None:
    table = bitsandbytes.functional.create_dynamic_map(signed=signed).numpy()
    coder = code_map("dynamic", 8, signed)
    np.testing.assert_allclose(coder.decode(jnp.arange(256)), table, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("tail", ["normal", "cauchy"])
def test_codes_are_theirs_but_for_ties(signed: bool, tail: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 512)) if tail == "normal" else rng.standard_cauchy((64, 512))
    x = (x if signed else x * x).astype(np.float32)
    fmt = BlockFormat(code_map("dynamic", 8, signed), BLOCK)
    ours = quantize(jnp.asarray(x), fmt)
    codes, scales = theirs(x, signed, np.float64)
    np.testing.assert_array_equal(np.ravel(ours.scales), scales)
    assert np.mean(np.asarray(ours.codes) != codes) <= 1e-3
    # Theirs of float32 go by a table of even cells, wider than the gaps near zero: never nearer.
    rough = Quantized(jnp.asarray(theirs(x, signed, np.float32)[0]), ours.scales)
    error = lambda q: np.abs(np.asarray(dequantize(q, fmt, x.shape)) - x)
    assert (error(ours) <= error(rough) + 1e-6 * np.abs(x)).all()


def test_second_moments_differ_from_theirs_where_those_are_zero() -> None:
    x = np.square(np.random.default_rng(1).standard_cauchy((64, 512))).astype(np.float32)
    fmt = BlockFormat(code_map("dynamic", 8, False), BLOCK, positive=True)
    ours = np.asarray(quantize(jnp.asarray(x), fmt).codes)
    codes, _ = theirs(x, False, np.float64)
    zeros = codes == 0
    assert zeros.any()
    assert (ours[zeros] == 1).all()
    assert np.mean(ours[~zeros] != codes[~zeros]) <= 1e-3


def test_300_steps_of_adamw_stay_within_what_two_roundings_explain() -> None:
    steps, shape, rate, decay = 300, (32, 256), 1e-3, 1e-2
    rng = np.random.default_rng(0)
    start = rng.normal(size=shape).astype(np.float32)
    target = rng.normal(size=shape).astype(np.float32)
    noise = 0.3 * rng.normal(size=(steps, *shape)).astype(np.float32)

    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=rate, weight_decay=decay)
    for i in range(steps):
        weight.grad = weight.detach() - torch.from_numpy(target) + torch.from_numpy(noise[i])
        optimizer.step()
    (state,) = optimizer.state.values()
    assert state["state1"].dtype == torch.uint8
    peer = weight.detach().numpy()

    def ours(adam: Any) -> np.ndarray:
        tx = optax.chain(adam, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate))

        def step(carry: Any, noise: jax.Array) -> tuple[Any, None]:
            x, state = carry
            updates, state = tx.update(x - target + noise, state, x)
            return (optax.apply_updates(x, updates), state), None

        whole = lambda x: jax.lax.scan(step, (x, tx.init(x)), noise)[0][0]
        return np.asarray(jax.jit(whole)(jnp.asarray(start)))

    wide, narrow = ours(optax.scale_by_adam()), ours(lro.low_bit(optax.scale_by_adam()))
    rms = lambda x: float(np.sqrt(np.mean(x**2)))
    moved, explained = rms(wide - start), rms(narrow - wide)
    assert explained < 0.1 * moved
    assert rms(peer - wide) < 1.5 * explained
    # The same codes are rounded to: far nearer to each other than either is to float32.
    assert rms(peer - narrow) < 0.25 * explained
