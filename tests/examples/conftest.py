"""A text of a few kilobytes, a model of a few thousand weights, and runs of a few steps on them."""

from collections.abc import Callable
import json
import os
from pathlib import Path
import random
import subprocess
import sys

import pytest

PACKAGES = ("flax", "grain", "matplotlib", "orbax.checkpoint", "rich", "safetensors", "tokenizers")
for package in PACKAGES:
    pytest.importorskip(package)

import finetune  # noqa: E402
import pretrain  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards boil jam".split()  # noqa: SIM905
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five files, one of them not text."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(0)
    for name in ("one.txt", "two.txt", "three.txt", "below/four.txt"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(words.choices(WORDS, k=400)))
    (folder / "picture.bin").write_bytes(b"\xff\xfe\x00\x81")
    return folder


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="session")
def flags(text: Path, config: Path) -> list[str]:
    """Flags of a run of six steps; a flag given again later takes its place."""
    numbers = "--steps 6 --batch-size 8 --sequence-length 16 --eval-every 3 --eval-sequences 8"
    more = "--checkpoint-every 2 --devices 1 --learning-rate 0.01"
    return ["--data", str(text), "--model", str(config), *numbers.split(), *more.split()]


@pytest.fixture(scope="session")
def finished(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two optimizers, which other runs are compared with."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    arguments = ["--compare", "adamw", "galore", "--set", "rank=4", "galore.refresh_every=2"]
    assert pretrain.main([*flags, *arguments, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs within a test draw nothing; those of fixtures do."""
    for program in (pretrain, finetune):
        monkeypatch.setattr(program, "plot", lambda *args: None)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen]:
    """Starts a program in a process of its own, on one device."""
    cache = tmp_path_factory.getbasetemp() / "jax_compilations"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(EXAMPLES.parent),
        "PYTHONUNBUFFERED": "1",
    }

    def start(program: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, str(EXAMPLES / program), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    return start
