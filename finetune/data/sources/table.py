"""Read a table with an image, or its path, and its label in each row; paths are relative to the table."""

from __future__ import annotations

from typing import ClassVar

from finetune.data.notes import Notes
from finetune.data.places.tree import Place
from finetune.data.reading import Reading
from finetune.data.sources.rows import list_table
from finetune.data.sources.source import Listing
from finetune.data.tables import SUFFIXES, open_table


class TableSource:
    """The source for a table that is given as the location. Labels are kept as text: ``007`` stays ``007``."""

    name: ClassVar[str] = "a table"

    def expected(self, shown: str) -> str:
        return "a table with a column file_name (paths relative to the table) and a column label, such as daisy/1.jpg,daisy"

    def recognises(self, place: Place) -> bool:
        return place.focus is not None and place.focus.suffix in SUFFIXES

    def read(self, place: Place, reading: Reading, notes: Notes) -> Listing:
        assert place.focus is not None
        return list_table(open_table(place.focus, reading), place.focus, place.tree, reading, notes) or Listing()
