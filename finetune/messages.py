"""Text helpers for messages: counts with nouns, short lists of names, printable file names, durations and sizes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

LISTED_NAMES = 5  # names that a sentence lists before "and N more"


def natural_list(names: Iterable[object], limit: int = LISTED_NAMES) -> str:
    """Return ``a, b, c and 4 more``."""
    shown = [str(name) for name in names]
    more = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {more} more" if more > 0 else "")


def plural(count: int, noun: str) -> str:
    """Return ``1 image``, ``3 images``, ``2 classes``, ``2 boxes``."""
    return f"{count:,} {noun if count == 1 else plural_of(noun)}"


def plural_of(noun: str) -> str:
    """Return ``images``, ``classes``, ``boxes``."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def printable(path: Path | str) -> str:
    """Return a file name as text that is safe in a terminal, a page and JSON.

    Bytes that are not UTF-8, control characters and characters that change the direction of writing become escapes. Other
    characters stay, including joiners, which Persian, Hindi and composed emoji need.
    """
    text = str(path)
    return text if text.isprintable() else "".join(letter if is_safe(letter) else _escaped(letter) for letter in text)


def is_safe(letter: str) -> bool:
    """Return whether a character can be displayed unescaped."""
    return letter.isprintable() or (unicodedata.category(letter) in ("Cf", "Cn", "Co", "Zs") and letter not in _MISLEADING)


_MISLEADING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")  # they change the direction of writing


def encodable(text: str) -> str:
    """Return the text in a form that UTF-8 can encode: bytes of a file name that are not UTF-8 become escapes (``\\xe9``)."""
    return re.sub("[\ud800-\udfff]", lambda surrogate: _escaped(surrogate[0]), text)


def _escaped(letter: str) -> str:
    byte = ord(letter) - 0xDC00  # Python decodes an invalid byte as this surrogate (surrogateescape)
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else letter.encode("unicode_escape", "surrogatepass").decode()


def duration(seconds: float) -> str:
    """Return ``3.2 ms``, ``8.3 s``, ``4 min 10 s`` or ``2 h 05 min``."""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def byte_size(count: float) -> str:
    """Return ``812 B``, ``1.5 KiB``, ``14.1 MiB`` or ``2.0 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
