"""What a person sees of a command, compared with a text file under ``tests/golden/screens/``.

A test runs a command in an empty folder on a terminal of 80 columns and hands its screen to ``golden``::

    def test_what_an_empty_workspace_shows(screen, golden):
        golden(screen("models", "list"), "models-list-empty")

``make golden`` writes the files anew: read the difference before committing it. Folders are always masked; durations, sizes and
ids where a test names those masks, which also evens out spaces and rules, since their widths follow.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.cells import cell_len

FOLDER = Path(__file__).parent / "golden" / "screens"
COLUMNS = 80
MASKS = {
    "duration": r"\b(?:\d+ h \d+ min|\d+ min \d+ s|\d+(?:\.\d+)? m?s)\b",
    "size": r"\b\d+(?:\.\d+)? (?:B|KiB|MiB|GiB)",
    "id": r"\b(?:ftjob|file)-[0-9a-z]{20,}",
    "time": r"\b\d{4}-\d\d-\d\d[ T-]\d\d[:.]?\d\d(?:[:.]?\d\d)?\b",
    "sha256": r"\b[0-9a-f]{64}\b",
    "figure": r"\b\d+\.\d{3,4}\b|\b1e-\d\d\b|\d+\.\d{2}(?=%)",
}


@dataclass(frozen=True)
class Screen:
    """What one command printed, and how it ended."""

    command: str
    exit_code: int
    stdout: str
    stderr: str
    folder: Path

    def lines(self) -> list[str]:
        return [line.rstrip() for line in (self.stdout + self.stderr).splitlines()]

    def text(self, masks: tuple[str, ...] = ()) -> str:
        """Return the golden file's text: the command, its exit code, then both streams."""
        parts = [f"$ {self.command}", f"exit code {self.exit_code}"]
        for name, stream in (("stdout", self.stdout), ("stderr", self.stderr)):
            if stream:
                parts += ["", f"--- {name} ---", *(line.rstrip() for line in stream.splitlines())]
        text = _without_folder("\n".join(parts) + "\n", self.folder)
        text = re.sub(r"(?<=/datasets/[0-9a-f]{12}-)[0-9a-f]{8}(?=\.html)", "00000000", text)  # depends on versions of libraries
        for name in masks:
            text = re.sub(MASKS[name], f"<{name}>", text)
        if masks:
            text = re.sub(r"(?<=\S) {2,}", "  ", re.sub("─{2,}", "──", text))
        return text


Run = Callable[..., Screen]
Compare = Callable[..., None]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Return a function that runs ``finetune`` with arguments, in a folder that is its own, as often as a test wants."""
    from finetune import cli

    # Tables fold long paths, so the path's length must always be the same: a random name of eight characters in /tmp.
    folder = Path(tempfile.mkdtemp(prefix="finetune-", dir="/tmp"))
    monkeypatch.chdir(folder)
    for name in [name for name in os.environ if name.startswith(("FINETUNE_", "MLFLOW_TRACKING", "FORCE_COLOR"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(cli, "skip_final_collection", lambda: None)  # this process goes on

    def run(*arguments: str) -> Screen:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        printed = capsys.readouterr()
        return Screen(shlex.join(["finetune", *arguments]), code, printed.out, printed.err, folder)

    yield run
    shutil.rmtree(folder)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Compare:
    """Return a function that compares a screen with ``screens/NAME.txt``, or writes it where ``--renew-golden`` is given."""

    def compare(screen: Screen, name: str, *, masks: tuple[str, ...] = (), wide: bool = False) -> None:
        text, path = screen.text(masks), FOLDER / f"{name}.txt"
        too_wide = [line for line in screen.lines() if cell_len(line) > COLUMNS]
        assert wide or not too_wide, f"wider than {COLUMNS} columns:\n" + "\n".join(too_wide)
        if request.config.getoption("renew_golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        expected = path.read_text(encoding="utf-8") if path.exists() else ""
        if text != expected:
            difference = difflib.unified_diff(expected.splitlines(), text.splitlines(), str(path.name), "now", lineterm="")
            pytest.fail("\n".join(difference) + "\n`make golden` renews the files", pytrace=False)

    return compare


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-golden", action="store_true", help="write the golden screens anew instead of comparing with them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run nothing else where the golden files are renewed."""
    if config.getoption("renew_golden"):
        kept = [item for item in items if "golden" in getattr(item, "fixturenames", ()) or "golden_bits" in item.name]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def _without_folder(text: str, folder: Path) -> str:
    """Put zeros for the folder's random letters, also where a table has broken the path over two lines."""
    steady, random = str(folder)[:-8], str(folder)[-8:]
    broken = r"(?:\n[ ]*)?"
    pattern = broken.join(re.escape(character) for character in steady + random)

    def zeros(match: re.Match[str]) -> str:
        letters = itertools.count()
        return re.sub(r"[^\s]", lambda one: one[0] if next(letters) < len(steady) else "0", match[0])

    return re.sub(pattern, zeros, text)
