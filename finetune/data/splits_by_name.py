"""Interpret names as splits: ``training_set`` is certainly training data, ``train_station`` perhaps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from finetune.data.dataset import Split
from finetune.data.reading import SplitMeaning

_WORDS: dict[str, Split] = {
    "train": "train", "training": "train", "trn": "train", "trainval": "train",
    "val": "val", "vld": "val", "valid": "val", "validation": "val", "validate": "val",
    "dev": "val", "devel": "val", "development": "val",
    "test": "test", "testing": "test", "tst": "test", "holdout": "test", "heldout": "test",
}  # fmt: skip
_NEUTRAL = frozenset(
    {
        *("set", "sets", "data", "dataset", "datasets", "split", "splits", "subset", "part", "folder", "dir", "files", "class"),
        *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pics", "sample", "samples", "classes"),
    }
)


@dataclass(frozen=True)
class Meaning:
    """The meaning of a name.

    Args:
        certain: whether the name contains nothing but the word for a split.
    """

    meaning: SplitMeaning
    certain: bool

    @property
    def split(self) -> Split | None:
        """The split that the name means, or None."""
        return None if self.meaning == "none" or self.meaning == "class" else self.meaning


def split_meaning(name: str, given: Mapping[str, SplitMeaning]) -> Meaning | None:
    """Return the meaning of a folder's name or of a value of a split column; None if it contains no word for a split.

    Args:
        given: meanings of names that the user has given, which come first; case is ignored.
    """
    asked = {key.casefold(): meaning for key, meaning in given.items()}
    if name.casefold() in asked:
        return Meaning(asked[name.casefold()], certain=True)
    words = [_word(token) for token in _tokens(name)]
    found = [word for word in words if word in _WORDS]
    if len({_WORDS[word] for word in found}) != 1:
        return None
    others = [word for word in words if word not in _WORDS and word not in _NEUTRAL]
    return Meaning(_WORDS[found[0]], certain=not others)


def _tokens(name: str) -> list[str]:
    """Return the words of a name: ``trainingSet2017`` is training, set."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [token.casefold() for token in re.findall(r"[^\W\d_]+", apart)]


def _word(token: str) -> str:
    """Return the word for a split in a compound such as ``trainset``; else the token itself."""
    for word in _WORDS:
        if token.startswith(word) and token[len(word) :] in _NEUTRAL:
            return word
    return token
