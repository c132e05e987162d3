"""The settings of `finetune.py`: one field each, its flag, and what is refused at once."""

import argparse
from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from _settings import (
    DTYPES,
    LOSS_HELP,
    LOSSES,
    SCHEDULES,
    InputError,
    Parser,
    Settings,
    add_flag,
    add_memory_flags,
    check_remat_every,
    names_in,
)


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """Everything that decides the course of a run."""

    PROGRAM: ClassVar[str] = "lowrank-optax examples/finetune.py"
    FLAGS: ClassVar[dict[str, str]] = {"adapters": "--adapter", "source": "--from"}

    source: str | None = None
    hf: str | None = None
    model: str = "llama-tiny"
    base_steps: int = 800
    data: str | None = None
    base_data: str | None = None
    tokenizer: str | None = None
    adapters: tuple[str, ...] = ("lora", "lotr")
    rank: int = 8
    alpha: float | None = None
    where: str | None = None
    equal_parameters: bool = False
    set: tuple[str, ...] = ()
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: int | None = None
    steps: int = 300
    batch_size: int = 8
    sequence_length: int = 128
    dtype: str | None = None
    loss: Literal["plain", "chunked"] = "plain"
    update_in_backward: bool = False
    remat: str | None = None
    remat_every: int = 1
    devices: int | None = None
    seed: int = 0
    eval_every: int = 50
    eval_sequences: int = 128
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Check the numbers which need nothing but themselves."""
        self.loop()
        if self.rank < 1:
            raise InputError(f"--rank must be at least 1, not {self.rank}")
        if self.base_steps < 1:
            raise InputError(f"--base-steps must be at least 1, not {self.base_steps}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise InputError(f"--alpha must be positive, not {self.alpha}")
        if self.source is not None and self.hf is not None:
            raise InputError("--from and --hf both name a model: give one of them")
        if self.source is not None and self.tokenizer is not None:
            raise InputError("--tokenizer: the run of --from has a tokenizer of its own")
        if self.update_in_backward and self.remat is not None:
            raise InputError("--update-in-backward recomputes every block: leave --remat out")
        check_remat_every(self)
        if len(set(self.adapters)) < len(self.adapters):
            raise InputError("--compare needs different adapters, not one of them twice")

    def loop(self) -> Settings:
        """What the parts shared with the main job read: text, steps, batches and looks."""
        names = ("data", "learning_rate", "schedule", "warmup", "steps", "batch_size", "seed")
        names += ("sequence_length", "devices", "eval_every", "eval_sequences", "checkpoint_every")
        shared: dict[str, Any] = {name: getattr(self, name) for name in names}
        return Settings(**shared)

    def base(self) -> Settings:
        """The main job that makes a small model first: AdamW, as long as `--base-steps`."""
        return Settings(
            model=self.model,
            tokenizer=self.tokenizer,
            optimizers=("adamw",),
            steps=self.base_steps,
            sequence_length=self.sequence_length,
            devices=self.devices,
            seed=self.seed,
            eval_every=max(self.base_steps // 4, 1),
            eval_sequences=self.eval_sequences,
        )


def parse(argv: Sequence[str] | None, known: Sequence[str]) -> tuple[dict[str, Any], Path, bool]:
    """Returns the settings given on the command line, the output folder, and `resume`.

    Args:
      argv: the command line; None for that of the process.
      known: names of all adapters.
    """
    parser = Parser(
        prog="finetune.py",
        description="Adapt a language model to other text with adapters, and compare them: from "
        "the same model, on the same batches. Without flags: a small model is made first, of the "
        "code of the Python standard library, and adapted to the English of its documentation.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_model_flags(parser)
    _add_adapter_flags(parser.add_argument_group("adapters"), known)
    _add_training_flags(parser.add_argument_group("training"))
    _add_run_flags(parser.add_argument_group("run"))
    given, folder, resume = parser.read(argv)
    if "adapters" in given:
        named = names_in(given["adapters"])
        given["adapters"] = tuple(known) if named == ("all",) else named
        if not named:
            raise InputError("--compare: name an adapter (--help lists them)")
    return given, folder, resume


def _add_model_flags(parser: Parser) -> None:
    of = {"of": FinetuneSettings}
    model = parser.add_argument_group("model")
    which = model.add_mutually_exclusive_group()
    which.add_argument(
        "--from",
        dest="source",
        metavar="RUN",
        help="the folder of a run of pretrain.py; RUN/NAME where it has several optimizers",
    )
    which.add_argument(
        "--hf",
        metavar="FOLDER",
        help="a Hugging Face folder of the Llama family: config.json, safetensors, tokenizer.json",
    )
    add_flag(model, "model", str, "without --from and --hf: the small model to make first", **of)
    add_flag(model, "base_steps", int, "and the steps it is trained for", **of)
    model.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a `tokenizers` JSON file (default: that of --hf, else bytes as tokens)",
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        metavar="DIR_OR_GLOB",
        help="text files to adapt to (default: the standard library's documentation)",
    )
    text.add_argument(
        "--base-data",
        metavar="DIR_OR_GLOB",
        help="text to show on what is forgotten (default: what the model was trained on, if known)",
    )


def _add_adapter_flags(group: argparse._ArgumentGroup, known: Sequence[str]) -> None:
    of = {"of": FinetuneSettings}
    which = group.add_mutually_exclusive_group()
    names = {"dest": "adapters", "metavar": "NAME", "action": "extend"}
    which.add_argument("--adapter", nargs=1, help=f"one of {', '.join(known)}", **names)
    which.add_argument(
        "--compare",
        nargs="+",
        help="several of them, or `all`, from the same model on the same batches (default: lora "
        "lotr)",
        **names,
    )
    add_flag(group, "rank", int, "rank of all adapters", **of)
    add_flag(group, "alpha", float, "the change is scaled by alpha / rank (default: rank)", **of)
    group.add_argument(
        "--where",
        metavar="REGEX",
        help="layers by a regular expression found in their path, such as 'query|value' "
        "(default: all linear layers but the output head)",
    )
    group.add_argument(
        "--equal-parameters",
        action="store_true",
        help="give each adapter the rank at which it trains about as much as the first",
    )
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        help="options: dropout=0.1 for all which take it, lotr.rank=32 for one",
    )


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    of = {"of": FinetuneSettings}
    add_flag(group, "learning_rate", float, "peak (default: each adapter's own)", **of)
    text = "learning rate after warm-up"
    add_flag(group, "schedule", str, text, choices=SCHEDULES, **of)
    add_flag(group, "warmup", int, "steps of linear warm-up (default: a tenth of --steps)", **of)
    add_flag(group, "steps", int, "optimizer steps", **of)
    add_flag(group, "batch_size", int, "sequences in a step, over all devices", **of)
    add_flag(group, "sequence_length", int, "tokens predicted in a sequence", **of)
    text = "arithmetic of the model (default: the model's)"
    add_flag(group, "dtype", str, text, choices=DTYPES, **of)
    add_flag(group, "loss", str, LOSS_HELP, choices=LOSSES, **of)
    add_memory_flags(group, FinetuneSettings)
    add_flag(group, "devices", int, "devices to share each batch (default: all)", **of)
    add_flag(group, "seed", int, "fixes adapters at the start and the order of batches", **of)


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    of = {"of": FinetuneSettings}
    group.add_argument(
        "--output", metavar="DIR", default="runs/finetune", help="(default: %(default)s)"
    )
    group.add_argument(
        "--resume", action="store_true", default=False, help="go on with the run in --output"
    )
    add_flag(group, "eval_every", int, "steps between two looks at the held-out text", **of)
    add_flag(group, "eval_sequences", int, "sequences of held-out text looked at", **of)
    add_flag(group, "checkpoint_every", int, "steps between two checkpoints", **of)
