"""Prints the test paths whose full tier the last commits call for, nearest to the change first.

The last commits are those of the four hours before the newest one: what was worked on at once. A
change in a package calls for its own tests, and for those of every package on a floor above it.
"""

from collections import Counter
from pathlib import Path
import re
import subprocess
import sys
import tomllib

CONFIG = tomllib.loads(Path("pyproject.toml").read_text())
LAYERS = CONFIG["tool"]["importlinter"]["contracts"][0]["layers"]
FLOORS = [re.findall(r"\w+", layer) for layer in reversed(LAYERS)]  # from the ground
ABOVE_ALL = ["tests/test_transformations.py", "tests/examples", "tests/tpu"]


def git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def touched_files() -> list[str]:
    """The files that the last commits changed."""
    newest = int(git("log", "-1", "--format=%ct"))
    base = git("rev-list", "-1", f"--before={newest - 4 * 3600}", "HEAD")
    if not base:
        print("No commit is older than four hours: nothing to compare with.", file=sys.stderr)
        return []
    return git("diff", "--name-only", base, "HEAD").splitlines()


def tests_of(package: str) -> list[str]:
    """The paths of a package's own tests."""
    folder = "sharded" if package == "sharding" else package
    return [f"tests/{folder}", f"tests/test_{package}.py"]


def tests_for(files: list[str]) -> list[str]:
    """The test paths for these changed files: those with most of them first, and each once."""
    near: list[str] = []
    far: list[str] = []
    for file in files:
        first, second, *_ = [*Path(file).parts, ""]
        if first == "examples":
            near.append("tests/examples")
        elif first == "tests" and second == "harness":
            near += ["tests/test_harness.py", ABOVE_ALL[0]]
        elif first == "tests" and "/" not in file.removeprefix("tests/"):
            near += [file] if second.startswith("test_") else []
            far += [] if second.startswith("test_") else ["tests"]  # what all tests share
        elif first == "tests":
            near.append(f"tests/{second}")
        elif first in (".ci", "pyproject.toml"):
            far.append("tests")
        elif first == "lowrank_optax":
            package = second.removesuffix(".py")
            floor = next((i for i, names in enumerate(FLOORS) if package in names), 0)
            near += tests_of(package)
            far += [path for names in FLOORS[floor + 1 :] for n in names for path in tests_of(n)]
            far += ABOVE_ALL
    is_test = lambda path: Path(path).is_dir() or Path(path).name.startswith("test_")
    near = [path for path, _ in Counter(near).most_common()]
    return [p for p in dict.fromkeys(near + far) if is_test(p) and Path(p).exists()]


if __name__ == "__main__":
    print(*tests_for(touched_files()))
