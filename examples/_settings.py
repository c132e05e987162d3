"""The settings of `pretrain.py`: one field each, its flag, and what is refused at once."""

import argparse
from collections.abc import Callable, Iterable, Sequence
import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, get_args

from lowrank_optax.layers.randomized.sketch import SketchKind

SCHEDULES = ("constant", "cosine", "linear", "wsd")
DTYPES = ("float32", "bfloat16")
LOSSES = ("plain", "chunked")
LOSS_HELP = "of all logits at once, or in chunks that are never all in memory"
FEED_FORWARDS = ("lowrank", "blockdense", "blockshuffle")
LINEARS = ("maestro",)
ATTENTIONS = ("softmax", "random-features")
POSITIONS = ("rope", "comrope")
RANK_THRESHOLD = 1e-5
ROUNDINGS = ("nearest", "stochastic", "compensated")


class InputError(ValueError):
    """Something the user gave cannot be used; the message is the one line they read."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the course of a run."""

    PROGRAM: ClassVar[str] = "lowrank-optax examples/pretrain.py"
    FLAGS: ClassVar[dict[str, str]] = {"optimizers": "--compare"}

    data: str | None = None
    tokenizer: str | None = None
    model: str = "llama-tiny"
    optimizers: tuple[str, ...] = ("adamw", "galore")
    set: tuple[str, ...] = ()
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: int | None = None
    steps: int = 1000
    batch_size: int | Literal["adaptive"] = 8
    initial_batch_size: int = 8
    max_batch_size: int = 128
    eta: float = 0.9
    sequence_length: int = 128
    accumulate: int = 1
    dtype: str = "float32"
    param_dtype: str = "float32"
    rounding: Literal["nearest", "stochastic", "compensated"] | None = None
    state_bits: Literal[32, 8, 4] = 32
    loss: Literal["plain", "chunked"] = "plain"
    update_in_backward: bool = False
    remat: str | None = None
    remat_every: int = 1
    activation_bits: int | None = None
    fixed_point: int | None = None
    sketch: float | None = None
    sketch_kind: SketchKind | None = None
    feed_forward: Literal["lowrank", "blockdense", "blockshuffle"] | None = None
    self_guided: float | None = None
    attention: Literal["softmax", "random-features"] = "softmax"
    position: Literal["rope", "comrope"] = "rope"
    share_blocks: bool = False
    experts: int | None = None
    linear: Literal["maestro"] | None = None
    rank_penalty: float | None = None
    rank_threshold: float | None = None
    initializer_range: float | None = None
    devices: int | None = None
    seed: int = 0
    eval_every: int = 50
    eval_sequences: int = 256
    checkpoint_every: int = 200
    compact_every: int = 200

    def __post_init__(self) -> None:
        """Check the numbers which need nothing but themselves."""
        positive = ("steps", "batch_size", "initial_batch_size", "sequence_length", "accumulate")
        positive += ("eval_every", "eval_sequences", "checkpoint_every", "compact_every")
        for name in positive:
            value = getattr(self, name)
            if value != "adaptive" and value < 1:
                raise InputError(f"{flag(name)} must be at least 1, not {value}")
        if self.max_batch_size < self.initial_batch_size:
            raise InputError(
                f"--max-batch-size {self.max_batch_size} is below --initial-batch-size "
                f"{self.initial_batch_size}"
            )
        if not 0 < self.eta < 1:
            raise InputError(
                f"--eta must be between 0 and 1, not {self.eta}: from 1 on, none grows"
            )
        if self.warmup is not None and not 0 <= self.warmup <= self.steps:
            raise InputError(f"--warmup must be between 0 and --steps, not {self.warmup}")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise InputError(f"--learning-rate must be positive, not {self.learning_rate}")
        if self.initializer_range is not None and not 0 < self.initializer_range < float("inf"):
            raise InputError(f"--initializer-range must be positive, not {self.initializer_range}")
        if self.activation_bits is not None and not 1 <= self.activation_bits <= 8:
            raise InputError(f"--activation-bits must be 1 to 8, not {self.activation_bits}")
        if self.fixed_point is not None:
            self._check_fixed_point(self.fixed_point)
        if self.sketch is not None and not 0 < self.sketch <= 1:
            raise InputError(f"--sketch must be above 0 and at most 1, not {self.sketch}")
        if self.sketch_kind is not None and self.sketch is None:
            raise InputError("--sketch-kind needs --sketch FRACTION")
        if self.self_guided is not None:
            self._check_self_guided(self.self_guided)
        self._check_linear()
        self._check_shared_and_experts()
        if self.update_in_backward:
            self._check_update_in_backward()
        check_remat_every(self)
        if not 0 <= self.seed < 2**32:  # what both grain and jax.random.key take
            raise InputError(f"--seed must be between 0 and 2**32 - 1, not {self.seed}")
        if len(set(self.optimizers)) < len(self.optimizers):
            raise InputError("--compare needs different optimizers, not one of them twice")

    def _check_fixed_point(self, bits: int) -> None:
        most = 9 if self.dtype == "bfloat16" else 24
        if not 2 <= bits <= most:
            raise InputError(f"--fixed-point must be 2 to {most} in {self.dtype}, not {bits}")
        if self.sketch is not None:
            raise InputError("--fixed-point replaces the layers of --sketch: leave one out")
        if self.feed_forward is not None:
            raise InputError("--fixed-point replaces dense layers: leave --feed-forward out")

    def _check_self_guided(self, ratio: float) -> None:
        if self.feed_forward is None:
            raise InputError("--self-guided needs --feed-forward NAME")
        if not (0 < ratio <= 1 and self.guided_steps):
            raise InputError(
                "--self-guided must be above 0 and at most 1, and give a step or more of --steps "
                f"{self.steps}, not {ratio}"
            )
        for name, why in (
            ("update_in_backward", "computes blocks without a guide"),
            ("sketch", "cannot be drawn where a guide may be skipped"),
        ):
            if getattr(self, name):
                raise InputError(f"{flag(name)} {why}: leave it or --self-guided out")
        if self.batch_size == "adaptive":
            raise InputError("--self-guided counts steps of one size: give --batch-size a number")

    def _check_linear(self) -> None:
        if self.linear is None:
            for name in ("rank_penalty", "rank_threshold"):
                if getattr(self, name) is not None:
                    raise InputError(f"{flag(name)} needs --linear maestro")
            return
        if self.rank_threshold is None:
            object.__setattr__(self, "rank_threshold", RANK_THRESHOLD)
        for name in ("rank_penalty", "rank_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(f"{flag(name)} must be finite and not negative, not {value}")
        for name, why in (
            ("update_in_backward", "computes blocks without drawing ranks"),
            ("sketch", "is for dense layers"),
            ("fixed_point", "replaces dense layers"),
        ):
            if getattr(self, name):
                raise InputError(f"{flag(name)} {why}: leave it or --linear out")

    def _check_shared_and_experts(self) -> None:
        if self.experts is not None and self.experts < 1:
            raise InputError(f"--experts must be at least 1, not {self.experts}")
        without = {"feed_forward": "has a dense first block", "fixed_point": "is for plain blocks"}
        without |= {"update_in_backward": "trains blocks one by one"}
        experts = {"linear": "is for dense MLPs", "sketch": "is for dense MLPs"}
        for given, refused in (
            ("share_blocks", without if self.share_blocks else {}),
            ("experts", {} if self.experts is None else without | experts),
        ):
            for name, why in refused.items():
                if getattr(self, name):
                    raise InputError(f"{flag(name)} {why}: leave it or {flag(given)} out")

    def _check_update_in_backward(self) -> None:
        for name, why in (
            ("remat", "recomputes every block anyway"),
            ("sketch", "recomputes the blocks, with all of their inputs"),
        ):
            if getattr(self, name) is not None:
                raise InputError(f"--update-in-backward {why}: leave {flag(name)} out")
        if self.batch_size == "adaptive":
            raise InputError(
                "--update-in-backward never has all gradients, whose noise --batch-size adaptive "
                "measures: give a number"
            )

    @property
    def stored_dtype(self) -> str:
        """Dtype of the weights between steps: a way of rounding is for bfloat16."""
        return self.param_dtype if self.rounding is None else "bfloat16"

    @property
    def guided_steps(self) -> int:
        """Steps with guides, the first ones of a run."""
        return int((self.self_guided or 0) * self.steps)

    @property
    def first_batch_size(self) -> int:
        """Sequences in the first step, and with a fixed batch size in every other."""
        return self.initial_batch_size if self.batch_size == "adaptive" else self.batch_size

    @property
    def first_accumulate(self) -> int:
        """Micro-batches in the first step: noise cannot be measured on a single one."""
        return max(self.accumulate, 2) if self.batch_size == "adaptive" else self.accumulate

    @property
    def micro_batch_size(self) -> int:
        """Sequences whose gradient is computed at once, the same at every step."""
        return self.first_batch_size // self.first_accumulate


def flag(name: str, kind: Any = Settings) -> str:
    """Spells a field of a program's settings as its flag."""
    return kind.FLAGS.get(name, "--" + name.replace("_", "-"))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other refusal of the program."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists every flag)")

    def read(self, argv: Sequence[str] | None) -> tuple[dict[str, Any], Path, bool]:
        """Returns the settings given on the command line, the output folder, and `resume`."""
        given = vars(self.parse_args(argv))
        folder, resume = Path(given.pop("output")).expanduser(), given.pop("resume")
        return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, folder, resume


