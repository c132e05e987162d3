"""Attention in chunks against NumPy in float64, and the choice among implementations."""

import functools
import re
from typing import Any

from close import assert_close
import jax
from jax.ad_checkpoint import checkpoint_policies
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.layers import chunked_attention, dot_product_attention
from lowrank_optax.layers.attention import chunked, implementations

# The least chunks: 128 queries by 128 keys.
small_chunks = functools.partial(chunked_attention, chunk_bytes=1)


def drawn(
    batch: int, queries: int, keys: int, heads: int, key_heads: int, width: int, dtype: Any
) -> tuple[jax.Array, ...]:
    """Queries, keys, values and the output's gradient."""
    rng = np.random.default_rng(queries)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    of_keys = (batch, keys, key_heads, width)
    of_queries = (batch, queries, heads, width)
    return draw(*of_queries), draw(*of_keys), draw(*of_keys), draw(*of_queries)


def visible(
    queries: int, keys: int, is_causal: bool = False, window: tuple[int, int] | None = None
) -> np.ndarray:
    ahead = np.subtract.outer(np.arange(queries), np.arange(keys))
    seen = (ahead >= 0) | (not is_causal)
    return seen if window is None else seen & (ahead <= window[0]) & (-ahead <= window[1])


def reference(arrays: tuple[Any, ...], seen: np.ndarray, scale: float) -> tuple[np.ndarray, ...]:
    """Output and gradients in float64, with all weights; 0 where nothing is seen."""
    query, key, value, gradient = (np.asarray(x, np.float64).swapaxes(1, 2) for x in arrays)
    heads, key_heads = query.shape[1], key.shape[1]
    repeat = lambda x: np.repeat(x, heads // key_heads, axis=1)
    sum_groups = lambda x: x.reshape(len(x), key_heads, -1, *x.shape[2:]).sum(2)
    weights = np.exp(scale * query @ repeat(key).swapaxes(2, 3)) * seen
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1)
    d_weights = gradient @ repeat(value).swapaxes(2, 3)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    results = (
        weights @ repeat(value),
        d_scores @ repeat(key),
        sum_groups(d_scores.swapaxes(2, 3) @ query),
        sum_groups(weights.swapaxes(2, 3) @ gradient),
    )
    return tuple(x.swapaxes(1, 2) for x in results)


def with_gradients(fn: Any, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    @jax.jit
    def run(query: Any, key: Any, value: Any, gradient: Any) -> Any:
        output, backward = jax.vjp(fn, query, key, value)
        return output, *backward(gradient)

    return run(*arrays)


f32, bf16 = jnp.float32, jnp.bfloat16


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 300, 300, 4, 2, 8, f32), {"is_causal": True}),
        ((1, 130, 300, 2, 2, 8, f32), {"scale": 0.5}),
        ((1, 300, 300, 4, 1, 8, f32), {"is_causal": True, "local_window_size": (40, 0)}),
        ((1, 300, 130, 2, 1, 8, f32), {"local_window_size": (30, 140)}),
        ((2, 256, 256, 4, 2, 16, bf16), {"is_causal": True}),
    ],
    ids=["causal", "all", "window", "two-sided, some see nothing", "bfloat16"],
)
def test_output_and_gradients_equal_those_in_float64(shape: Any, options: Any) -> None:
    arrays = drawn(*shape)
    window = options.get("local_window_size")
    seen = visible(shape[1], shape[2], options.get("is_causal", False), window)
    expected = reference(arrays, seen, options.get("scale", shape[5] ** -0.5))
    actual = with_gradients(functools.partial(small_chunks, **options), *arrays)
    assert {x.dtype for x in actual} == {jnp.dtype(shape[6])}
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y, dtype=shape[6])


@pytest.mark.parametrize("axes", [(2, 4, 300, 300), (2, 1, 1, 300), (1, 4, 300, 1)])
def test_a_mask_hides_pairs_by_head_or_for_all(axes: tuple[int, ...]) -> None:
    arrays = drawn(2, 300, 300, 4, 2, 8, f32)
    mask = np.random.default_rng(0).random(axes) < 0.7
    expected = reference(arrays, mask & visible(300, 300, is_causal=True), 8**-0.5)
    actual = with_gradients(
        lambda q, k, v: small_chunks(q, k, v, jnp.asarray(mask), is_causal=True), *arrays
    )
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_it_is_that_of_jax_where_every_query_sees_a_key(dtype: Any) -> None:
    arrays = drawn(1, 200, 200, 4, 2, 16, dtype)
    options = {"is_causal": True, "local_window_size": (150, 3)}
    actual = with_gradients(functools.partial(small_chunks, **options), *arrays)
    plain = functools.partial(jax.nn.dot_product_attention, **options)
    for x, y in zip(actual, with_gradients(plain, *arrays), strict=True):
        assert_close(x, y)


