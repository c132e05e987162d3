"""Attention by random features: time, memory, error; with frozen scores: two miniatures.

    python benchmarks/random_feature_attention.py             # what the results file lacks
    python benchmarks/random_feature_attention.py --markdown  # the tables as Markdown

Times are of causal attention with gradients, in turn with `jax.nn.dot_product_attention` of equal
operands. Errors are those of outputs, against softmax in float32. The miniatures fit the values of
frozen scores by ridge regression: targets of 8 tokens of norm 1, and the kernel of many heads
against that of infinitely many. Some ten minutes of a core; a stopped run goes on after the last
result.
"""

import argparse
from pathlib import Path
from typing import Any

from family_table import Column, print_columns
import jax
import jax.numpy as jnp
import numpy as np
from projection_family import RESULTS, Results
from timing import Program, milliseconds

import lowrank_optax as lro
from lowrank_optax.layers import RandomFeatures

LENGTHS = (512, 1024, 2048, 4096, 8192)
HEADS, WIDTH = 4, 64
COUNTS = (64, 256, 1024)
KINDS = ("trig", "positive", "positive_pm")
NORMS = (1.0, 4.0)  # of scaled queries and keys
TOKENS = DIMENSION = 8
FROZEN_HEADS = 150
PENALTIES = 10.0 ** np.arange(-4, 3)
TARGETS = {
    "mean ⟨β, xᵢ⟩²": lambda query, keys, beta: (keys @ beta) ** 2,
    "mean ⟨x₀, xᵢ⟩ ⟨β, xᵢ⟩": lambda query, keys, beta: (keys @ query) * (keys @ beta),
    "mean ⟨x₀, xᵢ⟩³ ⟨β, xᵢ⟩": lambda query, keys, beta: (keys @ query) ** 3 * (keys @ beta),
}
MANY = (16, 64, 256, 1024)


def attention_times(length: int, rounds: int) -> dict[str, float]:
    """Milliseconds of outputs and gradients, and the bytes of temporaries."""
    operands = tuple(jax.random.normal(jax.random.key(0), (3, 1, length, HEADS, WIDTH)))

    def step(attention: Any) -> Any:
        loss = lambda operands: jnp.square(attention(*operands, is_causal=True)).sum()
        return jax.jit(lambda operands: jax.grad(loss)(operands)).lower(operands).compile()

    compiled = {
        "features": step(lro.layers.random_feature_attention),
        "softmax": step(jax.nn.dot_product_attention),
    }
    # Each result takes the place of the operands: shapes are the same.
    programs = {name: Program(program, operands) for name, program in compiled.items()}
    times = milliseconds(programs, rounds)
    memory = {
        f"{name} bytes": program.memory_analysis().temp_size_in_bytes
        for name, program in compiled.items()
    }
    return {name: round(x, 2) for name, x in times.items()} | memory


def softmax_error(kind: str, count: int, norm: float, seeds: int) -> list[float]:
    """Errors of causal attention's output over its norm, by seed of the features."""
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 256, 2, 32))
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    query, key = norm * unit(query), norm * unit(key)
    exact = jax.nn.dot_product_attention(query, key, value, scale=1.0, is_causal=True)
    errors = []
    for seed in range(seeds):
        features = RandomFeatures(count, kind=kind, seed=seed)
        options = {"features": features, "scale": 1.0, "is_causal": True}
        out = lro.layers.random_feature_attention(query, key, value, **options)
        errors.append(float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)))
    return errors


