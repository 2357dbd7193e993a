"""The cases of findings that users have reviewed and accepted, and that are not reported to them again.

They are stored for each owner, in the workspace. A case of images is identified by their bytes, so it is accepted in every
upload that contains them; a case without images (of a class, of the whole data) is accepted in the upload that it is about.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import Conflict
from finetune.storage.files import write_atomic

MOST = 100_000  # cases of one owner
_lock = threading.Lock()


class Acknowledgements:
    """The accepted cases of the owners of one workspace."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, owner: str) -> frozenset[str]:
        """Return the names (`accepted_as`) of the cases that an owner has accepted."""
        try:
            return frozenset(self._file(owner).read_text(encoding="utf-8").split())
        except FileNotFoundError:
            return frozenset()

    def change(self, owner: str, accepted: Iterable[str], withdrawn: Iterable[str]) -> None:
        """Accept cases and withdraw others.

        Raises:
            Conflict: the owner would have more than `MOST` accepted cases.
        """
        with _lock:
            found = (self.of(owner) - set(withdrawn)) | set(accepted)
            if len(found) > MOST:
                raise Conflict(f"more than {MOST:,} cases are acknowledged; correct the data instead")
            text = "".join(f"{one}\n" for one in sorted(found))
            write_atomic(self._file(owner), lambda stream: stream.write(text.encode()))

    def _file(self, owner: str) -> Path:
        return self._folder / f"{hashlib.sha256(owner.encode()).hexdigest()[:32]}.txt"


def accepted_as(file_id: str, case: Mapping[str, Any]) -> str:
    """Return the name under which the acceptance of a case is stored."""
    return str(case["key"]) if case["ids"] else f"{file_id}:{case['key']}"


def without_accepted(finding: Mapping[str, Any], file_id: str, accepted: frozenset[str]) -> dict[str, Any]:
    """Return a finding without its accepted cases, and with their number."""
    cases: Sequence[Mapping[str, Any]] = finding["cases"]
    left = [case for case in cases if accepted_as(file_id, case) not in accepted]
    done = len(cases) - len(left)
    return {**finding, "cases": left, "count": finding["count"] - done, "acknowledged": finding["acknowledged"] + done}
