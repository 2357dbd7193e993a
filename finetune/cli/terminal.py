"""Terminal output: tables and errors for people on stderr, one JSON document for programs on stdout."""

from __future__ import annotations

import re
import sys
import textwrap
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
    taken = len(f"error ({error.code}): ")
    first, *more = wrapped(error.message, console.width, indent=2, taken=taken)
    for line in [first, *more, *(line for one in error.problems for line in wrapped(f"  {one}", console.width, indent=4))]:
        console.print(line, markup=False, soft_wrap=True)


def wrapped(text: str, width: int, *, indent: int, taken: int = 0) -> list[str]:
    """Return a message in lines of at most `width` characters, breaking at spaces only, so that paths and flags stay whole.

    Args:
        indent: spaces before each line of a paragraph but its first.
        taken: characters on the line of the first one already.
    """
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        start = " " * (taken if not lines else 0)
        filled = textwrap.wrap(
            re.sub(r"--set (?=\S)|pip install (?=\S)", lambda found: found[0].replace(" ", "\0"), paragraph.lstrip()),
            max(width, 40),
            initial_indent=start + paragraph[: len(paragraph) - len(paragraph.lstrip())],
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
        )
        filled = [line.replace("\0", " ") for line in filled or [start]]
        lines += [line[len(start) :] if number == 0 else line for number, line in enumerate(filled)]
    return lines


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
