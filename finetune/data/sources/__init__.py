"""Sources of labelled images, one module for each kind. A new kind is a new module and a line in `SOURCES`. Torch-free."""

from __future__ import annotations

from pathlib import Path

from finetune.data.sources.folder import FolderSource
from finetune.data.sources.listing import Listing, Notes, Record, Source
from finetune.data.sources.table import TableSource

SOURCES: tuple[Source, ...] = (TableSource(), FolderSource())
"""In the order in which they are asked; the last one takes what no other recognises, and says what is wrong with it."""


def source_of(location: Path) -> Source:
    """Return the first source that recognises `location`, else the last of all."""
    return next((source for source in SOURCES if source.recognises(location)), SOURCES[-1])


__all__ = ["SOURCES", "Listing", "Notes", "Record", "Source", "source_of"]
