"""The decoder's variants in the main job at equal training FLOPs, and a dense one of equal size.

    python benchmarks/decoder_variants.py             # whatever is missing in the results file
    python benchmarks/decoder_variants.py --markdown  # the table as Markdown

Each run is the main job's, by AdamW at its own learning rate, which is the same for all. A variant
whose step has fewer operations makes more steps, its schedule stretched alike. Beside structured
feed-forwards stands a dense one so narrow that the decoder has as many parameters, beside shared
blocks with experts such ones so wide that it has as many as the dense decoder. Three seeds; an hour
of a core; a stopped run goes on after the last result.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any

from family_table import Column, print_columns
from flax import nnx
import numpy as np
from projection_family import RESULTS, Results

from lowrank_optax.adapters.base import parameter_count
from lowrank_optax.models import Decoder, DecoderConfig, decoder_config

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODEL, WORDS, BATCH, LENGTH = "llama-tiny", 257, 4, 128
STRUCTURES = {"LowRank": "lowrank", "BlockDense": "blockdense", "BlockShuffle": "blockshuffle"}
GUIDED = 0.5  # of the steps
PENALTY = ("--rank-penalty", "1", "--rank-threshold", "1e-3")


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the dense decoder.

    Attributes:
      flags: Those of the main job.
      options: The same for `Decoder`.
      width: Intermediate size, where it is not the model's.
      equal_steps: Whether it makes the dense decoder's steps, whatever they cost.
    """

    flags: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    width: int | None = None
    equal_steps: bool = False

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        other = {} if self.width is None else {"intermediate_size": self.width}
        return decoder_config(MODEL, vocab_size=WORDS, **other)

    def parameters(self) -> int:
        """Number of weights, without guides."""
        return parameter_count(nnx.state(self._model(), nnx.Param))

    def _model(self) -> Decoder:
        options = dict(self.options)
        return nnx.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0), **options))

    def operations(self) -> float:
        """Multiplications per token and step, forward and twice as many backward.

        Of matrices, of attention's scores and values, and, in the guided part of the steps, of half
        of the guides: that many are not skipped, on average over the schedule.
        """
        config, model = self.config, self._model()
        forward = self.parameters() - config.vocab_size * config.hidden_size  # an embedding is read
        if model.experts is not None:
            experts = parameter_count(nnx.state(model.blocks.mlp.experts, nnx.Param))
            forward -= experts * (1 - model.experts.top_k / model.experts.num_experts)
        layers = config.num_hidden_layers
        if model.share_blocks:
            outside = parameter_count(
                nnx.state([model.embed, model.norm, model.lm_head], nnx.Param)
            )
            outside -= config.vocab_size * config.hidden_size
            forward = outside + layers * (forward - outside)
        scores = 2 * LENGTH * config.hidden_size
        if model.features is not None:
            count, chunk, width = model.features.width(), model.features.chunk_size, config.head_dim
            scores = config.num_attention_heads * (4 * count * width + chunk * (count + width))
        forward += layers * scores
        if "--self-guided" in self.flags:
            blocks = config.num_hidden_layers - 1
            dense = 3 * config.hidden_size * config.intermediate_size
            forward += GUIDED * 0.5 * blocks * dense
        return 3 * forward


def variants() -> dict[str, Variant]:
    """All of them by name."""
    found = {"dense": Variant()}
    for name, flag in STRUCTURES.items():
        options = (("feed_forward", flag),)
        structured = Variant(("--feed-forward", flag), options)
        found[name] = structured
        found[f"{name}, self-guided"] = Variant(
            (*structured.flags, "--self-guided", f"{GUIDED}"), options
        )
    found["dense, narrow"] = Variant(width=_width_for(found["LowRank"].parameters()))
    found["ComRoPE"] = Variant(("--position", "comrope"), (("position", "comrope"),))
    features = (("attention", "random-features"),)
    found["random features"] = Variant(("--attention", "random-features"), features)
    shared = ("--share-blocks",), (("share_blocks", True),)
    found["shared blocks"] = Variant(*shared)
    with_experts = (*shared[0], "--experts", "4"), (*shared[1], ("experts", 4))
    found["WideNet"] = Variant(*with_experts)
    width = _width_for(found["dense"].parameters(), *with_experts)
    found["WideNet, wide"] = Variant(*with_experts, width)
    found["WideNet, wide, equal steps"] = Variant(*with_experts, width, equal_steps=True)
    found["Maestro"] = Variant(("--linear", "maestro"), (("linear", "maestro"),))
    found["Maestro, penalty"] = Variant(("--linear", "maestro", *PENALTY), (("linear", "maestro"),))
    found["fixed point, 8 bits"] = Variant(("--fixed-point", "8"))
    return found


