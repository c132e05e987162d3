"""What the user sees of a fine-tuning: the table, the picture, and what the models write."""

import io
from pathlib import Path
from typing import Any

from _curves import Records, color_cycle, draw_losses, plt
from _report import mebibytes, milliseconds, print_sample
from _run_folder import read_log, write_atomically
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WIDTH = 120  # of the table
Results = dict[str, dict[str, Any]]  # figures by adapter


def report(console: Console, before: dict[str, Any], results: Results, folder: Path) -> None:
    """Prints the table, where everything lies, and what the models write before and after."""
    width = console.width
    console.width = max(width, WIDTH)  # rather than with figures cut off
    console.print(table(before, results))
    console.width = width
    console.print(f"curves: {folder / 'curves.png'}", soft_wrap=True)
    for name, result in results.items():
        merged = f", merged model in {folder / name / 'merged'}"
        if result["merged_difference"] is None:
            merged = "; it depends on the input and is not merged"
        console.print(f"{name}: log and checkpoints in {folder / name}{merged}", soft_wrap=True)
    print_sample(console, "before, the model continues the held-out text", *before["sample"])
    for name, result in results.items():
        print_sample(console, f"with {name}", *result["sample"])


def table(before: dict[str, Any], results: Results) -> Table:
    """Makes the final table: the model before, then a row per adapter."""
    made = Table(title="after training", title_justify="left", box=SIMPLE_HEAD)
    made.add_column("", no_wrap=True)
    columns = [c for c in _COLUMNS if any(r.get(c[1]) is not None for r in results.values())]
    for label, _, _ in columns:
        made.add_column(label, justify="right", no_wrap=True)
    for name, result in ({"before": before} | results).items():
        cells = ["" if result.get(key) is None else spell(result[key]) for _, key, spell in columns]
        made.add_row(name, *cells, end_section=name == "before")
    return made


_COLUMNS = (
    ("rank", "rank", "{}".format),
    ("trained", "trained", "{:,}".format),
    ("optimizer\nstate", "optimizer_state_bytes", lambda size: f"{size / 2**10:,.1f} KiB"),
    ("peak of\na step", "compiled_peak_bytes", mebibytes),
    ("step", "step_seconds", milliseconds),
    ("held-out\nloss", "held_out_loss", "{:.4f}".format),
    ("loss on the\nold text", "old_text_loss", "{:.4f}".format),
    ("merged\ndiffers by", "merged_difference", "{:.1e}".format),
    ("PEFT's\nfiles by", "peft_difference", "{:.1e}".format),
)


def plot(path: Path, logs: dict[str, Path], before: dict[str, Any], results: Results) -> None:
    """Draws the losses, what each adapter trains, and what is forgotten of the old text."""
    records: Records = {name: read_log(log) for name, log in logs.items()}
    colors = dict(zip(records, color_cycle(len(records)), strict=True))
    forgets = before["old_text_loss"] is not None
    figure, axes = plt.subplots(
        1,
        2 + forgets,
        figsize=(10 + 3 * forgets, 4.5),
        width_ratios=(3, 2, 2)[: 2 + forgets],
        layout="constrained",
    )
    draw_losses(axes[0], records, colors)
    if len(records) > 4:  # the bars have the same colors, with names
        axes[0].get_legend().remove()
    trained = {name: result["trained"] for name, result in results.items()}
    _draw_bars(axes[1], trained, colors, "{:,.0f}", "parameters trained")
    # From zero, a bar on a logarithmic axis has no length to compare.
    if forgets:
        rise = {n: r["old_text_loss"] - before["old_text_loss"] for n, r in results.items()}
        _draw_bars(axes[2], rise, colors, "{:+.3f}", "rise of the loss on the old text")
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    axes[0].grid(alpha=0.25)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    plt.close(figure)
    write_atomically(path, picture.getvalue())


def _draw_bars(
    axes: Any, values: dict[str, float], colors: dict[str, str], spell: str, title: str
) -> None:
    names = list(reversed(values))  # the first on top
    drawn = axes.barh(names, [values[n] for n in names], color=[colors[n] for n in names])
    axes.bar_label(drawn, labels=[spell.format(values[n]) for n in names], padding=2, fontsize=9)
    axes.margins(x=0.3)
    axes.set_xticks([])  # the figures stand at the bars
    axes.set_title(title, fontsize=10)
