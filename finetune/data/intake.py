"""Unpack and describe uploads in a child process with strict limits. Torch-free.

Archives and tables are not trusted, and third-party libraries read them. If a malformed file makes a library use too much memory
or time, only the child process is affected and not the server.
"""

from __future__ import annotations

import ctypes
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from finetune.advice import for_http
from finetune.data.archive import DEFAULT_LIMITS, NOT_AN_ARCHIVE, ArchiveError, ArchiveLimits, archive_kind
from finetune.data.contents import store_file, unpack_archive
from finetune.data.dataset import Dataset, LocalFile, Sample, StoredFile
from finetune.data.index import index_dataset
from finetune.data.places import open_place
from finetune.data.places.opening import NO_SPREADSHEETS, SPREADSHEETS
from finetune.data.reading import Reading, reading_of
from finetune.data.tables import SUFFIXES
from finetune.errors import DataError, DiskFull, FinetuneError, MissingExtra, Problem
from finetune.messages import printable
from finetune.spec import DataSpec

MEMORY_BYTES = 3 << 29  # of address space, of which the readers of tables reserve much and use little
_OPEN_FILES = 64
_PR_SET_NO_NEW_PRIVS = 38
_REFUSALS: dict[str, type[FinetuneError]] = {kind.code: kind for kind in (ArchiveError, DataError, DiskFull, MissingExtra)}
_TABLE_ALONE = (
    "a table alone holds no images, and this server fetches none: put it into a zip together with the images that it names"
)


@dataclass(frozen=True)
class Intake:
    """The description of an upload.

    Args:
        kind: of the upload: zip, tar, tar.gz, parquet or jsonl.
        counts: images by split (``all`` if there is none yet) and class.
        understood: sentences: how it was interpreted, if several interpretations were possible.
    """

    kind: str
    n_files: int
    size_bytes: int
    classes: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]
    warnings: tuple[str, ...]
    understood: tuple[str, ...] = ()


def unpack_upload(
    archive: Path, target: Path, limits: ArchiveLimits = DEFAULT_LIMITS, filename: str = "", *, labelled: bool = True
) -> Intake:
    """Unpack an upload into the folder `target`, which must not exist yet, and describe it. On an error delete `target`.

    Args:
        filename: the name given by the client, which determines the format of tables.
        labelled: whether it must be a dataset to train on; otherwise an archive of image files is sufficient.

    Raises:
        ArchiveError: the archive is refused; the message names the member.
        DataError: it has no labelled images in a known layout or, if labels are not needed, no image.
        DiskFull: the disk has no room for the contents.
    """
    request = {
        "archive": str(archive), "target": str(target), "limits": asdict(limits), "filename": filename, "labelled": labelled,
    }  # fmt: skip
    answer = _ask_child(request, limits, "archive")
    lists = {name: tuple(answer[name]) for name in ("classes", "warnings", "understood")}
    return Intake(**{**answer, **lists})


def check(locations: Mapping[str, Path], data: DataSpec, limits: ArchiveLimits = DEFAULT_LIMITS) -> Mapping[str, int]:
    """Return the number of images of each split (``all``: images without a split); refuse data as `index_dataset` does.

    Tables and annotations are read in a child process.

    Args:
        locations: ``training_file`` and, where given, ``validation_file`` and ``test_file``.

    Raises:
        DataError: with one problem for everything that keeps the data from being used.
        ArchiveError: an archive is refused; the message names the member.
    """
    if any(map(needs_child_process, locations.values())):
        paths = {name: str(path) for name, path in locations.items()}
        sizes: dict[str, int] = _ask_child({"locations": paths, "data": data.model_dump(mode="json")}, limits, "data")["sizes"]
        return sizes
    return _index(locations, data).sizes()


