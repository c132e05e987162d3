"""The package's sources keep the conventions that a reader relies on."""

from collections import Counter
from pathlib import Path
import re

PACKAGE = Path(__file__).parents[1] / "lowrank_optax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# An entry of Args, Attributes or the like, or a docstring, whose first word is "Of".
STARTS_WITH_OF = re.compile(r'^\s+(\*{0,2}\w+): Of\b|"""Of\b', re.MULTILINE)


def test_no_docstring_entry_begins_with_of() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}: {match.group(0).strip()}"
        for path in SOURCES
        for match in STARTS_WITH_OF.finditer(path.read_text())
    ]
    assert not found


def test_no_two_files_have_one_name() -> None:
    """But for what a folder is built on, and what of a family is Linen's."""
    names = Counter(path.name for path in SOURCES)
    repeated = {name for name, count in names.items() if count > 1}
    assert repeated <= {"__init__.py", "base.py", "config.py", "linen.py"}


def test_a_file_run_alone_does_not_hide_the_function_of_its_name() -> None:
    """To run its doctests, pytest puts a module in its package, over a function of that name."""
    found = []
    for path in PACKAGE.glob("*/*.py"):
        package, name = path.parent.name, path.stem
        own_function = rf"\b{package}(\.{name}\(| import .*\b{name}\b)"
        if re.search(own_function, path.read_text()):
            found.append(f"{package}/{path.name}")
    assert not found