def _width_for(
    parameters: int, flags: tuple[str, ...] = (), options: tuple[tuple[str, Any], ...] = ()
) -> int:
    """The intermediate size with which a decoder has nearest as many parameters."""
    narrow, wide = (Variant(flags, options, width).parameters() for width in (8, 16))
    return round(8 + 8 * (parameters - narrow) / (wide - narrow))


def run(variant: Variant, steps: int, seed: int, cache: str) -> dict[str, Any]:
    """The held-out loss at the end of a run of the main job, and the parameters left."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(variant.config.to_huggingface()))
        counts = {"steps": steps, "batch-size": BATCH, "sequence-length": LENGTH, "seed": seed}
        counts |= {"eval-every": steps, "checkpoint-every": steps, "devices": 1}
        flags = [part for name, value in counts.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, str(EXAMPLES / "pretrain.py"), "--optimizer", "adamw"]
        command += ["--model", str(config), "--output", f"{folder}/run", *flags, *variant.flags]
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
        result = json.loads((Path(folder) / "run" / "results.json").read_text())["adamw"]
        left = variant.parameters()
        for line in done.stdout.splitlines():
            if line.startswith("cut to these ranks"):
                left = int(line.split("->")[1].split()[0].replace(",", ""))
    return {"held_out_loss": result["held_out_loss"], "parameters": left}


def print_table(content: dict[str, Any], markdown: bool) -> None:
    """Mean losses with their standard errors, and each variant against dense, seed by seed."""
    losses = {
        name: np.array([each["held_out_loss"] for each in runs.values()])
        for name, runs in content["runs"].items()
    }

    def against(name: str) -> str:
        ratio = 100 * (losses[name] / losses["dense"][: len(losses[name])] - 1)
        return f"{ratio.mean():+.1f} ± {_error(ratio):.1f} %"

    def parameters(name: str) -> str:
        return f"{np.mean([x['parameters'] for x in content['runs'][name].values()]):,.0f}"

    columns = [
        Column("decoder", lambda name: name),
        Column("parameters", parameters),
        Column("steps", lambda name: f"{content['steps'][name]:,}"),
        Column("held-out loss", lambda n: f"{losses[n].mean():.3f} ± {_error(losses[n]):.3f}"),
        Column("against dense", against),
    ]
    setting = content["setting"]
    title = f"{MODEL}, equal training FLOPs, {setting['dense_steps']} steps of the dense decoder"
    print_columns(title, list(losses), columns, markdown)


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of the dense decoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "decoder_variants.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    setting = {"model": MODEL, "batch_size": BATCH, "sequence_length": LENGTH}
    results = Results(args.output, setting | {"dense_steps": args.steps}, args.log)
    every = variants()
    budget = args.steps * every["dense"].operations()
    with tempfile.TemporaryDirectory() as cache:
        for seed in range(args.seeds):
            for name, variant in every.items():
                steps = round(budget / variant.operations())
                steps = args.steps if variant.equal_steps else steps
                results.once(("steps", name), lambda steps=steps: steps)
                measure = lambda v=variant, steps=steps, seed=seed: run(v, steps, seed, cache)
                results.once(("runs", name, f"seed {seed}"), measure)
    print_table(results.content, args.markdown)


if __name__ == "__main__":
    main()
