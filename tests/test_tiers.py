"""What each tier runs, and that quick compilation changes nothing that tests ask for."""

from pathlib import Path
import re
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import pytest

import lowrank_optax as lro


class Case:
    """A case of a test, as the hook sees it."""

    def __init__(self, nodeid: str, *marks: Any, **params: Any) -> None:
        self.nodeid, self.marks = nodeid, [getattr(mark, "mark", mark) for mark in marks]
        if params:
            self.callspec = type("CallSpec", (), {"params": params})

    def get_closest_marker(self, name: str) -> Any:
        return next((mark for mark in self.marks if mark.name == name), None)

    def add_marker(self, name: str) -> None:
        self.marks.append(getattr(pytest.mark, name).mark)


class Config:
    """Options and arguments of a run."""

    def __init__(self, *args: str, full: bool = False, quick: bool = False, m: str = "") -> None:
        self.args = list(args)
        self.options = {"full": full, "quick": quick, "markexpr": m, "perturb": None}
        self.hook = type("Hook", (), {"pytest_deselected": staticmethod(lambda items: None)})

    def getoption(self, name: str) -> Any:
        return self.options[name]


@pytest.fixture
def conftest(request: pytest.FixtureRequest) -> ModuleType:
    return request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


def make_items() -> list[Case]:
    full, slow, pairs = pytest.mark.full, pytest.mark.slow, pytest.mark.combinations(2)
    items = [
        Case("t/a.py::plain"),
        Case("t/a.py::Class::long", slow),
        Case("t/a.py::rare", full),
        *(Case(f"t/a.py::one[{i}]", i=i) for i in (1, 2, 3)),
        *(Case(f"t/a.py::each[{i}]", pytest.mark.distinct, i=i) for i in (1, 2)),
    ]
    numbers = [(i, j, k) for i in (1, 2) for j in (3, 4) for k in (5, 6)]
    return items + [Case(f"t/a.py::all[{n}]", pairs, i=n[0], j=n[1], k=n[2]) for n in numbers]


def kept(conftest: ModuleType, *args: str, **options: Any) -> list[str]:
    items = make_items()
    conftest.pytest_collection_modifyitems(Config(*args, **options), items)
    return [item.nodeid.removeprefix("t/a.py::") for item in items]


def test_the_standard_tier_runs_what_is_not_full_and_each_pair(conftest: ModuleType) -> None:
    found = kept(conftest)
    assert found[:7] == ["plain", "Class::long", "one[1]", "one[2]", "one[3]", "each[1]", "each[2]"]
    products = [tuple(map(int, re.findall(r"\d", x))) for x in found[7:]]
    assert len(products) == 4  # of eight
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert len({(n[a], n[b]) for n in products}) == 4


def test_the_full_tier_runs_all(conftest: ModuleType) -> None:
    everything = [item.nodeid.removeprefix("t/a.py::") for item in make_items()]
    assert kept(conftest, full=True) == kept(conftest, m="full") == everything


def test_the_quick_part_runs_one_case_or_each_that_is_distinct(conftest: ModuleType) -> None:
    found = kept(conftest, quick=True)
    assert found[:-1] == ["plain", "one[1]", "each[1]", "each[2]"]
    assert found[-1].startswith("all[")
    with pytest.raises(pytest.UsageError, match="--quick"):
        kept(conftest, quick=True, full=True)


@pytest.mark.distinct
@pytest.mark.parametrize("quick", [False, True])
def test_what_is_named_runs_in_any_tier(conftest: ModuleType, quick: bool) -> None:
    assert "rare" in kept(conftest, "t/a.py::rare", quick=quick)
    assert {"all[(1, 3, 5)]", "all[(1, 3, 6)]"} <= {*kept(conftest, "/x/t/a.py::all", quick=quick)}
    assert "Class::long" in kept(conftest, "t/a.py::Class", quick=quick)
    assert "one[2]" in kept(conftest, "t/a.py::one[2]", quick=quick)
    assert "rare" not in kept(conftest, "t/a.py", quick=quick)


def test_combinations_of_more_than_there_are_are_refused(conftest: ModuleType) -> None:
    cases = [Case("t/a.py::one[1]", pytest.mark.combinations(2), i=1)]
    with pytest.raises(pytest.UsageError, match=r"combinations\(2\)"):
        conftest.beyond_combinations(cases, 2)


@pytest.mark.full  # of the compiler: what a program costs is decided before machine code is made
def test_quick_compilation_allocates_exchanges_and_counts_what_slow_does() -> None:
    tx = lro.galore(1e-2, rank=4)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec(None, "x"))
    params = {"kernel": jax.ShapeDtypeStruct((64, 96), jnp.float32, sharding=where)}
    state = jax.eval_shape(tx.init, params)

    def compiled() -> tuple[Any, ...]:
        jax.clear_caches()
        step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1)
        program = step.lower(params, state, params).compile()
        memory, text = program.memory_analysis(), program.as_text()
        collectives = re.findall(r"(\w+\[[\d,]*\])\S* (all-\w+|reduce-scatter)\(", text)
        assert collectives
        sizes = memory.temp_size_in_bytes, memory.alias_size_in_bytes
        return sizes, program.cost_analysis()["flops"], collectives

    hurried = jax.config.read("jax_disable_most_optimizations")
    found = []
    try:
        for value in (True, False):
            jax.config.update("jax_disable_most_optimizations", value)
            found.append(compiled())
    finally:
        jax.config.update("jax_disable_most_optimizations", hurried)
        jax.clear_caches()
    assert found[0] == found[1]
