"""Flags of XLA with which tests compile, as far as the installed one knows them."""

import importlib.util
import mmap
from pathlib import Path

QUICK = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}


def quick_flags() -> list[str]:
    return [f"--{name}={value}" for name, value in QUICK.items() if knows(name)]


def knows(name: str) -> bool:
    """Whether XLA has a flag; one that it does not know ends the process."""
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None
    assert spec.origin is not None
    library = Path(spec.origin).with_name("libjax_common.so")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return text.find(b"\0" + name.encode() + b"\0") >= 0
