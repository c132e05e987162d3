"""Packed codes: what comes back, how many bytes, and that no device asks another for codes."""

import math
import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax.extend import core
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lowrank_optax.quantization import pack, packed_bytes, packing_of, unpack

PACKINGS = ["auto", "planes", "nibbles", "uint4", "uint8"]
KINDS = [(b, p) for b in range(1, 9) for p in PACKINGS if p != "uint4" or b <= 4]
ROWS = [
    (1,), (7,), (256,), (300,), (2, 5), (3, 5), (128, 3), (3, 5, 7), (2, 64, 3), (5, 1, 8),
]  # fmt: skip
EXCHANGES = re.compile(r"all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter")


def codes_of(shape: tuple[int, ...], bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


def held_bytes(parts: tuple[jax.Array, ...]) -> float:
    """Counted from the arrays, two numbers of 4 bits to a byte."""
    return sum(-(-x.size // 2) if x.dtype == jnp.uint4 else x.size for x in parts)


def exchanges_in(program: Any) -> list[str]:
    """Operations by which devices send each other anything."""
    return EXCHANGES.findall(program.as_text())


def assert_come_back(*cases: tuple[tuple[int, ...], int, Any]) -> None:
    """Codes of each shape, bits and packing: all in one program."""

    @jax.jit
    def both(every: list[jax.Array]) -> Any:
        packed = [pack(codes, *kind) for codes, (_, *kind) in zip(every, cases, strict=True)]
        found = [unpack(parts, *case) for parts, case in zip(packed, cases, strict=True)]
        return packed, found

    every = [codes_of(shape, bits) for shape, bits, _ in cases]
    for case, codes, packed, found in zip(cases, every, *both(every), strict=True):
        assert (found.shape, found.dtype) == (case[0], np.uint8)
        np.testing.assert_array_equal(found, codes, str(case))
        assert held_bytes(packed) == packed_bytes(*case)


@settings(deadline=None, max_examples=5)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 17), max_size=3).map(tuple),
            st.sampled_from(KINDS),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_codes_come_back_from_arrays_of_any_shape(cases: list[Any]) -> None:
    assert_come_back(*((shape, *kind) for shape, kind in cases))


def test_codes_come_back_in_every_packing() -> None:
    assert_come_back(*(((2, 16, 3), *kind) for kind in KINDS))


@pytest.mark.parametrize(("bits", "packing"), [(3, "planes"), (7, "auto")])
def test_codes_come_back_from_every_kind_of_shape(bits: int, packing: Any) -> None:
    shapes = [(), (1,), (33,), (16, 3), (3, 16), (8, 3, 3), (0, 8), (8, 0)]
    assert_come_back(*((shape, bits, packing) for shape in shapes))


@pytest.mark.parametrize("bits", range(1, 9))
def test_kept_bytes_are_the_bits(bits: int) -> None:
    shape = (64, 128)
    for packing in ("auto", "planes", "nibbles"):
        assert packed_bytes(shape, bits, packing) == 64 * 128 * bits // 8
    assert packed_bytes(shape, bits, "uint8") == 64 * 128


@pytest.mark.parametrize("size", [1, 7, 9, 31, 33])
def test_padding_is_less_than_eight_elements(size: int) -> None:
    for shape in ((size,), (size, 3), (3, size)):
        for bits in range(1, 4):
            assert packed_bytes(shape, bits) == bits * math.ceil(math.prod(shape) / 8)


@pytest.mark.parametrize(("backend", "four"), [("cpu", ["uint8"]), ("gpu", ["uint4"])])
def test_up_to_three_bits_are_held_in_bytes_and_four_in_uint4_where_that_is_packed(
    monkeypatch: pytest.MonkeyPatch, backend: str, four: list[str]
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    codes = jax.ShapeDtypeStruct((8, 16), np.uint8)
    packed = [jax.eval_shape(lambda c, bits=bits: pack(c, bits), codes) for bits in range(1, 9)]
    dtypes = [[part.dtype.name for part in parts] for parts in packed]
    assert dtypes[:3] == [["uint8"] * bits for bits in (1, 2, 3)]
    assert dtypes[3] == four
    assert dtypes[4:7] == [four + ["uint8"] * bits for bits in (1, 2, 3)]
    assert dtypes[7] == ["uint8"]


def test_bytes_of_three_bits_are_those_worked_by_hand() -> None:
    # Quarters (5, 2) (7, 0) (3, 6) (1, 4): their first three in numbers of 4 bits, of which bit 3
    # holds a bit of the last: 5+8, 2 | 7, 0 | 3, 6+8; then halves of each: low + 16 · high.
    codes = jnp.array([5, 2, 7, 0, 3, 6, 1, 4], jnp.uint8)
    nibbles = [part.astype(jnp.uint8).tolist() for part in pack(codes, 3, "nibbles")]
    assert nibbles == [[13, 2], [7, 0], [3, 14]]
    assert [part.tolist() for part in pack(codes, 3)] == [[45], [7], [227]]


@pytest.mark.parametrize(("bits", "packing"), [(3, "planes"), (2, "nibbles"), (6, "auto")])
def test_works_under_vmap_and_jit(bits: int, packing: Any) -> None:
    codes = codes_of((4, 16, 5), bits)

    def both(c: jax.Array) -> jax.Array:
        return unpack(pack(c, bits, packing), c.shape, bits, packing)

    for found in jax.jit(lambda codes: (jax.vmap(both)(codes), jax.vmap(both, 2, 2)(codes)))(codes):
        np.testing.assert_array_equal(found, codes)


def square_times_codes(bits: int, packing: Any) -> Any:
    """An elementwise function that keeps codes alone, and whose backward pass decodes them."""

    @jax.custom_vjp
    def fn(x: jax.Array) -> jax.Array:
        return x * x

    def forward(x: jax.Array) -> Any:
        codes = jnp.clip(jnp.round(x), 0, 2**bits - 1).astype(jnp.uint8)
        return x * x, pack(codes, bits, packing)

    def backward(packed: Any, gradient: jax.Array) -> Any:
        return (gradient * unpack(packed, gradient.shape, bits, packing).astype(gradient.dtype),)

    fn.defvjp(forward, backward)
    return fn


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("packing", ["planes", "nibbles", "uint4", "uint8", "auto"])
def test_batches_stay_on_their_devices(packing: Any, axis_type: AxisType) -> None:
    bits = 3 if packing != "auto" else 7
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    where = NamedSharding(mesh, P("data", None, None))
    fn = square_times_codes(bits, packing)
    x = codes_of((8, 64, 128), bits).astype(np.float32)
    with jax.set_mesh(mesh):
        step = jax.jit(lambda x, g: jax.vjp(fn, x)[1](g)[0])
        placed, gradient = jax.device_put((x, np.ones_like(x)), where)
        program = step.lower(placed, gradient).compile()
        assert not exchanges_in(program)
        result = program(placed, gradient)
    assert result.sharding.is_equivalent_to(where, 3)
    np.testing.assert_array_equal(result, x)


@pytest.mark.parametrize(
    ("packing", "exchanged"), [("uint4", False), ("uint8", False), ("planes", True)]
)
def test_only_elementwise_packings_leave_sharded_rows_alone(packing: Any, exchanged: bool) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    fn = square_times_codes(3, packing)
    step = jax.jit(lambda x, g: jax.vjp(fn, x)[1](g)[0])
    assert bool(exchanges_in(step.lower(rows, rows).compile())) == exchanged


@pytest.mark.parametrize(
    ("shape", "partition"),
    [((64, 16), P("data", None)), ((64, 5), P("data", None)), ((3, 8), P(None, "data"))],
    ids=["other axis", "gathered", "flattened"],
)
def test_explicit_meshes_take_any_partition(shape: Any, partition: P) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = codes_of(shape, 3).astype(np.float32)
    fn = square_times_codes(3, "planes")
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, partition))
        result = jax.jit(lambda x: jax.vjp(fn, x)[1](jnp.ones_like(x))[0])(placed)
    np.testing.assert_array_equal(result, x)


