"""Archives from strangers: good ones become folders, bad ones one sentence, and nothing is ever written elsewhere."""

from __future__ import annotations

import errno
import gzip
import os
import random
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from archives import bad, good, photographs, tar_of, zip_of

from finetune.data.archive import ArchiveError, ArchiveLimits, list_members, read_member
from finetune.data.contents import read_members, unpack_archive
from finetune.data.intake import unpack_upload
from finetune.errors import DataError, DiskFull

GOOD, BAD = good(), bad()
N_MUTATIONS, N_MUTATIONS_SLOW = 300, 6000


def everything_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def unpack(tmp_path: Path, data: bytes, **limits: float) -> Path:
    archive, target = tmp_path / "in" / "archive", tmp_path / "out" / "dataset"
    archive.parent.mkdir(exist_ok=True)
    archive.write_bytes(data)
    unpack_archive(archive, target, limits=ArchiveLimits(**limits))  # type: ignore[arg-type]
    return target


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_archive_becomes_the_files_that_were_packed(kind: str, tmp_path: Path) -> None:
    target = unpack(tmp_path, GOOD[kind])
    objects = {path.name: path for path in (target / "objects").rglob("*") if path.is_file()}
    held = [one for one in read_members(target) if one.sha256]
    assert {one.name.decode().removeprefix("./"): objects[one.sha256].read_bytes() for one in held} == photographs()
    assert all(re.fullmatch("[0-9a-f]{64}", name) and path.stat().st_mode & 0o777 == 0o600 for name, path in objects.items())


@pytest.mark.parametrize("kind", [kind for kind in GOOD if "tar.gz" not in kind])
def test_a_good_archive_is_read_where_it_lies(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(GOOD[kind])
    members = [member for member in list_members(tmp_path / "a") if not member.is_folder]
    read = {member.name.decode().removeprefix("./"): read_member(tmp_path / "a", member) for member in members}
    assert read == photographs()
    assert everything_under(tmp_path) == {"a"}


@pytest.mark.parametrize("what", [what for what in BAD if "tar.gz" not in what])
def test_a_bad_archive_is_refused_where_it_lies_in_the_same_words(what: str, tmp_path: Path) -> None:
    data, said = BAD[what]
    (tmp_path / "a").write_bytes(data)

    def read_all() -> None:
        for member in list_members(tmp_path / "a"):
            read_member(tmp_path / "a", member)
        raise ArchiveError("the archive holds no files|not a zip")  # an empty one is refused for what it lacks, later

    with pytest.raises(ArchiveError, match=said):
        read_all()
    assert everything_under(tmp_path) == {"a"}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_archive_is_refused_with_the_reason_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    data, said = BAD[what]
    with pytest.raises(ArchiveError, match=said):
        unpack(tmp_path, data)
    assert everything_under(tmp_path) <= {"in", "in/archive", "out"}


def test_every_kind_of_bad_archive_is_there() -> None:
    assert len(BAD) >= 44


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"members": 5}, "more than 5 members"),
        ({"member_bytes": 100}, "is larger than"),
        ({"total_bytes": 1000}, "takes the contents over"),
        ({"depth": 1}, "folders deep"),
        ({"seconds": -1.0}, "was not reached within"),
    ],
)
@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_each_limit_is_kept(limits: dict[str, float], said: str, pack: object, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=said):
        unpack(tmp_path, pack(photographs()), **limits)  # type: ignore[operator]
    assert everything_under(tmp_path) <= {"in", "in/archive", "out"}


