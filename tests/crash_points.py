"""The environment of a process that kills itself at a named point; ``crashing/sitecustomize.py`` says what points there are."""

from __future__ import annotations

import os
from pathlib import Path

CRASHING = Path(__file__).parent / "crashing"


def crashing_at(point: str, mark: Path) -> dict[str, str]:
    """Return the variables to add; the process makes the file `mark` when it dies."""
    paths = [str(CRASHING), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "CRASH_AT": point, "CRASH_MARK": str(mark)}
