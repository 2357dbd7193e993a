"""Names of models and of data: the one place that makes them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path

LONGEST_NAME = 63


def model_name(suffix: str | None, dataset: str) -> str:
    """Return the name that a run's model is registered under: as asked, else after its dataset."""
    return suffix or as_model_name(dataset)


_ENDINGS = (".tar.gz", ".tgz", ".tar", ".zip")
_SAYS_NOTHING = frozenset(
    {"labels", "metadata", "annotations", "data", "dataset", "images", "train", "index", "result", "results"}
)

_SPLITS = ("train", "training")


def dataset_name(location: Path | str) -> str:
    """Return what the data in `location` is called: the name of its folder, or of its file without the ending.

    Where that says nothing, as of ``flowers/labels.csv`` and ``flowers/train``, it is the name of the folder around it.
    """
    if "://" in str(location):
        return _without_ending(str(location).rstrip("/").rpartition("/")[2]) or "data"
    place = Path(location).resolve()
    if not place.is_file():
        return place.parent.name or place.name if place.name.casefold() in _SPLITS else place.name
    name = _without_ending(place.name)
    says_nothing = name.casefold() in _SAYS_NOTHING and not place.name.lower().endswith(_ENDINGS)
    return place.parent.name or name if says_nothing else name


def without_archive_ending(name: str) -> str:
    """Return an archive's name without its ending, and any other name as it is."""
    ending = next((ending for ending in _ENDINGS if name.lower().endswith(ending)), "")
    return name.removesuffix(name[len(name) - len(ending) :]) or name


def _without_ending(name: str) -> str:
    stripped = without_archive_ending(name)
    return Path(name).stem if stripped == name else stripped


def as_model_name(text: str) -> str:
    """Return a folder's or file's name as a model's name: lower case a-z and 0-9, anything else a dash.

    Accents are dropped. Where letters of another script are lost, a short digest of the name is added, so that
    two such names differ.
    """
    decomposed = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    kept = re.sub(r"[^a-z0-9]+", "-", decomposed.lower()).strip("-")
    lost_letters = any(character.isalnum() and not character.isascii() for character in decomposed)
    if kept and not lost_letters:
        return kept[:LONGEST_NAME].strip("-")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{kept[: LONGEST_NAME - len(digest) - 1] or 'model'}-{digest}"
