"""Decode and check the names of files and folders, and derive class names from them. Torch-free.

An archive may store names in any encoding, and often does not state which. The encoding is estimated from all names together; if
several encodings are plausible, this is reported. A path from an archive is always a list of checked parts.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.messages import is_safe, natural_list

MAX_DEPTH = 64  # folders in a path, the file included
MAX_PART_CHARACTERS = 255  # of one name in a path, as file systems allow
_DRIVES = tuple(f"{letter}:" for letter in "abcdefghijklmnopqrstuvwxyz")


class NameRefused(ValueError):
    """Raised for a path that is not allowed in an archive; the message is a phrase that follows the member's name."""


@dataclass(frozen=True)
class DecodedNames:
    """Decoded names with their encoding."""

    texts: tuple[str, ...]
    encoding: str
    remark: str | None = None  # how the names were decoded, if the encoding was estimated


# In the order in which they are preferred where the evidence is equal.
_ENCODINGS = (
    *("cp437", "cp850", "cp932", "gbk", "big5", "cp949", "cp866"),  # of DOS and Windows, which most zips without a flag are in
    *("cp1252", "cp1251", "cp1253", "cp1254", "cp862"),
)
_SHOWN_DIFFERENCES = 3
_FEW_BYTES = 6
_CLOSE = 0.15  # of plausibility; encodings within this difference of the best one are reported


def decode_names(raw: Sequence[bytes], encoding: str = "auto") -> DecodedNames:
    """Decode names of unknown encoding.

    Args:
        encoding: name of a Python codec; ``auto``: UTF-8 if all names are valid UTF-8, else the most plausible of the encodings
            that archive programs use.

    Raises:
        NameRefused: `encoding` does not exist, or a name is not valid in it.
    """
    if encoding != "auto":
        return DecodedNames(tuple(_in(encoding, name) for name in raw), encoding)
    foreign = [name for name in raw if not name.isascii()]
    if not foreign:
        return DecodedNames(tuple(name.decode("ascii") for name in raw), "ascii")
    readings = _readings(foreign)
    as_utf8 = _decoded(foreign, "utf-8")
    if as_utf8 is not None:
        by_chance = sum(len(name) - len(name.decode()) for name in foreign) < _FEW_BYTES  # few bytes may be UTF-8 by accident
        others = [(name, texts) for name, texts, value in readings if name == "cp437" or (by_chance and value > 1 - _CLOSE)]
        remark = f"names without a stated encoding are valid UTF-8 and were read as UTF-8 ({_examples(as_utf8, others)})"
        return DecodedNames(tuple(name.decode() for name in raw), "utf-8", remark)
    if not readings:
        texts = tuple(name.decode("utf-8", "surrogateescape") for name in raw)
        return DecodedNames(
            texts, "utf-8", "names in an encoding that was not recognised; --set data.name_encoding=NAME names it"
        )
    best, texts, score = readings[0]
    others = [(name, other) for name, other, value in readings[1:] if other != texts and value >= score - _CLOSE]
    remark = f"names without a stated encoding were read as {best} ({_examples(texts, others)})"
    return DecodedNames(
        tuple(name.decode(best) for name in raw), best, remark + "; --set data.name_encoding=NAME chooses another"
    )


def _in(encoding: str, name: bytes) -> str:
    try:
        return name.decode(encoding)
    except LookupError:
        raise NameRefused(f"data.name_encoding {encoding!r} is not an encoding; try utf-8, cp437, cp932, gbk or cp1252") from None
    except UnicodeDecodeError:
        raise NameRefused(f"is not valid in data.name_encoding {encoding}") from None


def _decoded(raw: Sequence[bytes], encoding: str) -> tuple[str, ...] | None:
    try:
        return tuple(name.decode(encoding) for name in raw)
    except UnicodeDecodeError:
        return None


def _readings(raw: Sequence[bytes]) -> list[tuple[str, tuple[str, ...], float]]:
    """Return (encoding, texts, plausibility) for each encoding in which the names are valid, the most plausible first."""
    sample = tuple(dict.fromkeys(part for name in raw for part in name.split(b"/") if not part.isascii()))[:500]
    found = []
    for encoding in _ENCODINGS:
        texts = _decoded(raw, encoding)
        parts = None if texts is None else _decoded(sample, encoding)
        if texts is not None:
            found.append((encoding, texts, _plausibility("".join(parts or texts), encoding)))
    return sorted(found, key=lambda reading: -reading[2])


def _plausibility(text: str, encoding: str) -> float:
    """Return the plausibility of `text` as a name, at most 1."""
    foreign = [letter for letter in text if not letter.isascii()]
    values = [_letter_plausibility(letter, encoding) for letter in foreign]
    scripts = {_script(letter) for letter in foreign if letter.isalpha()}
    pairs = [pair for pair in itertools.pairwise(text) if not (pair[0] + pair[1]).isascii()]
    jumps = sum(before.islower() and after.isupper() for before, after in pairs)
    accents = max(map(_accent_share, re.findall(r"\w+", text)), default=0.0)  # no language writes words of accents alone
    doubts = 0.3 * (len(scripts) > 1) + 0.5 * jumps / max(1, len(foreign)) + 0.5 * (accents > 0.7)
    doubts += 0.5 * any(_mixes_alphabets(word) for word in re.findall(r"\w+", text))
    # Chinese text seldom happens to be common Korean syllables throughout; Korean text always is common Chinese characters.
    bonus = 0.01 * (len(foreign) > 2 and scripts == {"HANGUL"})
    return sum(values) / max(1, len(values)) - doubts + bonus