def test_a_bomb_stops_at_its_limit_and_not_after_filling_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0
    real_open = os.open

    def counting(path: object, flags: int, mode: int = 0o777, **more: int) -> int:
        nonlocal written
        written += bool(flags & os.O_CREAT)
        return real_open(path, flags, mode, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", counting)
    bomb = zip_of({f"daisy/{number}.png": bytes(4 << 20) for number in range(20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ArchiveError, match="200 times"):
        unpack(tmp_path, bomb)
    assert written <= 1 + (200 * len(bomb) + (1 << 20)) // (4 << 20)


def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    archive = tmp_path / "archive"
    archive.write_bytes(GOOD["zip"])
    monkeypatch.setattr(os, "open", full)
    with pytest.raises(DiskFull, match="disk is full"):
        unpack_archive(archive, tmp_path / "dataset")


def mutated(generator: random.Random, seeds: list[bytes]) -> bytes:
    """A seed archive with bytes changed, cut, doubled or grafted from another."""
    data = bytearray(generator.choice(seeds))
    for _ in range(generator.randint(1, 8)):
        at = generator.randrange(len(data)) if data else 0
        match generator.randrange(5):
            case 0:
                data[at : at + 1] = bytes([generator.randrange(256)])
            case 1:
                data[at : at + generator.randint(1, 40)] = b""
            case 2:
                data[at:at] = data[at : at + generator.randint(1, 600)]
            case 3:
                data[at : at + 8] = generator.choice([b"\xff" * 8, bytes(8), b"\x80" + bytes(7), b"77777777"])
            case _:
                other = generator.choice(seeds)
                start = generator.randrange(len(other))
                data[at:at] = other[start : start + generator.randint(1, 512)]
    return bytes(data)


def attack(tmp_path: Path, count: int, seed: int) -> tuple[int, int]:
    """Unpack `count` mutated archives; returns how many were taken and how many refused."""
    generator = random.Random(seed)
    seeds = [*GOOD.values(), *(data for data, _ in BAD.values() if len(data) < 20_000)]
    archive, target = tmp_path / "in" / "archive", tmp_path / "out" / "dataset"
    archive.parent.mkdir()
    taken = refused = 0
    for number in range(count):
        archive.write_bytes(mutated(generator, seeds))
        place = target.with_name(f"dataset-{number}")
        try:
            unpack_archive(archive, place, limits=ArchiveLimits(seconds=20, total_bytes=64 << 20))
        except ArchiveError:
            refused += 1
            assert not place.exists()
        else:
            taken += 1
            assert all(not path.is_symlink() for path in place.rglob("*"))
    outside = {name for name in everything_under(tmp_path) if not name.startswith("out/dataset-")}
    assert outside <= {"in", "in/archive", "out"}
    return taken, refused


@pytest.mark.timeout(120)
def test_mutated_archives_are_taken_or_refused_and_nothing_else(tmp_path: Path) -> None:
    taken, refused = attack(tmp_path, N_MUTATIONS, seed=1)
    assert taken + refused == N_MUTATIONS
    assert refused > N_MUTATIONS / 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thousands_of_mutated_archives_neither_hang_nor_escape(tmp_path: Path) -> None:
    taken, refused = attack(tmp_path, N_MUTATIONS_SLOW, seed=2)
    assert taken + refused == N_MUTATIONS_SLOW


# --- in the limited child ---------------------------------------------------------------------------


def test_an_upload_is_described_by_its_classes(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of({**photographs({"daisy": 3, "rose": 2}), "rose/notes.txt": b"hello"}))
    found = unpack_upload(tmp_path / "a.zip", tmp_path / "dataset")
    assert (found.kind, found.n_files, found.classes) == ("zip", 6, ("daisy", "rose"))
    assert found.counts == {"all": {"daisy": 3, "rose": 2}}
    assert found.warnings == ("1 file not named like an image, left out: rose/notes.txt",)
    assert len(read_members(tmp_path / "dataset")) == 6


def test_splits_inside_are_seen(tmp_path: Path) -> None:
    members = {f"{split}/{name}": data for split in ("train", "val") for name, data in photographs().items()}
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    assert unpack_upload(tmp_path / "a.tar", tmp_path / "dataset").counts == {
        "train": {"daisy": 3, "rose": 3},
        "val": {"daisy": 3, "rose": 3},
    }


def test_a_class_with_one_image_may_be_there_to_validate_on(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of(photographs({"daisy": 1, "rose": 1})))
    assert unpack_upload(tmp_path / "a.zip", tmp_path / "dataset").classes == ("daisy", "rose")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (photographs({"daisy": 3}), "only one class"),
        ({"0.png": photographs()["daisy/0.png"], **photographs()}, "no class folder"),
        ({"daisy/notes.txt": b"a", "rose/notes.txt": b"b"}, "has no images"),
    ],
)
def test_what_nobody_could_train_on_is_refused_with_the_right_layout(
    members: dict[str, bytes], said: str, tmp_path: Path
) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of(members))
    with pytest.raises(DataError, match="one folder per class") as refusal:
        unpack_upload(tmp_path / "a.zip", tmp_path / "dataset")
    assert said in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


def test_the_childs_refusal_is_the_same_as_in_process(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(BAD["zip: parent"][0])
    with pytest.raises(ArchiveError, match=r"'\.\./escaped\.png' points out"):
        unpack_upload(tmp_path / "a.zip", tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_an_archive_that_wants_too_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PAX header of two gigabytes of zeros, small when compressed, which the standard library reads as a whole."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2 << 30
    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as stream:
        stream.write(header.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(64):
            stream.write(bytes(1 << 20))
    with pytest.raises(ArchiveError):
        unpack_upload(tmp_path / "a.tar.gz", tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_an_uploaded_spreadsheet_is_named_though_it_is_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    with pytest.raises(DataError, match=r"labels\.xlsx: spreadsheets are not read\. Save the table as CSV"):
        unpack_upload(tmp_path / "a.zip", tmp_path / "dataset", filename="labels.xlsx")
