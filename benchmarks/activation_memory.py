"""What backward keeps, counted, against the peak that the TPU compiler needs.

    python benchmarks/activation_memory.py                        # for a v5e, without one
    python benchmarks/activation_memory.py --only "decoder: .*4 bits"
    python benchmarks/activation_memory.py --markdown             # the tables of what there is

Two tables, of temporaries beside arguments and results. The first is of the gradient of eight
scanned MLPs in bfloat16. The second is of a train step of a decoder, whose layers are scanned:
AdamW, bfloat16, parameters and state donated. `kept` is what `saved_residuals` counts,
`predicted` the temporaries of the row that a row is compared with, less what is counted to be
saved, and `saved / predicted` how much of that the compiler saves. Rows that are measured already,
of the same sizes, are left as they are.
"""

import argparse
import json
from pathlib import Path
import re
import time
from typing import Any

from activation_memory_cases import Variant, decoder_variants, mlp_variants
from timing import print_table
from tpu_compiler import device_of

RESULTS = Path(__file__).parent / "results" / "activation_memory.json"
COLUMNS = [
    "",
    "kept, MiB",
    "temporaries, MiB",
    "compared with",
    "predicted, MiB",
    "off, %",
    "saved / predicted",
]
Rows = dict[str, dict[str, Any]]


def sizes(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What the numbers of each table belong to."""
    mlp = ("mlp_layers", "mlp_width", "mlp_tokens", "chip")
    decoder = ("model", "layers", "batch", "length", "chip")
    pick = lambda names: {name: getattr(args, name) for name in names}
    return {"mlp": pick(mlp), "decoder": pick(decoder)}


def stored(args: argparse.Namespace) -> dict[str, Any]:
    """What the file holds of these sizes."""
    old = json.loads(args.output.read_text()) if args.output.exists() else {}
    return {
        name: old[name] if old.get(name, {}).get("sizes") == size else {"sizes": size, "rows": {}}
        for name, size in sizes(args).items()
    }


def measure(args: argparse.Namespace, variants: dict[str, dict[str, Variant]]) -> dict[str, Any]:
    """Fills in the rows that are asked for, and writes after each."""
    results = stored(args)
    device = device_of(args.chip)
    for table, rows in variants.items():
        done = results[table]["rows"]
        for name, variant in rows.items():
            if name in done or not re.search(args.only, f"{table}: {name}"):
                continue
            began = time.perf_counter()
            measured = variant.measure(device, args)
            print(f"{table}: {name}: {time.perf_counter() - began:.0f} s", flush=True)
            done[name] = {
                "kept_bytes": measured.kept,
                "temporary_bytes": measured.temporary,
                "against": variant.against,
                "kept_by_name": measured.by_name,
            }
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table_of(rows: Rows, names: list[str]) -> list[list[str]]:
    """The rows as they are printed."""
    mebibytes = lambda n: f"{n / 2**20:,.0f}"
    lines = []
    for name in names:
        if name not in rows:
            continue
        row, base = rows[name], rows.get(rows[name]["against"])
        cells = [name, mebibytes(row["kept_bytes"]), mebibytes(row["temporary_bytes"])]
        if base is None:
            lines.append([*cells, "", "", "", ""])
            continue
        counted = base["kept_bytes"] - row["kept_bytes"]
        predicted = base["temporary_bytes"] - counted
        saved = base["temporary_bytes"] - row["temporary_bytes"]
        off = 100 * (row["temporary_bytes"] / predicted - 1) if predicted > 0 else float("nan")
        ratio = f"{saved / counted:.2f}" if counted else ""
        lines.append([*cells, row["against"], mebibytes(predicted), f"{off:+.0f}", ratio])
    return lines


def show(results: dict[str, Any], variants: dict[str, Any], markdown: bool) -> None:
    """Prints both tables."""
    for table, rows in variants.items():
        lines = table_of(results[table]["rows"], list(rows))
        title = ", ".join(f"{key} {value}" for key, value in results[table]["sizes"].items())
        if not markdown:
            print_table(f"{table}: {title}", COLUMNS, lines)
            continue
        print(f"\n{table}: {title}\n\n|" + "|".join(f" {c} " for c in COLUMNS) + "|")
        print("|---|--:|--:|---|--:|--:|--:|")
        for line in lines:
            print("|" + "|".join(f" {x} " for x in line) + "|")


def main() -> None:
    """Measures what is missing, writes the numbers and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mlp-layers", type=int, default=8)
    parser.add_argument("--mlp-width", type=int, default=1024)
    parser.add_argument("--mlp-tokens", type=int, default=8192)
    parser.add_argument("--model", default="llama-350m")
    parser.add_argument("--layers", type=int, default=None, help="layers; the model's own if none")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--only", default="", help="rows in which this expression is found")
    parser.add_argument("--markdown", action="store_true", help="print, and measure nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    variants = {"mlp": mlp_variants(), "decoder": decoder_variants()}
    results = stored(args) if args.markdown else measure(args, variants)
    show(results, variants, args.markdown)


if __name__ == "__main__":
    main()