def listed(locations: Mapping[str, Path], data: DataSpec, limits: ArchiveLimits = DEFAULT_LIMITS) -> Dataset:
    """Return the samples of data with tables or annotations, which are read in a child process.

    Images that are embedded in a table are left out, because they have no file.

    Args:
        locations: as for `check`.

    Raises:
        DataError: the data cannot be read.
        ArchiveError: an archive is refused; the message names the member.
    """
    paths = {name: str(path) for name, path in locations.items()}
    answer = _ask_child({"listed": paths, "data": data.model_dump(mode="json")}, limits, "data")
    samples = tuple(
        Sample(id, StoredFile(Path(path), name), target if isinstance(target, int) else tuple(target), split, group, weight)
        for id, path, name, target, split, group, weight in answer["samples"]
    )
    return Dataset(answer["name"], answer["root"], tuple(answer["classes"]), samples)


def _index(locations: Mapping[str, Path], data: DataSpec, *, for_training: bool = True) -> Dataset:
    paths = [locations.get(name) for name in ("training_file", "validation_file", "test_file")]
    assert paths[0] is not None
    return index_dataset(paths[0], paths[1], paths[2], for_training=for_training, reading=reading_of(data))


def needs_child_process(location: Path) -> bool:
    """Return whether a location must be read in a child process: it is a file, or has tables or annotations in it."""
    if location.is_file():
        return True
    root = open_place(location, Reading()).tree.root()
    return any(node.suffix in (".json", ".xml") or node.suffix in SUFFIXES for node in root.all_files())


def _ask_child(request: Mapping[str, Any], limits: ArchiveLimits, what: str) -> dict[str, Any]:
    """Return the answer of a child process; raise the error with which it refused the data."""
    answer = _run_child(request, limits, what)
    if "refused" in answer:
        _raise_refusal(**answer["refused"])
    return answer


def _run_child(request: Mapping[str, Any], limits: ArchiveLimits, what: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "finetune.data.intake", json.dumps(request)]
    try:
        ran = subprocess.run(command, check=False, capture_output=True, stdin=subprocess.DEVNULL, timeout=limits.seconds + 30)
    except subprocess.TimeoutExpired:
        raise ArchiveError(f"the {what} took more than {limits.seconds:.0f} s to read; pack it again, or split it") from None
    if ran.returncode < 0:
        raise ArchiveError(f"reading the {what} took too much time or memory (signal {-ran.returncode}); pack it again")
    if ran.returncode != 0:
        raise RuntimeError(f"reading the {what} failed: {ran.stderr.decode('utf-8', 'replace')}")
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def _raise_refusal(code: str, message: str, problems: list[dict[str, str]]) -> NoReturn:
    raise _REFUSALS[code](message, [Problem(**problem) for problem in problems])


def _answer_unpack(archive: Path, target: Path, limits: ArchiveLimits, filename: str, *, labelled: bool) -> dict[str, Any]:
    """Compute the answer of `unpack_upload` as JSON values, in the child process."""
    try:
        kind, n_files, size_bytes = _unpack(archive, target, limits, filename)
        if not labelled:
            return asdict(Intake(kind, n_files, size_bytes, (), {"all": {"": _count_images(target)}}, ()))
        dataset = describe(target)
    except MemoryError:
        return _refusal(ArchiveError("reading the archive takes too much memory; its table of contents is not plausible"), target)
    except (ArchiveError, DataError, DiskFull, MissingExtra) as error:
        return _refusal(error, target)
    left_out = [f"{bad.where}: {bad.reason}" for bad in dataset.bad]
    warnings = tuple(for_http(_without(target, warning)) for warning in (*dataset.warnings, *left_out))
    understood = tuple(for_http(_without(target, sentence)) for sentence in dataset.understood)
    return asdict(
        Intake(kind, n_files, size_bytes, dataset.classes, dataset.counts(), warnings[:100], understood=understood[:100])
    )


