"""Code and prose taken out of Python sources, adapters by name, and ranks of equal size."""

import ast
import math

from _adapters import _nearest
from _corpus import standard_library
from _recipes import RECIPES, choose
from _settings import InputError
from _texts import code_and_prose
import pytest

import lowrank_optax as lro

SOURCE = '''"""Of the module,
in two lines."""
import os


class A:
    """Of the class."""

    x = "no documentation"

    def f(self):
        """Of the function.

        Indented.
        """
        return """a value"""
'''


def test_code_has_no_documentation_and_prose_nothing_else() -> None:
    code, prose = code_and_prose([("a.py", SOURCE), ("b.py", "x = 1\n"), ("c.py", "print 'old'")])
    assert [name for name, _ in code] == ["a.py", "b.py"]
    assert prose == [
        (
            "a.py",
            "Of the module,\nin two lines.\n\nOf the class.\n\nOf the function.\n\nIndented.\n",
        )
    ]
    assert "Of the" not in code[0][1]
    assert '"no documentation"' in code[0][1]
    assert '"""a value"""' in code[0][1]
    assert code[1] == ("b.py", "x = 1\n")


def test_standard_library_has_both() -> None:
    sources = [(name, text) for name, text in standard_library() if "/" not in name][:20]
    code, prose = code_and_prose(sources)
    assert len(code) == 20
    written = dict(prose)
    for name, text in code:
        tree = ast.parse(dict(sources)[name])
        if documentation := ast.get_docstring(tree):
            assert documentation in written[name]
            assert documentation not in text


def test_option_goes_to_all_that_take_it_and_a_named_one_to_one_alone() -> None:
    lora, lotr, full = choose(
        ["lora", "lotr", "full"], ["b1=0.8", "lotr.rank=3", "dropout=0.1"], None, 8, 16.0
    )
    assert lora.method() == lro.adapters.LoRA(rank=8, alpha=16.0, dropout=0.1)
    assert lotr.method() == lro.adapters.LoTR(rank=3, alpha=16.0, dropout=0.1)
    assert full.method() is None
    assert lora.training == lotr.training == full.training == {"b1": 0.8}


def test_learning_rate_is_the_closest_one_said() -> None:
    rates = lambda *a: [c.learning_rate for c in choose(["lora", "lotr"], a[0], a[1], 8, None)]
    assert rates([], None) == [RECIPES["lora"].learning_rate, RECIPES["lotr"].learning_rate]
    assert rates([], 0.5) == [0.5, 0.5]
    assert rates(["lotr.learning_rate=0.25"], 0.5) == [0.5, 0.25]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_its_method(name: str) -> None:
    (chosen,) = choose([name], [], None, 4, 8.0)
    method = chosen.method()
    wanted = RECIPES[name].method
    assert method is None if wanted is None else type(method) is getattr(lro.adapters, wanted)
    assert f"learning_rate={RECIPES[name].learning_rate:g}" in chosen.describe("cosine")


def test_unknown_adapter_is_refused_with_the_closest_names() -> None:
    with pytest.raises(InputError, match=r"no adapter 'lorra'.*did you mean.*lora"):
        choose(["lorra"], [], None, 8, None)


@pytest.mark.parametrize(("target", "rank"), [(1, 1), (30, 3), (34, 3), (36, 4), (10**6, 100)])
def test_nearest_rank_is_found(target: int, rank: int) -> None:
    assert _nearest(lambda r: 10 * r if r <= 100 else math.inf, target) == rank
    saturating = _nearest(lambda r: 10 * min(r, 100), target)
    assert 10 * min(saturating, 100) == 10 * rank


@pytest.mark.parametrize(("target", "rank"), [(1000, 8), (130, 64), (260, 32)])
def test_nearest_rank_is_found_where_counts_fall(target: int, rank: int) -> None:
    """As RandLoRA's do, until one basis is left; none is below the least rank that there is."""
    falling = lambda r: 64 * math.ceil(100 / r) if r <= 100 else 64 + r
    assert falling(_nearest(falling, target, 8)) == falling(rank)
