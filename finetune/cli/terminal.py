"""What a person sees: progress bars, tables and errors on stderr; what a program reads: one JSON document on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from finetune.errors import FinetuneError
from finetune.progress import Progress, ProgressCallback, silent

console = Console(stderr=True, highlight=False)

PHASES = {
    "preparing": "reading images",
    "features": "frozen features",
    "training": "training",
    "evaluating": "evaluating",
    "exporting": "exporting",
    "registering": "registering",
}
SHORT = {"images_per_second": "img/s", "images/s": "img/s", "val/top1": "val"}
HIDDEN = {"eta_seconds", "lr", "top1"}  # a line has 80 characters; the report shows everything
_DESCRIPTION_CHARACTERS = 20


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def show_error(error: FinetuneError, *, as_json: bool) -> None:
    if as_json:
        problems = [{"where": problem.where, "message": problem.message} for problem in error.problems]
        print_json({"error": {"code": error.code, "message": error.message, "problems": problems}})
    console.print(f"[bold red]error[/] ({error.code}): ", end="")
    console.print(str(error), markup=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A titled table on stderr; a column without a text in it is aligned to the right."""
    drawn = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for position, column in enumerate(columns):
        numeric = not any(isinstance(row[position], str) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(_cell(value)) for value in row))
    if title:
        console.print(escape(title), style="bold cyan")
    console.print(drawn)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def duration(seconds: float) -> str:
    """``8.3 s``, ``4 min 10 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def byte_size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[ProgressCallback]:
    """One bar a phase, with its latest values (loss, accuracy, images/s) and the time that is left."""
    if not shown:
        yield silent
        return
    columns = (
        TextColumn("{task.description}"),
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
                f"{SHORT.get(name, name)} {value:.3g}" for name, value in progress.values.items() if name not in HIDDEN
            )
            bars.update(tasks[key], completed=progress.done, description=description, values=values)

        yield update


def shortened(path: Path) -> str:
    """Return a path relative to the current folder where it lies inside, so that a line keeps within a terminal."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