def _mixes_alphabets(word: str) -> bool:
    """Return whether a word mixes Latin letters with those of another alphabet, which suggests a wrong encoding."""
    scripts = {_script(letter) for letter in word if letter.isalpha()}
    return len(scripts & {"LATIN", "CYRILLIC", "GREEK", "HEBREW", "ARABIC"}) > 1


def _accent_share(word: str) -> float:
    """Return the share of accented Latin letters in a word of some length."""
    accented = sum(not letter.isascii() and _script(letter) == "LATIN" for letter in word)
    return accented / len(word) if accented > 1 else 0.0


def _letter_plausibility(letter: str, encoding: str) -> float:
    category = unicodedata.category(letter)
    if category[0] == "C":
        return -3.0
    if "\uff61" <= letter <= "\uff9f":  # half-width kana: they are rare in names, and frequent in names that are decoded wrongly
        return 0.2
    if encoding in _COMMON_LEAD_BYTES and ("\u4e00" <= letter <= "\u9fff" or "\uac00" <= letter <= "\ud7a3"):
        low, high = _COMMON_LEAD_BYTES[encoding]
        return 1.0 if low <= letter.encode(encoding, "replace")[0] <= high else 0.3
    if category[0] in "LM":
        return 0.5 if letter in _RARE_LETTERS else 1.0
    return 0.7 if category in ("Lm", "Nd", "Ps", "Pe", "Po", "Pd", "Zs") and letter > "\u2fff" else -0.3


_RARE_LETTERS = frozenset("ðþýÐÞÝ")  # where Western encodings have these, the Turkish one has letters of many more people
_COMMON_LEAD_BYTES = {"cp932": (0x88, 0x97), "gbk": (0xB0, 0xD7), "big5": (0xA4, 0xC6), "cp949": (0xB0, 0xC8)}
"""Two-byte encodings list the characters that are used daily before the rare ones."""


def _script(letter: str) -> str:
    first = unicodedata.name(letter, "?").split(" ")[0]
    return "CJK" if first in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else first


def _examples(texts: Sequence[str], others: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return an example of a name as it was decoded, and as other encodings would decode it."""
    position = max(range(len(texts)), key=lambda index: sum(not letter.isascii() for letter in texts[index]))
    remark = repr(_last_foreign_part(texts[position]))
    alternatives = [f"{_last_foreign_part(texts[position])!r} as {name}" for name, texts in others[:_SHOWN_DIFFERENCES]]
    return f"{remark}; it could also be {natural_list(alternatives)}" if alternatives else remark


def _last_foreign_part(path: str) -> str:
    parts = [part for part in path.replace("\\", "/").split("/") if not part.isascii()]
    return parts[0] if parts else path


def checked_parts(path: str, *, max_depth: int = MAX_DEPTH) -> tuple[str, ...]:
    """Return the folders and the file name of a member of an archive. Backslashes, which some programs write, are separators too.

    Raises:
        NameRefused: the path leads out of the archive, or cannot be displayed or stored.
    """
    if path[:1] in ("/", "\\") or path[:2].lower() in _DRIVES:
        raise NameRefused("has an absolute path")
    parts = tuple(part for part in path.replace("\\", "/").split("/") if part not in ("", "."))
    if ".." in parts:
        raise NameRefused("points out of the archive with '..'")
    if any(not is_safe(letter) and not "\ud800" <= letter <= "\udfff" for letter in path):
        raise NameRefused("has a control or direction character in its name")
    if len(parts) > max_depth:
        raise NameRefused(f"lies more than {max_depth} folders deep")
    if any(len(part) > MAX_PART_CHARACTERS for part in parts):
        raise NameRefused(f"has a name of more than {MAX_PART_CHARACTERS} characters")
    return parts


def class_name(text: str) -> str:
    """Return the name of a class: that of its folder, or its label in a table.

    File systems of macOS store accents separately from their letters (NFD). Such a name is composed again (NFC); any other
    spelling is kept.
    """
    return unicodedata.normalize("NFC", text) if text == unicodedata.normalize("NFD", text) else text


def in_encoding(name: str, encoding: str) -> str:
    """Return a name from a file system that is not UTF-8, decoded with `encoding`; ``auto`` returns it unchanged."""
    if encoding == "auto" or not any("\ud800" <= letter <= "\udfff" for letter in name):
        return name
    try:
        return name.encode("utf-8", "surrogateescape").decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return name


def problem_of_class_name(name: str) -> str | None:
    """Return the reason why a text cannot be a class name; None if it can."""
    if not name.strip():
        return "is empty"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return "has bytes that are not UTF-8"
    if not all(is_safe(letter) for letter in name):
        return "has control or direction characters"
    return None


def same_class(name: str) -> str:
    """Return a key that is equal for names that differ only in case, surrounding spaces or the encoding of accents."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def possible_readings(raw: bytes) -> str:
    """Return possible decodings of a name that is not UTF-8, such as ``'café' as cp1252``."""
    readings: list[str] = []
    seen: set[str] = set()
    for encoding, texts, _ in _readings([raw]):
        if texts[0] not in seen:
            readings.append(f"{texts[0]!r} as {encoding}")
            seen.add(texts[0])
    return natural_list(readings, _SHOWN_DIFFERENCES)
