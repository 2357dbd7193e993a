"""The rules by which models and data are named."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path

LONGEST_NAME = 63


def model_name(suffix: str | None, dataset: str) -> str:
    """Return the name under which a run's model is registered: `suffix` if given, else derived from the dataset."""
    return suffix or as_model_name(dataset)


_ENDINGS = (".tar.gz", ".tgz", ".tar", ".zip")
_SAYS_NOTHING = frozenset(
    {"labels", "metadata", "annotations", "data", "dataset", "images", "train", "index", "result", "results"}
)

_SPLITS = ("train", "training")


def dataset_name(location: Path | str) -> str:
    """Return the name of the data in `location`: the name of its folder, or of its file without suffix.

    A generic name, as in ``flowers/labels.csv`` and ``flowers/train``, is replaced by the name of the parent folder.
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
    """Return an archive's name without its suffix, and any other name unchanged."""
    ending = next((ending for ending in _ENDINGS if name.lower().endswith(ending)), "")
    return name.removesuffix(name[len(name) - len(ending) :]) or name


def _without_ending(name: str) -> str:
    stripped = without_archive_ending(name)
    return Path(name).stem if stripped == name else stripped


def as_model_name(text: str) -> str:
    """Convert a folder's or file's name to a model name: lower-case a-z and 0-9, a dash for anything else.

    Accents are removed. If letters of another script are lost, a short digest of the name is appended, so that two such names
    stay different.
    """
    decomposed = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    kept = re.sub(r"[^a-z0-9]+", "-", decomposed.lower()).strip("-")
    lost_letters = any(character.isalnum() and not character.isascii() for character in decomposed)
    if kept and not lost_letters:
        return kept[:LONGEST_NAME].strip("-")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{kept[: LONGEST_NAME - len(digest) - 1] or 'model'}-{digest}"