def names_in(texts: Iterable[str]) -> tuple[str, ...]:
    """What `--compare a b` and `--compare a,b` name."""
    return tuple(name for text in texts for name in text.split(",") if name)


def parse(argv: Sequence[str] | None) -> tuple[dict[str, Any], Path, bool]:
    """Returns the settings given on the command line, the output folder, and `resume`."""
    parser = Parser(
        prog="pretrain.py",
        description="Train a small language model on text and compare optimizers: same weights "
        "at the start, same batches. Without flags: AdamW and GaLore on the Python standard "
        "library's own source files.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    text = parser.add_argument_group("text")
    text.add_argument("--data", metavar="DIR_OR_GLOB", help="text files to train on")
    text.add_argument(
        "--tokenizer", metavar="PATH", help="a `tokenizers` JSON file (default: bytes as tokens)"
    )
    _add_training_flags(parser.add_argument_group("training"))
    _add_optimizer_flags(parser.add_argument_group("optimizer"))
    run = parser.add_argument_group("run")
    run.add_argument(
        "--output", metavar="DIR", default="runs/pretrain", help="(default: %(default)s)"
    )
    run.add_argument(
        "--resume", action="store_true", default=False, help="go on with the run in --output"
    )
    add_flag(run, "eval_every", int, "steps between two looks at the held-out text")
    add_flag(run, "eval_sequences", int, "sequences of held-out text looked at")
    add_flag(run, "checkpoint_every", int, "steps between two checkpoints")
    add_flag(
        run,
        "compact_every",
        int,
        "steps after which the memory of ranks that fell is given back, for optimizers such as "
        "adarankgrad",
    )
    given, folder, resume = parser.read(argv)
    if "optimizers" in given:
        given["optimizers"] = names_in(given["optimizers"])
        if not given["optimizers"]:
            raise InputError("--compare: name an optimizer (--help says which)")
    return given, folder, resume


def remat_choice(text: str | None) -> str | dict[str, Any] | None:
    """What the decoder takes for `--remat`: `mlp_up=save,mlp_gate=offload` is a table."""
    if text is None or "=" not in text:
        return text
    entries = [entry.partition("=") for entry in names_in([text])]
    if len({name for name, _, _ in entries}) < len(entries):
        raise InputError(f"--remat {text} names an intermediate twice")
    return {name: int(place) if place.isdigit() else place for name, _, place in entries}


def check_remat_every(settings: Any) -> None:
    """Refuses `--remat-every` without `--remat`, or with another policy than its own."""
    if settings.remat_every != 1 and settings.remat != "full":
        raise InputError("--remat-every needs --remat, without a policy")


def _batch_size(text: str) -> int | str:
    """What `--batch-size` takes; an error names this function, so its name says what is right."""
    return text if text == "adaptive" else int(text)


_batch_size.__name__ = "number or 'adaptive'"


def add_flag(
    group: argparse._ArgumentGroup,
    name: str,
    kind: Callable,
    text: str,
    *,
    of: Any = Settings,
    **options: Any,
) -> None:
    """Adds the flag of one field, with the field's default in its help."""
    default = getattr(of, name)
    suffix = "" if default is None else f" (default: {default})"
    if kind is not str:
        options.setdefault("metavar", "N" if kind is int else "X")
    group.add_argument(flag(name, of), type=kind, help=text + suffix, **options)


def add_memory_flags(group: argparse._ArgumentGroup, of: Any) -> None:
    """Adds the flags of the update inside the backward pass and of rematerialization."""
    group.add_argument(
        "--update-in-backward",
        action="store_true",
        help="update each block as soon as its gradients exist, and recompute its activations",
    )
    group.add_argument(
        "--remat",
        metavar="POLICY",
        nargs="?",
        const="full",
        help="recompute activations in the backward pass: all, or what a policy of "
        "jax.checkpoint_policies does not save, or, with NAME=save,NAME=offload,NAME=4, a table of "
        "lro.activations.policy",
    )
    text = "with --remat: save the input of every N-th block alone"
    add_flag(group, "remat_every", int, text, of=of)


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "model", str, "a preset such as llama-60m, or a path to a config.json")
    add_flag(group, "steps", int, "optimizer steps; with --batch-size adaptive, of the first size")
    add_flag(
        group,
        "batch_size",
        _batch_size,
        "sequences in a step, over all devices; or `adaptive`: as many as the noise of the "
        "gradient asks for",
        metavar="N",
    )
    add_flag(group, "initial_batch_size", int, "of an adaptive batch size")
    add_flag(group, "max_batch_size", int, "of an adaptive batch size")
    add_flag(
        group,
        "eta",
        float,
        "largest standard deviation of an adaptive batch's gradient, over its norm",
    )
    add_flag(group, "sequence_length", int, "tokens predicted in a sequence")
    add_flag(group, "accumulate", int, "micro-batches whose gradients make one step")
    add_flag(group, "dtype", str, "arithmetic of the model", choices=DTYPES)
    add_flag(group, "param_dtype", str, "storage of the weights", choices=DTYPES)
    add_flag(
        group,
        "rounding",
        str,
        "weights in bfloat16, rounded so at each step, the step itself computed in float32",
        choices=ROUNDINGS,
    )
    add_flag(group, "loss", str, LOSS_HELP, choices=LOSSES)
    add_memory_flags(group, Settings)
    add_flag(
        group,
        "activation_bits",
        int,
        "bits kept for the backward pass of each element of the MLPs' gates and ups, 1 to 8 "
        "(default: what it needs)",
        metavar="BITS",
    )
    add_flag(
        group,
        "fixed_point",
        int,
        "bits of the inputs, weights and outputs of the blocks' linear layers, fixed-point numbers "
        "with trained binary points (default: no fixed point)",
        metavar="BITS",
    )
    add_flag(
        group,
        "sketch",
        float,
        "fraction of the rows of the blocks' linear layers' inputs kept for the backward pass, or "
        "of as many sums of them (default: all)",
        metavar="FRACTION",
    )
    add_flag(
        group,
        "sketch_kind",
        str,
        "how --sketch makes them (default: stratified)",
        choices=get_args(SketchKind),
    )
    add_flag(
        group,
        "feed_forward",
        str,
        "structure of the MLPs' matrices, in all blocks but the first (default: dense)",
        choices=FEED_FORWARDS,
    )
    group.add_argument(
        "--self-guided",
        metavar="RATIO",
        nargs="?",
        const=0.5,
        type=float,
        help="train structured MLPs with a dense guide in this part of the steps (0.5 if no RATIO "
        "is given)",
    )
    add_flag(
        group,
        "attention",
        str,
        "softmax, or by random features in linear time and with a cache of constant size",
        choices=ATTENTIONS,
    )
    add_flag(
        group,
        "position",
        str,
        "rotary positions, fixed or trained in each block",
        choices=POSITIONS,
    )
    group.add_argument(
        "--share-blocks",
        action="store_true",
        help="make all blocks one, with norms for each layer",
    )
    add_flag(
        group,
        "experts",
        int,
        "experts in place of each MLP, of which every token takes two (default: one dense MLP)",
    )
    add_flag(
        group,
        "linear",
        str,
        "linear layers of the blocks that find their own ranks (default: dense)",
        choices=LINEARS,
    )
    add_flag(
        group,
        "rank_penalty",
        float,
        "weight of the penalty that lowers ranks, for --linear (default: none)",
    )
    add_flag(
        group,
        "rank_threshold",
        float,
        f"smallest importance of a direction that counts, for --linear (default: {RANK_THRESHOLD})",
    )
    add_flag(
        group,
        "initializer_range",
        float,
        "standard deviation of the weights at the start (default: 1 / sqrt(hidden size))",
    )
    add_flag(group, "devices", int, "devices to share each batch (default: all)")
    add_flag(group, "seed", int, "fixes the weights at the start and the order of the batches")


def _add_optimizer_flags(group: argparse._ArgumentGroup) -> None:
    which = group.add_mutually_exclusive_group()
    names = {"dest": "optimizers", "metavar": "NAME", "action": "extend"}
    which.add_argument(
        "--optimizer",
        nargs=1,
        help="any optimizer that lowrank_optax, optax or optax.contrib exports",
        **names,
    )
    which.add_argument(
        "--compare",
        nargs="+",
        help="several of them, from the same start on the same batches (default: adamw galore)",
        **names,
    )
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        help="options: rank=32 for all which take it, galore.rank=32 for one",
    )
    add_flag(group, "state_bits", int, "bits of a moment between steps", choices=(32, 8, 4))
    add_flag(group, "learning_rate", float, "peak learning rate (default: each optimizer's own)")
    add_flag(
        group,
        "schedule",
        str,
        "learning rate after warm-up: constant, cosine to a tenth, linear to "
        "zero, or wsd (constant, then linear to zero in the last fifth)",
        choices=SCHEDULES,
    )
    add_flag(group, "warmup", int, "steps of linear warm-up (default: a tenth of --steps)")
