"""The table of faults fits the library as it is."""

from pathlib import Path

import pytest

from mutants.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)


def test_there_are_sixty_faults_or_more_of_different_names_and_places() -> None:
    assert len(FAULTS) >= 60
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.path, fault.old) for fault in FAULTS}) == len(FAULTS)


@each_fault
def test_the_line_is_in_its_file_once_and_still_compiles_when_wrong(fault: Fault) -> None:
    assert fault.path.startswith("lowrank_optax/")
    text = (ROOT / fault.path).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    assert fault.new != fault.old
    assert "\n" not in fault.old + fault.new
    compile(text.replace(fault.old, fault.new), fault.path, "exec")


@each_fault
def test_the_tests_that_should_notice_it_exist(fault: Fault) -> None:
    paths = [argument for argument in fault.tests if not argument.startswith("-")]
    assert paths
    for path in paths:
        assert path.startswith("tests/")
        assert (ROOT / path.split("::")[0]).exists()
