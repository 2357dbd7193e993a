"""Terminal output: tables and errors for people on stderr, one JSON document for programs on stdout."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from finetune.errors import FinetuneError
from finetune.progress_bars import console
from finetune.storage.files import json_text

_NUMBER = re.compile(r"[\d,.]+ ?%?|–")


def print_json(document: Any) -> None:
    """Print a JSON document on stdout."""
    sys.stdout.write(json_text(document, indent=2) + "\n")


def show_error(error: FinetuneError, *, as_json: bool) -> None:
    """Print an error on stderr; with `as_json` also as a JSON document on stdout."""
    if as_json:
        problems = [{"where": problem.where, "message": problem.message} for problem in error.problems]
        print_json({"error": {"code": error.code, "message": error.message, "problems": problems}})
    console.print(f"[bold red]error[/] ({error.code}): ", end="")
    console.print(str(error), markup=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on stderr; columns of numbers, also if given as text, are right-aligned."""
    drawn = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for position, column in enumerate(columns):
        numeric = not any(isinstance(row[position], str) and not _NUMBER.fullmatch(row[position]) for row in rows)
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


def shortened(path: Path) -> str:
    """Return a path inside the current folder as a relative path, any other unchanged, to keep lines short."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