def test_a_query_that_sees_nothing_gets_zero_where_jax_has_the_mean_of_all_values() -> None:
    query, key, value, _ = drawn(1, 140, 10, 1, 1, 8, f32)
    options = {"local_window_size": (5, 0)}
    output = jax.jit(functools.partial(chunked_attention, **options))(query, key, value)
    plain = jax.nn.dot_product_attention(query, key, value, **options)
    assert_close(output[:, :15], plain[:, :15])
    assert not output[:, 15:].any()
    assert_close(plain[:, 15:], jnp.broadcast_to(value.mean(1, keepdims=True), (1, 125, 1, 8)))


@pytest.mark.parametrize("window", [2**31 - 1, (5, 2**31 - 1), [2**40, 3], np.int64(1000)])
@pytest.mark.parametrize("name", ["xla", "chunked"])
def test_a_window_beyond_the_length_hides_nothing(window: Any, name: Any) -> None:
    query, key, value, _ = drawn(1, 20, 30, 1, 1, 8, f32)
    pair = tuple(window) if isinstance(window, list | tuple) else (int(window),) * 2
    windowed = functools.partial(dot_product_attention, implementation=name)
    actual = windowed(query, key, value, local_window_size=window)
    seen = jnp.asarray(visible(20, 30, window=pair))[None, None]
    assert_close(actual, jax.nn.dot_product_attention(query, key, value, mask=seen))


def test_a_nan_stays_in_the_rows_that_see_it() -> None:
    query, key, value, _ = drawn(1, 300, 300, 1, 1, 8, f32)
    causal = jax.jit(functools.partial(small_chunks, is_causal=True))
    output = causal(query.at[0, 7].set(jnp.nan), key, value)
    assert np.isnan(output).all((0, 2, 3)).tolist() == [row == 7 for row in range(300)]
    output = causal(query, key.at[0, 290].set(jnp.nan), value)
    assert np.isnan(output).all((0, 2, 3)).tolist() == [row >= 290 for row in range(300)]


def test_only_chunks_in_which_something_is_seen_are_computed() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        queries, keys, rows, columns = rng.integers(1, 40, 4).tolist()
        before, after = rng.integers(0, 50, 2).tolist()
        plan = chunked._Plan(queries, keys, rows, columns, before, after, 1.0)
        seen = visible(queries, keys, window=(before, after))
        short = ((0, -queries % rows), (0, -keys % columns))
        padded = np.pad(seen, short)
        parts = padded.reshape(len(padded) // rows, rows, -1, columns).any((1, 3))
        starts, stops = plan.key_chunks()
        chunks = np.arange(parts.shape[1])
        computed = (chunks >= starts[:, None]) & (chunks < stops[:, None])
        assert (computed == parts).all()
        assert plan.hides_pairs or seen.all()


def test_chunks_fit_the_bytes_and_no_axis_is_exceeded() -> None:
    assert chunked.chunk_sizes(64, 2048, 2048, 2**24) == (256, 256)
    assert chunked.chunk_sizes(32, 8192, 8192, 2**24) == (256, 512)
    assert chunked.chunk_sizes(1, 8192, 8192, 2**30) == (512, 512)
    assert chunked.chunk_sizes(64, 2048, 2048, 1) == (128, 128)
    assert chunked.chunk_sizes(64, 7, 2048, 2**24) == (7, 256)


def gradient_program(fn: Any, length: int) -> str:
    arrays = [jax.ShapeDtypeStruct((1, length, 2, 8), f32)] * 3
    loss = lambda *x: (fn(*x) ** 2).sum()
    return str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*arrays))


def test_no_array_has_all_pairs_and_what_is_saved_is_linear_in_the_length() -> None:
    causal = functools.partial(chunked_attention, is_causal=True)
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    assert "1024,1024" in gradient_program(plain, 1024)
    assert "1024,1024" not in gradient_program(causal, 1024)
    arrays = [jax.ShapeDtypeStruct((1, 1024, 2, 8), f32)] * 3
    report = lro.planning.saved_residuals(lambda *x: causal(*x).sum(), *arrays, compiled=False)
    # The output and the logarithm of its sum, beside the inputs.
    assert report.total_bytes == 4 * 1024 * 2 * (8 + 1)