def _unpack(archive: Path, target: Path, limits: ArchiveLimits, filename: str) -> tuple[str, int, int]:
    """Return the kind of an upload, its files and their size, after writing them into `target`."""
    with open(archive, "rb") as stream:
        head = stream.read(512)
    ending = f".{filename.rpartition('.')[2].lower()}"
    if ending in SPREADSHEETS:  # some of them are zips
        raise DataError(f"{printable(filename)}: {NO_SPREADSHEETS}, and put it into a zip with them")
    if archive_kind(head) is not None:
        unpacked = unpack_archive(archive, target, limits=limits)
        return unpacked.kind, unpacked.n_files, unpacked.size_bytes
    if head.startswith(b"PAR1"):
        return "parquet", 1, store_file(archive, "data.parquet", target)
    if ending in (".jsonl", ".ndjson") and head.lstrip().startswith(b"{"):
        return "jsonl", 1, store_file(archive, "data.jsonl", target)
    if ending in (".csv", ".tsv"):
        raise DataError(_TABLE_ALONE)
    raise ArchiveError(NOT_AN_ARCHIVE)


def _count_images(folder: Path) -> int:
    found = sum(node.is_image for node in open_place(folder, Reading()).tree.root().all_files())
    if not found:
        raise DataError("the archive holds no image file", [Problem("file", "holds no image file")])
    return found


def describe(folder: Path) -> Dataset:
    """Return the dataset in `folder`. A class with a single image is not refused, because the data may be for validation only."""
    try:
        return index_dataset(folder)
    except DataError as original:
        try:
            dataset = index_dataset(folder, validation=folder)
        except DataError:
            raise original from None
        return replace(dataset, samples=tuple(replace(sample, split=None) for sample in dataset.of("val")))


def _refusal(error: FinetuneError, target: Path | None) -> dict[str, Any]:
    if target is not None:
        shutil.rmtree(target, ignore_errors=True)
    problems = [{"where": _without(target, one.where), "message": _without(target, one.message)} for one in error.problems]
    return {"refused": {"code": error.code, "message": _without(target, error.message), "problems": problems}}


def _without(folder: Path | None, text: str) -> str:
    """Return `text` with paths relative to the archive, so that clients do not see where the server stores it."""
    if folder is None:
        return text
    return text.replace(f"{folder}/", "").replace(str(folder), "the archive")


def _limit_this_process(limits: ArchiveLimits) -> None:
    seconds = int(limits.seconds) + 1
    for what, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, max(limits.member_bytes, limits.table_bytes) + 1),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _answer_check(locations: Mapping[str, str], data: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the answer of `check`, in the child process."""
    try:
        dataset = _index({name: Path(path) for name, path in locations.items()}, DataSpec.model_validate(data))
    except MemoryError:
        return _refusal(DataError("reading the data takes too much memory"), None)
    except (ArchiveError, DataError, DiskFull, MissingExtra) as error:
        return _refusal(error, None)
    return {"sizes": dataset.sizes()}


def _answer_listed(locations: Mapping[str, str], data: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the answer of `listed`, in the child process."""
    paths = {name: Path(path) for name, path in locations.items()}
    try:
        dataset = _index(paths, DataSpec.model_validate(data), for_training=False)
    except MemoryError:
        return _refusal(DataError("reading the data takes too much memory"), None)
    except (ArchiveError, DataError, DiskFull, MissingExtra) as error:
        return _refusal(error, None)
    samples = [
        (one.id, str(one.file.path), str(one.file), one.target, one.split, one.group, one.weight)
        for one in dataset.samples
        if isinstance(one.file, StoredFile | LocalFile)
    ]
    return {"name": dataset.name, "root": dataset.root, "classes": dataset.classes, "samples": samples}


def answer_to(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the child process answers to a request of `unpack_upload`, `check` or `listed`."""
    if "listed" in request:
        return _answer_listed(request["listed"], request["data"])
    if "locations" in request:
        return _answer_check(**request)
    archive, target, limits = Path(request["archive"]), Path(request["target"]), ArchiveLimits(**request["limits"])
    return _answer_unpack(archive, target, limits, request["filename"], labelled=request["labelled"])


def main() -> None:
    request = json.loads(sys.argv[1])
    _limit_this_process(ArchiveLimits(**request["limits"]) if "limits" in request else DEFAULT_LIMITS)
    sys.stdout.write(json.dumps(answer_to(request)))


if __name__ == "__main__":
    main()
