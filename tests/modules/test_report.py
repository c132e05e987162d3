"""Reports print as tables: cells, totals, notes."""

from lowrank_optax.modules.report import Report, Table, matrices_string


class Example(Report):
    """One of every kind of cell."""

    def table(self) -> Table:
        rows = [("[a]", (4, 16), 1234567, None), ("b", (), 5, "x")]
        return Table(
            ("name", "shape", ">bytes", "state"), rows, [("total", "", 1234572)], "A note."
        )


def test_cells_totals_and_notes_are_printed() -> None:
    assert str(Example()).splitlines() == [
        "name   shape       bytes  state",
        "[a]    4 × 16  1,234,567  –",
        "b      scalar          5  x",
        "total          1,234,572",
        "A note.",
    ]
    assert repr(Example()) == str(Example())


def test_matrices_are_written_with_their_batch() -> None:
    assert matrices_string((512, 8)) == "512 × 8"
    assert matrices_string((4, 2, 512, 8)) == "4 × 2 × (512 × 8)"