def draw(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries ``[count, 1, d]`` and keys ``[count, N, d]`` of norm 1."""
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    shapes = (count, 1, DIMENSION), (count, TOKENS, DIMENSION)
    query, keys = (unit(rng.normal(size=shape)) for shape in shapes)
    return query.astype(np.float32), keys.astype(np.float32)


def ridge_error(target: Any, mean: str, count: int, seed: int) -> float:
    """Test error over the target's variance, with the best penalty."""
    rng = np.random.default_rng(seed)
    beta = rng.normal(size=DIMENSION)
    beta /= np.linalg.norm(beta)
    matrices = lro.layers.score_matrices(
        jax.random.key(seed), range(FROZEN_HEADS), DIMENSION + 1, mean=mean
    )
    features, labels = [], []
    for size in (count, 1000):
        query, keys = draw(rng, size)
        made = jax.jit(lro.layers.frozen_score_features)(query, keys, matrices)
        features.append(np.asarray(made, np.float64).reshape(size, -1))
        labels.append(
            np.array([target(q[0], x, beta).mean() for q, x in zip(query, keys, strict=True)])
        )
    (train, test), (known, wanted) = features, labels
    gram, values = train @ train.T, []
    for penalty in PENALTIES:
        dual = np.linalg.solve(gram + penalty * np.eye(count), known)
        values.append(np.mean((test @ (train.T @ dual) - wanted) ** 2) / np.var(wanted))
    return round(float(min(values)), 4)


def kernel_error(heads: int, mean: str, seeds: int) -> list[float]:
    """Errors of the mean over heads against `infinite_head_kernel`, over its norm, by seed."""
    query, keys = draw(np.random.default_rng(0), 12)
    kernel = lambda a, b: lro.layers.infinite_head_kernel(a[0][0], a[1], b[0][0], b[1], mean=mean)
    pairs = jax.vmap(jax.vmap(kernel, (None, 0)), (0, None))
    exact = np.asarray(jax.jit(pairs)((query, keys), (query, keys)))
    errors = []
    for seed in range(seeds):
        matrices = lro.layers.score_matrices(
            jax.random.key(seed), range(heads), DIMENSION + 1, mean=mean
        )
        made = np.asarray(lro.layers.frozen_score_features(query, keys, matrices), np.float64)
        flat = made.reshape(len(query), -1)
        found = flat @ flat.T / heads
        errors.append(float(np.linalg.norm(found - exact) / np.linalg.norm(exact)))
    return errors


def main() -> None:
    """Measures what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "random_feature_attention.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    results = Results(args.output, {"seeds": args.seeds, "heads": HEADS, "width": WIDTH}, args.log)
    for length in LENGTHS:
        measure = lambda n=length: attention_times(n, args.rounds)
        results.once(("times", str(length)), measure)
    for kind in KINDS:
        for norm in NORMS:
            for count in COUNTS:
                measure = lambda k=kind, c=count, n=norm: softmax_error(k, c, n, args.seeds)
                results.once(("errors", f"{kind} {norm:g}", str(count)), measure)
    for name, target in TARGETS.items():
        for count in (500, 1500):
            for mean in ("zero", "identity"):
                measure = lambda t=target, m=mean, c=count: [
                    ridge_error(t, m, c, seed) for seed in range(args.seeds)
                ]
                results.once(("ridge", name, f"{mean} {count}"), measure)
    for mean in ("zero", "identity"):
        for heads in MANY:
            measure = lambda h=heads, m=mean: kernel_error(h, m, 8)
            results.once(("kernel", mean, str(heads)), measure)
    print_tables(results.content, args.markdown)


def print_tables(content: dict[str, Any], markdown: bool) -> None:
    """Times and memory by length; errors by features; ridge errors; errors of the kernel."""
    cache = lambda length: 2 * int(length) * WIDTH * 4
    state = (WIDTH + 1) * 128 * 4 + 4
    columns = [
        Column("length", lambda row: row[0]),
        Column("features", lambda row: f"{row[1]['features']:.1f} ms"),
        Column("softmax", lambda row: f"{row[1]['softmax']:.1f} ms"),
        Column("softmax / features", lambda row: f"{row[1]['softmax'] / row[1]['features']:.1f}"),
        Column("temporaries", lambda row: f"{row[1]['features bytes'] / 2**20:.0f} MiB"),
        Column("of softmax", lambda row: f"{row[1]['softmax bytes'] / 2**20:.0f} MiB"),
        Column("state of a head", lambda row: f"{state / 2**10:.1f} KiB"),
        Column("cache of a head", lambda row: f"{cache(row[0]) / 2**10:.0f} KiB"),
    ]
    print_columns("Causal attention", list(content["times"].items()), columns, markdown)
    mean = lambda values: f"{100 * np.mean(values):.1f} %"
    columns = [Column("features, norm", lambda row: row[0])]
    columns += [Column(str(c), lambda row, c=c: mean(row[1][str(c)])) for c in COUNTS]
    print_columns(
        "Error of the output by directions", list(content["errors"].items()), columns, markdown
    )
    found = lambda row, key: (
        f"{np.mean(row[1][key]):.3f} ({min(row[1][key]):.3f}–{max(row[1][key]):.3f})"
    )
    columns = [Column("target", lambda row: row[0])]
    columns += [
        Column(f"{name}, n = {n}", lambda row, k=f"{name} {n}": found(row, k))
        for n in (500, 1500)
        for name in ("zero", "identity")
    ]
    print_columns("Test error over variance", list(content["ridge"].items()), columns, markdown)
    columns = [Column("mean", lambda row: row[0])]
    columns += [Column(f"{m} heads", lambda row, m=m: mean(row[1][str(m)])) for m in MANY]
    columns += [Column("slope", lambda row: f"{slope(row[1]):.2f}")]
    print_columns("Error of the kernel", list(content["kernel"].items()), columns, markdown)


def slope(errors: dict[str, list[float]]) -> float:
    """The power of the number of heads by which the error falls."""
    log = np.log([np.mean(each) for each in errors.values()])
    return float(np.polyfit(np.log([float(m) for m in errors]), log, 1)[0])


if __name__ == "__main__":
    main()