def test_nothing_but_the_codes_is_computed_from_them() -> None:
    """No gather, scatter or sort: elementwise operations, slices and concatenations."""
    codes = jax.ShapeDtypeStruct((64, 128), jnp.uint8)
    closed = jax.make_jaxpr(lambda c: unpack(pack(c, 3), c.shape, 3))(codes)
    names: set[str] = set()

    def visit(jaxpr: core.Jaxpr) -> None:
        for equation in jaxpr.eqns:
            names.add(equation.primitive.name)
            for inner in equation.params.values():
                if isinstance(inner, core.ClosedJaxpr):
                    visit(inner.jaxpr)

    visit(closed.jaxpr)
    assert "concatenate" in names
    assert not names & {"gather", "scatter", "sort", "transpose", "dynamic_slice"}


@pytest.mark.parametrize(
    ("bits", "packing", "words"),
    [
        (5, "uint4", "at most 4 bits; these have bits=5"),
        (0, "auto", "bits=0 must be an integer from 1 to 8"),
        (9, "uint8", "bits=9"),
        (5, "rows", "4 or 8 bits; these have bits=5"),
        (3, "bits", "packing='bits' must be one of auto, planes, nibbles, uint4, uint8"),
    ],
)
def test_bad_arguments_are_refused(bits: int, packing: Any, words: str) -> None:
    codes = jnp.zeros((8,), jnp.uint8)
    for call in (
        lambda: pack(codes, bits, packing),
        lambda: unpack((codes,), (8,), bits, packing),
        lambda: packed_bytes((8,), bits, packing),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.parametrize(
    ("bits", "dtypes"), [(3, ["uint4"] * 3), (6, ["uint4"] * 3), (8, ["uint8"])]
)
def test_left_alone_a_tpu_gets_no_planes(
    monkeypatch: pytest.MonkeyPatch, bits: int, dtypes: list[str]
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    codes = codes_of((16, 4), bits)
    packed = jax.jit(lambda codes: pack(codes, bits))(codes)
    assert [part.dtype.name for part in packed] == dtypes
    found = jax.jit(lambda packed: unpack(packed, codes.shape, bits))(packed)
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows_lose_nothing_and_halve_an_axis(shape: tuple[int, ...]) -> None:
    codes = codes_of(shape, 4)
    (packed,) = jax.jit(lambda codes: pack(codes, 4, "rows"))(codes)
    axis = packing_of(shape).axis
    halved = tuple(-(-n // 2) if i == axis else n for i, n in enumerate(shape))
    assert (packed.shape, packed.dtype) == (halved, jnp.uint8)
    assert packed.nbytes == packed_bytes(shape, 4, "rows")
    if any(n % 2 == 0 for n in shape[:-1] or shape):
        assert packed.nbytes == math.prod(shape) / 2
    found = jax.jit(lambda packed: unpack((packed,), shape, 4, "rows"))(packed)
    np.testing.assert_array_equal(found, codes)


def test_the_last_axis_is_packed_only_where_there_is_no_other() -> None:
    assert all(packing_of(shape).axis < len(shape) - 1 for shape in ROWS if len(shape) > 1)


def test_no_byte_joins_rows_of_different_runs_of_64() -> None:
    row = np.zeros((256, 4), np.uint8)
    row[130] = 15  # row 2 of the third run
    (packed,) = jax.jit(lambda codes: pack(codes, 4, "rows"))(row)
    (touched,) = np.unique(np.nonzero(np.asarray(packed))[0])
    assert touched == 2 * 32 + 2


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_an_empty_array_stays_empty(shape: tuple[int, ...], bits: int) -> None:
    packed = pack(jnp.zeros(shape, jnp.uint8), bits, "rows")
    assert unpack(packed, shape, bits, "rows").shape == shape
    assert packed_bytes(shape, bits, "rows") == 0
