"""Data at an address: read like the same folder on disk, fetched once, and refused in one sentence."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from formats import FORMATS, Contents, class_folders, coco, images, separated, zipped

from finetune.data.check import check_images
from finetune.data.index import index_dataset
from finetune.data.reading import Reading
from finetune.errors import DataError, MissingExtra
from finetune.storage.store import Store

CONTENTS: Contents = {None: {"cat": 3, "dog": 4}}


@pytest.fixture
def address() -> Iterator[str]:
    name = f"memory://{uuid.uuid4().hex}"
    yield name
    if fsspec.filesystem("memory").exists(name):
        fsspec.filesystem("memory").rm(name, recursive=True)


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    return Reading(store=Store(tmp_path / "cache"))


def put(local: Path, address: str) -> str:
    """Copy a file or a folder to an address; return the address of what was copied."""
    filesystem = fsspec.filesystem("memory")
    for path in [local] if local.is_file() else sorted(local.rglob("*")):
        if path.is_file():
            filesystem.pipe_file(f"{address}/{path.relative_to(local.parent)}", path.read_bytes())
    return f"{address}/{local.name}"


@pytest.mark.parametrize("name", [name for name, one in FORMATS.items() if one.source != "a table" and "short" not in name])
def test_every_format_of_a_folder_is_the_same_data_at_an_address(
    name: str, address: str, reading: Reading, tmp_path: Path
) -> None:
    local = FORMATS[name].write(tmp_path / "data", CONTENTS)
    there, here = check_images(index_dataset(put(local, address), reading=reading)), check_images(index_dataset(local))
    assert there.name == here.name == "data"
    assert there.digest == here.digest
    assert [sample.id for sample in there.samples] == [sample.id for sample in here.samples]


def test_a_table_at_an_address_names_the_files_beside_it(address: str, reading: Reading, tmp_path: Path) -> None:
    table = separated(tmp_path / "data", CONTENTS)
    put(tmp_path / "data", address)
    dataset = index_dataset(f"{address}/data/{table.name}", reading=reading)
    assert dataset.counts() == {"all": {"cat": 3, "dog": 4}}
    assert {sample.read() for sample in dataset.samples} == {one.data for one in images(CONTENTS)}


def test_an_archive_at_an_address_is_fetched_and_called_by_its_address(address: str, reading: Reading, tmp_path: Path) -> None:
    archive = put(zipped(class_folders(tmp_path / "flowers", CONTENTS)), address)
    dataset = index_dataset(archive, reading=reading)
    assert (dataset.name, dataset.root) == ("flowers", archive)
    assert str(dataset.samples[0].file).startswith(f"{archive}/")
    assert len(check_images(dataset).samples) == 7


def test_files_are_fetched_once_and_again_when_they_have_changed(
    address: str, reading: Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = put(class_folders(tmp_path / "flowers", CONTENTS), address)
    fetched: list[str] = []
    filesystem = fsspec.filesystem("memory")
    really = type(filesystem).get_file
    monkeypatch.setattr(
        type(filesystem), "get_file", lambda self, path, target: (fetched.append(path), really(self, path, target))
    )
    first = check_images(index_dataset(place, reading=reading))
    assert len(fetched) == 7
    check_images(index_dataset(place, reading=reading))
    assert len(fetched) == 7
    filesystem.pipe_file(f"{place}/cat/0.png", (tmp_path / "flowers/cat/1.png").read_bytes())
    changed = check_images(index_dataset(place, reading=reading))
    assert len(fetched) == 8
    assert changed.digest != first.digest


def test_a_copy_that_was_deleted_to_make_room_is_fetched_again(address: str, reading: Reading, tmp_path: Path) -> None:
    place = put(class_folders(tmp_path / "flowers", CONTENTS), address)
    (sample, *_) = index_dataset(place, reading=reading).samples
    data = sample.read()
    sample.file.copy.unlink()  # type: ignore[attr-defined]
    assert sample.read() == data


def test_annotations_at_an_address_may_be_named_themselves(address: str, reading: Reading, tmp_path: Path) -> None:
    place = put(coco(tmp_path / "data", CONTENTS), address)
    with pytest.raises(DataError, match="no such folder or file"):
        check_images(index_dataset(f"{place}/annotations/instances_other.json", reading=reading))


@pytest.mark.parametrize(
    ("location", "error", "words"),
    [
        ("memory://nothing-is-here", DataError, "memory://nothing-is-here: no such folder or file"),
        ("nosuch://bucket/flowers", DataError, "nosuch://bucket/flowers: cannot be read: Protocol not known: nosuch"),
        ("az://bucket/flowers", MissingExtra, "addresses of the kind az:// need another package: pip install adlfs"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(location: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as refused:
        index_dataset(location)
    assert words in str(refused.value)


def test_what_a_server_reads_for_others_is_never_at_an_address(address: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="addresses are not read here"):
        index_dataset(address, reading=Reading(roots=(tmp_path,)))


def test_a_file_address_is_the_folder_on_this_disk(tmp_path: Path) -> None:
    local = class_folders(tmp_path / "flowers", CONTENTS)
    assert index_dataset(f"file://{local}").samples == index_dataset(local).samples


def test_a_bucket_of_a_real_s3_server_is_read_like_a_folder(bucket: str, reading: Reading, tmp_path: Path) -> None:
    local = class_folders(tmp_path / "flowers", CONTENTS)
    archive = zipped(class_folders(tmp_path / "packed", CONTENTS))
    filesystem = fsspec.filesystem("s3")
    filesystem.put(str(local), f"{bucket}/", recursive=True)
    filesystem.put_file(str(archive), f"{bucket}/packed.zip")
    there = check_images(index_dataset(f"{bucket}/flowers", reading=reading))
    assert there.digest == check_images(index_dataset(local)).digest
    assert check_images(index_dataset(f"{bucket}/packed.zip", reading=reading)).digest == there.digest
    with pytest.raises(DataError, match=f"{bucket}/nothing: no such folder or file"):
        index_dataset(f"{bucket}/nothing", reading=reading)
