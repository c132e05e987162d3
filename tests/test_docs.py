"""The pages in docs/: complete, linked, and in step with the flags of the main job."""

from collections.abc import Callable, Iterator
import contextlib
import importlib
import io
from pathlib import Path
import pkgutil
import re
from types import ModuleType

import pytest

import lowrank_optax

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
TEXTS = [*PAGES, *sorted(ROOT.glob("*.md"))]  # also the README, and what pages include

FENCED = re.compile(r"^(`{3,}|:{3,})(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)")
FILE_DIRECTIVE = re.compile(
    r"^`{3,}\{(?:include|literalinclude|image|figure)\} (\S+)", re.MULTILINE
)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
DOCUMENTED = re.compile(r"^\.\. (?:auto\w+|py:\w+):: ([\w.]+)", re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def public_packages() -> Iterator[ModuleType]:
    yield lowrank_optax
    for found in pkgutil.walk_packages(lowrank_optax.__path__, "lowrank_optax."):
        if found.ispkg:
            yield importlib.import_module(found.name)


def documented_names() -> list[str]:
    """Names that the API pages document, by an autodoc directive or as a module or data."""
    return [n for path in DOCS.glob("api/*.md") for n in DOCUMENTED.findall(path.read_text())]


def lookup(dotted: str) -> object:
    """What a dotted name stands for, also through a name that a package only re-exports."""
    found: object = lowrank_optax
    for part in dotted.split(".")[1:]:
        if not hasattr(found, part) and isinstance(found, ModuleType):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as MyST and GitHub spell them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_public_name_is_on_an_api_page() -> None:
    documented = [lookup(dotted) for dotted in documented_names()]
    missing = [
        f"{package.__name__}.{public}"
        for package in public_packages()
        for public in getattr(package, "__all__", ())  # none: not public
        if not any(getattr(package, public) is thing for thing in documented)
    ]
    assert not missing


def test_every_name_on_an_api_page_is_public_and_there_once() -> None:
    names = documented_names()
    assert len(names) == len(set(names))
    for dotted in names:
        if not isinstance(lookup(dotted), ModuleType):
            package, _, public = dotted.rpartition(".")
            assert public in lookup(package).__all__, dotted


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in LINK.findall(CODE.sub("`x`", FENCED.sub("", text))):
        if re.match(r"[a-z][a-z+.-]*:", target):  # http:, mailto:
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{name(path)} links to {target}"
        if anchor and page.suffix == ".md":
            assert anchor in anchors(page), f"{name(path)} links to {target}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_file_shown_on_a_page_is_there(path: Path) -> None:
    for file in FILE_DIRECTIVE.findall(path.read_text()):
        assert (path.parent / file).exists(), f"{name(path)} shows {file}"


def test_every_page_is_in_one_toctree() -> None:
    entries = []
    for path in PAGES:
        for _, block in FENCED.findall(path.read_text()):
            kind, *lines = block.splitlines()
            if kind.strip() == "{toctree}":
                listed = [line.strip() for line in lines if line.strip() and line[0] != ":"]
                entries += [path.parent / f"{line}.md" for line in listed]
    assert sorted([*entries, DOCS / "index.md"]) == PAGES


def _flags_of_page(page: str) -> set[str]:
    """The flags in the first column of the page's tables."""
    rows = re.findall(r"^\| `--.*$", (DOCS / page).read_text(), re.MULTILINE)
    return {flag for row in rows for flag in FLAG.findall(row.split("|")[1])}


def _flags_of_help(parse: Callable[[], object]) -> set[str]:
    """The flags that a program prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        parse()
    return set(FLAG.findall(printed.getvalue())) - {"--help"}


def test_the_page_of_the_main_job_has_every_flag_and_no_other() -> None:
    settings = pytest.importorskip("_settings")
    help_of_job = _flags_of_help(lambda: settings.parse(["--help"]))
    assert _flags_of_page("pretrain.md") == help_of_job


def test_the_page_of_fine_tuning_has_every_flag_and_no_other() -> None:
    settings = pytest.importorskip("_finetune_settings")
    help_of_job = _flags_of_help(lambda: settings.parse(["--help"], ("lora",)))
    assert _flags_of_page("finetune.md") == help_of_job


def test_the_rooms_of_the_architecture_page_exist() -> None:
    text = (DOCS / "architecture.md").read_text()
    rooms = text[text.index("## Rooms") : text.index("## How to add an adapter")]
    found = re.findall(r"^\| (`[^|]+) \|", rooms, re.MULTILINE)
    package, missing = Path(lowrank_optax.__file__).parent, []
    for cell in found:
        first, *others = re.findall(r"`([^`]+)`", cell)
        folder = package / first if first.endswith("/") else (package / first).parent
        paths = [package / first, *(folder / other for other in others)]
        missing += [str(path) for path in paths if not path.exists()]
    assert len(found) > 20
    assert not missing
    listed = {re.split(r"[/`]", cell.strip("`"))[0] for cell in found}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders <= listed