def test_a_policy_that_saves_attention_context_spares_the_second_forward_pass() -> None:
    save = checkpoint_policies.save_only_these_names("attention_context")
    causal = functools.partial(chunked_attention, is_causal=True)
    loops = lambda fn: len(re.findall(r"\bscan\[", gradient_program(fn, 300)))
    assert loops(causal) == 2
    assert loops(jax.checkpoint(causal)) == 3
    assert loops(jax.checkpoint(causal, policy=save)) == 2


def test_a_sharded_batch_and_sharded_heads_are_computed_without_communication() -> None:
    *arrays, _ = drawn(4, 200, 200, 4, 2, 8, f32)
    loss = lambda *x: (small_chunks(*x, is_causal=True) ** 2).sum()
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    expected = gradients(*arrays)
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "heads"))
    sharded = [jax.device_put(x, sharding) for x in arrays]
    program = gradients.lower(*sharded).compile()
    assert not re.search("all-(reduce|gather|to-all)|collective", program.as_text())
    assert_close(program(*sharded), expected)


@pytest.mark.parametrize(
    ("key_heads", "of_queries", "of_keys"),
    [
        (2, PartitionSpec("data", None, "heads"), PartitionSpec()),
        (1, PartitionSpec(None, None, "heads"), PartitionSpec("data")),
    ],
)
def test_on_explicit_axes_keys_follow_the_queries_and_gradients_the_arguments(
    key_heads: int, of_queries: PartitionSpec, of_keys: PartitionSpec
) -> None:
    *arrays, _ = drawn(4, 140, 140, 4, key_heads, 8, f32)
    mask = jnp.ones((4, 4, 1, 140), bool).at[:, 1:, :, 1:9].set(False)
    run = jax.jit(lambda q, k, v, g: (lambda out, back: (out, *back(g)))(*jax.vjp(attend, q, k, v)))
    attend = lambda *x: small_chunks(*x, mask, is_causal=True)
    expected = run(*arrays, arrays[0])
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        specs = (of_queries, of_keys, of_keys)
        sharded = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(arrays, specs, strict=True)
        ]
        mask = jax.device_put(mask, NamedSharding(mesh, PartitionSpec("data", "heads")))
        actual = jax.jit(run.__wrapped__)(*sharded, sharded[0])
    of_results = [jax.typeof(x).sharding.spec for x in (sharded[0], *sharded)]
    assert [x.sharding.spec for x in actual] == of_results
    for x, y in zip(actual, expected, strict=True):
        assert_close(np.asarray(x), y)


def test_a_product_with_the_hessian_is_that_of_jax() -> None:
    *arrays, _ = drawn(1, 140, 140, 2, 1, 8, f32)
    of = lambda fn: jax.grad(lambda *x: (fn(*x, is_causal=True) ** 2).sum(), (0, 1, 2))
    product = lambda fn: jax.jit(lambda *x: jax.jvp(of(fn), x, x)[1])(*arrays)
    for x, y in zip(product(small_chunks), product(jax.nn.dot_product_attention), strict=True):
        assert_close(x, y)


def test_under_shard_map_gradients_of_shared_keys_are_summed() -> None:
    query, key, value, _ = drawn(4, 140, 140, 2, 1, 8, f32)
    key, value = key[:1], value[:1]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec("data"), PartitionSpec(), PartitionSpec())
    sharded = jax.shard_map(small_chunks, mesh=mesh, in_specs=specs, out_specs=specs[0])
    whole = lambda q, k, v: small_chunks(q, *(jnp.repeat(x, 4, 0) for x in (k, v)))
    of = lambda fn: jax.jit(jax.grad(lambda *x: (fn(*x) ** 2).sum(), (0, 1, 2)))
    assert_close(of(sharded)(query, key, value), of(whole)(query, key, value))


def test_vmap_is_one_more_axis_of_the_batch() -> None:
    *arrays, _ = drawn(3, 140, 140, 2, 1, 8, f32)
    mapped = jax.jit(jax.vmap(small_chunks))
    output = mapped(*(x[:, None] for x in arrays))[:, 0]
    assert_close(output, jax.nn.dot_product_attention(*arrays))


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_arrays_give_an_empty_output_or_zeros(shape: tuple[int, ...]) -> None:
    query, key, value, _ = drawn(*shape, 2, 1, 8, f32)
    output = chunked_attention(query, key, value)
    assert output.shape == query.shape
    assert not output.any()


