"""Progress bars for terminals and notebooks: one per phase, with its latest values and the remaining time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from finetune.progress import Progress, ProgressCallback, silent

console = Console(stderr=True, highlight=False)

PHASES = {
    "runs": "runs",
    "preparing": "reading images",
    "features": "frozen features",
    "training": "training",
    "evaluating": "evaluating",
    "exporting": "exporting",
    "registering": "registering",
}
SHORT = {"images_per_second": "img/s", "images/s": "img/s", "val/top1": "val", "val/map": "val"}
HIDDEN = {"eta_seconds", "lr", "top1", "exact_match"}  # a line has 80 characters; the report shows everything
LEAST_IMPORTANT = ("images/s", "images_per_second", "loss")  # are left out, in this order, if a line is too narrow for all values
_SHORTEST, _LONGEST = 26, 44  # characters of a description
_OTHER_COLUMNS = 27  # characters: the bar, the percentage, the remaining time, and spaces


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[ProgressCallback]:
    """Show one bar per phase with its latest values (loss, accuracy, images/s) and the remaining time; yield the callback."""
    if not shown:
        yield silent
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=10),
        TaskProgressColumn(),
        TextColumn("{task.fields[values]}", style="cyan"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with RichProgress(*columns, console=console, refresh_per_second=4) as bars:
        tasks: dict[tuple[str, int, str], TaskID] = {}
        widest = _SHORTEST

        def update(progress: Progress) -> None:
            key = (progress.phase, progress.total, progress.unit)
            nonlocal widest
            description = _shortened(progress.message or PHASES[progress.phase])
            widest = max(widest, len(description))
            if key not in tasks:
                tasks[key] = bars.add_task(description, total=progress.total, values="")
            values = values_text(progress.values, console.width - widest - _OTHER_COLUMNS)
            bars.update(tasks[key], completed=progress.done, description=f"{description:<{_SHORTEST}}", values=values)

        yield update


def _shortened(description: str) -> str:
    return description if len(description) <= _LONGEST else f"{description[: _LONGEST - 1]}…"


def values_text(values: Mapping[str, float], n_characters: int) -> str:
    """Return the values as text of at most `n_characters`; the least important ones are left out if they do not fit."""
    shown = {
        name: f"{SHORT.get(name, name)} {value:,.0f}" if value >= 1000 else f"{SHORT.get(name, name)} {value:.3g}"
        for name, value in values.items()
        if name not in HIDDEN
    }
    for name in LEAST_IMPORTANT:
        if len(" ".join(shown.values())) > n_characters:
            shown.pop(name, None)
    return " ".join(shown.values())
