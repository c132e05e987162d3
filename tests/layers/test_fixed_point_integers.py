"""Fixed-point layers agree with their integers bit for bit, and broken files are refused."""

import ast
import copy
import json
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import nnx

import lowrank_optax as lro
from lowrank_optax.layers import FixedPointFormat, IntegerArray, LayerFormats, Overflow, Rounding
from lowrank_optax.layers.fixed_point import integers
from lowrank_optax.layers.fixed_point.integer_files import ARRAYS, JSON

RELU = FixedPointFormat(8, signed=False)


class Network(nnx.Module):
    """Convolutions with norms, a shortcut, and a head, as a small residual network has them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3, 3), padding=1, feature_group_count=2, rngs=rngs)
        self.add = lro.layers.FixedPointSum()
        self.down = nnx.Conv(
            8, 4, (3, 2), strides=2, padding="VALID", kernel_dilation=(2, 1), rngs=rngs
        )
        self.head = nnx.Linear(32, 10, use_bias=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.norm(self.stem(x)).clip(0)
        x = self.add(x, self.conv(x))
        return self.head(self.down(x).reshape(-1, 32))


def images(count: int) -> np.ndarray:
    """Grey images of 8 × 8 pixels of 0 to 16, half of them blank, as the digits are."""
    drawn = np.random.default_rng(0).integers(-16, 17, (count, 8, 8, 1))
    return np.maximum(drawn, 0)


def trained_network() -> Network:
    """A network whose statistics and biases are not those of the start."""
    model, rng = Network(nnx.Rngs(0)), np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    model.norm.mean[...], model.norm.var[...] = normal(8) / 4, jnp.exp(normal(8))
    model.norm.bias[...] = normal(8) / 4
    for layer in (model.stem, model.conv, model.down):
        layer.bias[...] = normal(layer.bias.size) / 8
    return model


run = nnx.jit(lambda model, x: model(x))


def calibrated(formats: Any, **options: Any) -> Network:
    model, x = trained_network(), jnp.asarray(images(32) / 16, jnp.float32)
    lro.layers.convert_to_fixed_point(model, formats, "", **options)
    lro.layers.calibrate_fixed_point(model, lambda m, x: m(x), x)
    return model


@pytest.fixture(scope="module")
def model() -> Network:
    return calibrated(8)


def same_numbers(y: IntegerArray, expected: jax.Array) -> None:
    """In float64, that holds both exactly."""
    found = np.ldexp(y.integers.astype(np.float64), -y.fraction_bits)
    np.testing.assert_array_equal(found, np.asarray(expected, np.float64))


def test_integers_are_those_of_the_network_bit_for_bit(model: Network, tmp_path: Path) -> None:
    pixels = images(400)
    expected = run(model, jnp.asarray(pixels / 16, jnp.float32))
    lro.layers.save_integers(model, tmp_path / "integers")
    layers = lro.layers.load_integers(tmp_path / "integers")
    y = Network.__call__(layers, IntegerArray(pixels, 4))
    same_numbers(y, expected)
    # The sums that were rounded are those of float32, too, and the test sees different numbers.
    assert len(np.unique(y.integers)) > 100
    folded = Network.__call__(lro.layers.to_integers(model), IntegerArray(pixels, 4))
    np.testing.assert_array_equal(folded.integers, y.integers)


def test_the_emulation_is_near_the_float_network(model: Network) -> None:
    x = jnp.asarray(images(64) / 16, jnp.float32)
    exact = trained_network()
    exact.eval()
    y, expected = run(model, x), run(exact, x)
    assert jnp.linalg.norm(y - expected) < 0.05 * jnp.linalg.norm(expected)


@pytest.mark.full  # three networks
@pytest.mark.parametrize("which", ["channels", "wide", "ones"])
def test_other_formats_agree_too(which: str) -> None:
    """A point per channel, sums that go on as they are, unsigned outputs and shifts alone."""
    eight, six = FixedPointFormat(8), FixedPointFormat(6)
    formats = {
        "channels": LayerFormats(six, eight, FixedPointFormat(6, rounding="RND_CONV"), six),
        "wide": LayerFormats(six, six, six, None),
        "ones": LayerFormats(FixedPointFormat(8, ones=2), eight, eight, RELU),
    }[which]
    model = calibrated(formats, per_channel=which == "channels")
    pixels = images(50)
    y = Network.__call__(lro.layers.to_integers(model), IntegerArray(pixels, 4))
    same_numbers(y, run(model, jnp.asarray(pixels / 16, jnp.float32)))
    assert len(np.unique(y.integers)) > 20


def test_every_format_casts_as_the_quantizer_does() -> None:
    n = np.concatenate([np.arange(-300, 301), [10**6 + 1, -(10**6) - 1]])
    made = [
        FixedPointFormat(4, rounding=r, overflow=o, signed=s)
        for r in get_args(Rounding)
        for o in get_args(Overflow)
        for s in (True, False)
        if s or o != "WRAP_SM"
    ]
    made += [FixedPointFormat(5, ones=2), FixedPointFormat(6, ones=2, signed_digits=True)]
    # Of 6 bits right of the point to 4 and 2 (rounding), to 6 and 9 (exact), and far too few.
    points = (0, 2, -2, -5, 40, 70)
    x = jnp.asarray(n / 64, jnp.float32)
    in_all = lambda point: [lro.layers.quantize_fixed_point(x, point, f) for f in made]
    quantized = jax.jit(jax.vmap(in_all))(jnp.asarray(points, jnp.float32))
    for format, expected in zip(made, quantized, strict=True):
        for point, y in zip(points, expected, strict=True):
            same_numbers(lro.layers.Cast(format, point)(IntegerArray(n, 6)), y)


def test_there_is_no_floating_point_number_in_the_simulator(model: Network) -> None:
    """Neither in its source nor in what it computes with."""
    tree = ast.parse(Path(integers.__file__).read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Div), ast.unparse(node)
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float))
        assert not (isinstance(node, ast.Attribute) and "float" in node.attr)
    with pytest.raises(TypeError, match="integers must be integers, not float32"):
        IntegerArray(np.ones(2, np.float32), 4)
    layers = lro.layers.to_integers(model)
    total = layers["stem"].accumulate(IntegerArray(images(2), 4))
    assert total.integers.dtype == layers["stem"].weight.integers.dtype == np.int64
    without_cast = lro.layers.IntegerLayer("linear", layers["head"].weight)
    with pytest.raises(ValueError, match="may need 71 bits"):
        without_cast(IntegerArray(np.full((1, 32), 2**59), 4))


def test_a_sum_that_int64_cannot_hold_is_refused() -> None:
    big, small = IntegerArray([2**50], 0), IntegerArray([1], 30)
    with pytest.raises(ValueError, match="a sum needs 81 bits"):
        integers.add(big, small)
    with pytest.raises(ValueError, match="needs 61 bits"):
        IntegerArray([2**60], 0)
    with pytest.raises(ValueError, match="needs 64 bits"):
        IntegerArray(np.array([2**64 - 1], np.uint64), 0)
    with pytest.raises(ValueError, match=r"fraction_bits \(3,\) must be one int, or one for each"):
        IntegerArray([[1], [2]], [1, 2, 3])


def test_stacked_layers_are_exported_one_by_one() -> None:
    make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))
    stack = nnx.Sequential(nnx.split_rngs(splits=3)(make)(nnx.Rngs(0)))
    lro.layers.convert_to_fixed_point(stack, 8)

    def through(model: Any, x: jax.Array) -> jax.Array:
        graphdef, state = nnx.split(model.layers[0])
        return jax.lax.scan(lambda x, s: (nnx.merge(graphdef, s)(x), None), x, state)[0]

    n = np.random.default_rng(2).integers(-50, 50, (5, 4))
    x = jnp.asarray(n / 16, jnp.float32)
    points = lro.layers.calibrate_fixed_point(stack, through, x)
    assert points.integer_bits["layers/0/input_quantizer"].shape == (3,)
    layers = lro.layers.to_integers(stack)
    y = IntegerArray(n, 4)
    for index in range(3):
        y = layers["layers/0"][index](y)
    same_numbers(y, through(stack, x))


def damaged(content: Any, path: str, value: Any) -> Any:
    """The JSON file with one field changed, or removed if the value is None."""
    *parents, last = path.split("|")
    inner = content
    for name in parents:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("version", 2, "version 2 is not 1"),
        ("version", None, "'version' is missing"),
        ("sha256", "0", "are not as they were written"),
        ("fixed_point_layers|stem", None, "are not as they were written"),
        ("fixed_point_layers|stem|output", None, "are not as they were written"),
        ("fixed_point_layers|stem|input|integer_bits", 3, "are not as they were written"),
    ],
)
def test_a_file_with_a_wrong_field_is_refused(
    model: Network, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    folder = tmp_path / "integers"
    lro.layers.save_integers(model, folder)
    content = damaged(json.loads((folder / JSON).read_text()), path, value)
    (folder / JSON).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"holds no complete fixed-point model: .*{message}"):
        lro.layers.load_integers(folder)


def test_a_broken_file_is_refused_and_a_failed_write_leaves_the_old_one(
    model: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "integers"
    lro.layers.save_integers(model, folder)
    whole = (folder / ARRAYS).read_bytes()
    for broken in (whole[:-1], whole[: len(whole) // 2], b""):
        (folder / ARRAYS).write_bytes(broken)
        with pytest.raises(ValueError, match="are not as they were written"):
            lro.layers.load_integers(folder)
    (folder / ARRAYS).write_bytes(whole)
    (folder / JSON).write_text("{")
    with pytest.raises(ValueError, match="holds no complete fixed-point model"):
        lro.layers.load_integers(folder)
    (folder / JSON).unlink()
    with pytest.raises(FileNotFoundError):
        lro.layers.load_integers(folder)
    lro.layers.save_integers(model, tmp_path / "again")
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "again").iterdir())
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        lro.layers.save_integers(model, tmp_path / "again")
    assert sorted((p.name, p.read_bytes()) for p in (tmp_path / "again").iterdir()) == before


def test_models_that_are_not_exported(model: Network) -> None:
    adapted = copy.deepcopy(model)
    lro.adapters.attach(adapted, lro.adapters.LoRA(rank=2), where="head", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="head has adapters, which its integers would not have"):
        lro.layers.to_integers(adapted)
    layer = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="Sequential has no fixed-point layer"):
        lro.layers.to_integers(layer)
    lro.layers.convert_to_fixed_point(layer, 8)
    with pytest.raises(ValueError, match="integer_bits of layers/0/input must be finite"):
        lro.layers.to_integers(layer)
    for options, message in (
        ({"padding": "CIRCULAR"}, "layers/0 pads 'CIRCULAR'"),
        ({"input_dilation": 2}, "layers/0 dilates its input"),
    ):
        conv = nnx.Sequential(nnx.Conv(2, 2, (3,), rngs=nnx.Rngs(0), **options))
        lro.layers.convert_to_fixed_point(conv, 8)
        with pytest.raises(ValueError, match=message):
            lro.layers.to_integers(conv)