Q, K = jnp.zeros((2, 5, 4, 8)), jnp.zeros((2, 7, 2, 8))


@pytest.mark.parametrize(
    ("sentence", "args", "options"),
    [
        (r"value must have the key's shape \(2, 7, 2, 8\)", (Q, K, K[:, 1:]), {}),
        (r"must be \[batch, length, heads, width\]", (Q[0], K, K), {}),
        ("the same batch and width", (Q[:1], K, K), {}),
        (
            "4 heads, which must be a multiple of the key's 3",
            (Q, *[jnp.zeros((2, 7, 3, 8))] * 2),
            {},
        ),
        ("float32, bfloat16 and bfloat16", (Q, *[K.astype(bf16)] * 2), {}),
        (r"broadcast to \(2, 4, 5, 7\), got bool", (Q, K, K, jnp.ones((2, 4, 5), bool)), {}),
        ("mask must be bool", (Q, K, K, jnp.ones((2, 4, 5, 7))), {}),
        *[
            (
                rf"local_window_size={re.escape(repr(window))} must be an integer or a pair of",
                (Q, K, K),
                {"local_window_size": window},
            )
            for window in (-1, (3, -1), (1, 2, 3), 1.5, (None, 0), True)
        ],
    ],
)
@pytest.mark.parametrize("fn", [chunked_attention, dot_product_attention])
def test_what_does_not_fit_is_refused(fn: Any, sentence: str, args: Any, options: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        fn(*args, **options)


@pytest.mark.parametrize("fn", [chunked_attention, dot_product_attention])
def test_a_scale_that_is_no_number_at_compilation_is_refused(fn: Any) -> None:
    with pytest.raises(ValueError, match="must be a number when the program is compiled"):
        jax.make_jaxpr(lambda scale: fn(Q, K, K, scale=scale))(1.0)


def test_chunk_bytes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk_bytes=0 must be at least 1"):
        chunked_attention(Q, K, K, chunk_bytes=0)


def names_in(fn: Any, length: int, width: int = 8) -> str:
    arrays = [jax.ShapeDtypeStruct((1, length, 2, width), f32)] * 3
    return str(jax.make_jaxpr(fn)(*arrays))


def test_the_default_is_plain_up_to_256_by_256_pairs_and_chunked_beyond() -> None:
    assert "256,256" in names_in(dot_product_attention, 256)
    assert "scan[" in names_in(dot_product_attention, 257)
    assert "attention_context" in names_in(dot_product_attention, 256)
    plain = functools.partial(dot_product_attention, implementation="xla")
    assert "512,512" in names_in(plain, 512)


def test_on_one_tpu_the_default_is_its_kernel_for_whole_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    arrays = lambda length, width, dtype=f32: (jnp.zeros((1, length, 1, width), dtype),) * 2
    default = implementations.default_implementation
    assert default(*arrays(512, 128), None) == "chunked"  # eight devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert default(*arrays(512, 128), None) == "splash"
    assert default(*arrays(512, 64), None) == "chunked"
    assert default(*arrays(500, 128), None) == "chunked"
    assert default(*arrays(512, 128, jnp.float16), None) == "chunked"
    assert default(*arrays(512, 128), jnp.ones((1, 1, 1, 1), bool)) == "chunked"
    assert default(*arrays(128, 128), None) == "xla"


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("splash", "it needs a TPU, and JAX's default backend is 'cpu'"),
        ("cudnn", "it needs an Nvidia GPU with cuDNN, and JAX's default backend is 'cpu'"),
        ("tokamax", r"the package tokamax is not installed \(pip install tokamax\)"),
    ],
)
def test_an_implementation_that_cannot_run_says_what_is_missing(
    name: Any, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementations, "find_spec", lambda _: None)
    with pytest.raises(NotImplementedError, match=f"implementation='{name}' cannot run: {missing}"):
        dot_product_attention(Q, K, K, implementation=name)


def test_splash_attention_refuses_masks_and_ragged_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for mask, sentence in [
        (jnp.ones((1, 1, 1, 1), bool), "it takes no mask"),
        (None, "multiples of 128, and are 5 of queries and 7 of keys"),
    ]:
        with pytest.raises(NotImplementedError, match=sentence):
            dot_product_attention(Q, K, K, mask, implementation="splash")


def test_an_unknown_implementation_is_refused_with_the_names() -> None:
    with pytest.raises(
        ValueError, match="implementation='flash' must be None or one of 'xla', 'ch"
    ):
        dot_product_attention(Q, K, K, implementation="flash")  # pyrefly: ignore
