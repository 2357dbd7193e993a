"""Taking in an upload: unpack it, look at its classes or count its images, say what was found. In a child process with narrow
limits.

An archive comes from a stranger, and its readers are the standard library's: whatever they do with a malformed one, it costs the
child its memory or its time, not the server. Torch-free.
"""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from finetune.data.archive import DEFAULT_LIMITS, ArchiveError, ArchiveLimits, unpack_archive
from finetune.data.dataset import Dataset
from finetune.data.index import index_dataset
from finetune.data.sources.folder import image_files
from finetune.errors import DataError, DiskFull, FinetuneError, Problem

MEMORY_BYTES = 1 << 30
_OPEN_FILES = 64
_PR_SET_NO_NEW_PRIVS = 38
_REFUSALS: dict[str, type[FinetuneError]] = {kind.code: kind for kind in (ArchiveError, DataError, DiskFull)}


@dataclass(frozen=True)
class Intake:
    """What an archive held. `counts` are images by split (``all`` where there is none yet) and class."""

    kind: str
    n_files: int
    size_bytes: int
    classes: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]
    warnings: tuple[str, ...]


def take_in(archive: Path, target: Path, limits: ArchiveLimits = DEFAULT_LIMITS, *, labelled: bool = True) -> Intake:
    """Unpack `archive` into the folder `target`, which must not exist yet, and describe it. On any error there is no `target`.

    Args:
        labelled: it must be a dataset to train on; else any image files will do.

    Raises:
        ArchiveError: the archive is refused; the message names the member.
        DataError: it holds no folder of images for each class, or no image at all.
        DiskFull: no room for the contents.
    """
    command = [sys.executable, "-m", "finetune.data.intake", str(archive), str(target), json.dumps(asdict(limits))]
    command += [] if labelled else ["unlabelled"]
    try:
        ran = subprocess.run(command, check=False, capture_output=True, stdin=subprocess.DEVNULL, timeout=limits.seconds + 30)
    except subprocess.TimeoutExpired:
        raise ArchiveError(f"the archive took more than {limits.seconds:.0f} s to read; pack it again, or split it") from None
    if ran.returncode < 0:
        raise ArchiveError(f"reading the archive took too much time or memory (signal {-ran.returncode}); pack it again")
    if ran.returncode != 0:
        raise RuntimeError(f"reading {archive} failed: {ran.stderr.decode('utf-8', 'replace')}")
    answer = json.loads(ran.stdout)
    if "refused" in answer:
        _refuse(**answer["refused"])
    return Intake(**{**answer, "classes": tuple(answer["classes"]), "warnings": tuple(answer["warnings"])})


def _refuse(code: str, message: str, problems: list[dict[str, str]]) -> NoReturn:
    raise _REFUSALS[code](message, [Problem(**problem) for problem in problems])


def _look(archive: Path, target: Path, limits: ArchiveLimits, *, labelled: bool) -> dict[str, Any]:
    """In the child: what `take_in` answers, as JSON holds it."""
    try:
        unpacked = unpack_archive(archive, target, limits=limits)
        if not labelled:
            counts = {"all": {"": _count_images(target)}}
            return asdict(Intake(unpacked.kind, unpacked.n_files, unpacked.size_bytes, (), counts, ()))
        dataset = describe(target)
    except MemoryError:
        return _refusal(ArchiveError("reading the archive takes too much memory; its table of contents is not plausible"), target)
    except (ArchiveError, DataError, DiskFull) as error:
        return _refusal(error, target)
    left_out = [f"{bad.where}: {bad.reason}" for bad in dataset.bad]
    warnings = tuple(_without(target, warning) for warning in (*dataset.warnings, *left_out))
    return asdict(Intake(unpacked.kind, unpacked.n_files, unpacked.size_bytes, dataset.classes, dataset.counts(), warnings[:100]))


def _count_images(folder: Path) -> int:
    found = len(image_files(folder))
    if not found:
        raise DataError("the archive holds no image file", [Problem("file", "holds no image file")])
    return found


def describe(folder: Path) -> Dataset:
    """The dataset in `folder`. A class may have a single image where it only validates, so that alone is not refused here."""
    try:
        return index_dataset(folder)
    except DataError as original:
        try:
            dataset = index_dataset(folder, validation=folder)
        except DataError:
            raise original from None
        return replace(dataset, samples=dataset.of("val"))


def _refusal(error: FinetuneError, target: Path) -> dict[str, Any]:
    problems = [{"where": _without(target, one.where), "message": _without(target, one.message)} for one in error.problems]
    return {"refused": {"code": error.code, "message": _without(target, error.message), "problems": problems}}


def _without(folder: Path, text: str) -> str:
    """`text` as seen from inside the archive: where the server keeps it is nobody's business."""
    return text.replace(f"{folder}/", "").replace(str(folder), "the archive")


def _limit_this_process(limits: ArchiveLimits) -> None:
    seconds = int(limits.seconds) + 1
    for what, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, limits.member_bytes + 1),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def main() -> None:
    archive, target, limits = Path(sys.argv[1]), Path(sys.argv[2]), ArchiveLimits(**json.loads(sys.argv[3]))
    _limit_this_process(limits)
    sys.stdout.write(json.dumps(_look(archive, target, limits, labelled="unlabelled" not in sys.argv[4:])))


if __name__ == "__main__":
    main()
