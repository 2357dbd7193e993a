"""Sources of labelled images, one module for each format. To add a format, add a module and a line in `SOURCES`. Torch-free."""

from __future__ import annotations

from finetune.data.places.tree import Place
from finetune.data.reading import Reading
from finetune.data.sources.class_folders import ClassFoldersSource
from finetune.data.sources.coco import CocoSource
from finetune.data.sources.cvat import CvatSource
from finetune.data.sources.imagenet_text import ImagenetTextSource
from finetune.data.sources.label_studio import LabelStudioSource
from finetune.data.sources.metadata import MetadataSource
from finetune.data.sources.saved_dataset import SavedDatasetSource
from finetune.data.sources.source import Listing, Record, Source
from finetune.data.sources.table import TableSource

SOURCES: tuple[Source, ...] = (
    TableSource(),
    SavedDatasetSource(),
    CocoSource(),
    LabelStudioSource(),
    CvatSource(),
    ImagenetTextSource(),
    MetadataSource(),
    ClassFoldersSource(),
)
"""In the order in which they are tried. The last one reads what no other recognises, and reports what is wrong with it."""


def source_of(place: Place, reading: Reading | None = None) -> Source:
    """Return the first source that recognises a place; if none does, the last one."""
    return next((source for source in SOURCES if source.recognises(place)), SOURCES[-1])


__all__ = ["SOURCES", "Listing", "Record", "Source", "source_of"]
