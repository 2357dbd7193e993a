"""Progress bars for terminals and notebooks: one per phase, with its latest values and the remaining time."""

from __future__ import annotations

from collections.abc import Iterator
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
_DESCRIPTION_CHARACTERS = 26


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

        def update(progress: Progress) -> None:
            key = (progress.phase, progress.total, progress.unit)
            description = f"{progress.message or PHASES[progress.phase]:<{_DESCRIPTION_CHARACTERS}.{_DESCRIPTION_CHARACTERS}}"
            if key not in tasks:
                tasks[key] = bars.add_task(description, total=progress.total, values="")
            values = " ".join(
                f"{SHORT.get(name, name)} {value:,.0f}" if value >= 1000 else f"{SHORT.get(name, name)} {value:.3g}"
                for name, value in progress.values.items()
                if name not in HIDDEN
            )
            bars.update(tasks[key], completed=progress.done, description=description, values=values)

        yield update
