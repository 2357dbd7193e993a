"""Revisions: the same for the same data in any format, required by a job, and compared image by image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from folders import encoded, write_classes
from formats import FORMATS, Contents, class_folders

from finetune.cli import cli
from finetune.data import check
from finetune.data.check import check_images
from finetune.data.dataset import Dataset
from finetune.data.index import index_dataset
from finetune.data.manifest import compare, find_manifest, keep, manifest_of, require
from finetune.data.reading import Columns, Reading
from finetune.errors import DataChangedError, DataError, NotFound

CONTENTS: Contents = {None: {"cat": 3, "dog": 4}}


def checked(location: Path, reading: Reading | None = None) -> Dataset:
    return check_images(index_dataset(location, reading=reading))


def test_the_same_images_have_the_same_revision_in_every_format(tmp_path: Path) -> None:
    digests = {
        name: checked(written.write(tmp_path / name.replace(",", ""), CONTENTS)).digest for name, written in FORMATS.items()
    }
    assert len(digests) >= 15
    assert len(set(digests.values())) == 1, digests


def test_a_kept_manifest_is_found_by_the_beginning_of_its_digest(tmp_path: Path) -> None:
    dataset = checked(class_folders(tmp_path / "data", CONTENTS))
    path = keep(tmp_path / "kept", dataset)
    assert find_manifest(tmp_path / "kept", dataset.digest[:8]) == manifest_of(dataset)
    path.write_text("{}\n")
    with pytest.raises(DataError, match="is damaged"):
        find_manifest(tmp_path / "kept", dataset.digest)
    with pytest.raises(NotFound, match="no such revision is known here"):
        find_manifest(tmp_path / "kept", "0" * 8)


def test_every_kind_of_change_is_told_apart(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", {"a": 6, "b": 3})
    before = manifest_of(checked(root))
    (root / "a/0.png").unlink()
    (root / "a/1.png").write_bytes(encoded("other"))
    (root / "a/2.png").rename(root / "b/moved.png")
    (root / "a/3.png").rename(root / "a/renamed.png")
    (root / "c").mkdir()
    (root / "c/new.png").write_bytes(encoded("new"))
    (root / "c/newer.png").write_bytes(encoded("newer"))
    found = compare(before, manifest_of(checked(root)))
    assert found.added == ("c/new.png", "c/newer.png")
    assert found.removed == ("a/0.png",)
    assert found.replaced == ("a/1.png",)
    assert found.relabelled == (("b/moved.png", ("a",), ("b",)),)
    assert found.renamed == (("a/2.png", "b/moved.png"), ("a/3.png", "a/renamed.png"))
    assert (found.new_classes, found.lost_classes) == (("c",), ())
    assert found.sentence() == "2 images added, 1 removed, 1 replaced, 1 relabelled, 2 renamed, 1 new class"


def test_renaming_alone_is_no_other_revision_and_a_group_is(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", {"a": 2, "b": 2})
    before = checked(root)
    (root / "a/0.png").rename(root / "a/other.png")
    after = checked(root)
    assert after.digest == before.digest
    changes = compare(manifest_of(before), manifest_of(after)).counts()
    assert {kind for kind, count in changes.items() if count} == {"renamed"}
    rows = ["file,label,patient", *(f"{label}/{n},{label},{n}" for label in "ab" for n in ("1.png",))]
    for name, text in (("plain", rows), ("grouped", rows)):
        (root / f"{name}.csv").write_text("\n".join(text))
    plain = check_images(index_dataset(root / "plain.csv", for_training=False, reading=Reading(Columns(label="label"))))
    grouped = check_images(
        index_dataset(root / "grouped.csv", for_training=False, reading=Reading(Columns(label="label", group="patient")))
    )
    assert plain.digest != grouped.digest
    assert len(compare(manifest_of(plain), manifest_of(grouped)).regrouped) == 2


def test_copies_are_matched_by_their_names_before_anything_is_called_renamed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded("same"))
    before = manifest_of(check_images(index_dataset(root, for_training=False)))
    (root / "a/2.png").unlink()
    found = compare(before, manifest_of(check_images(index_dataset(root, for_training=False))))
    assert (found.removed, found.renamed, found.relabelled) == (("a/2.png",), (), ())


def test_another_revision_than_asked_for_is_refused_with_what_differs(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", {"a": 3, "b": 3})
    first = checked(root)
    keep(tmp_path / "kept", first)
    require(first, first.digest[:8], tmp_path / "kept")
    (root / "a/0.png").unlink()
    with pytest.raises(DataChangedError, match=rf"asks for {first.digest[:8]}: 1 image removed"):
        require(checked(root), first.digest[:8], tmp_path / "kept")
    with pytest.raises(DataChangedError, match=r"asks for 00000000\. Give"):
        require(checked(root), "00000000", tmp_path / "kept")


def test_a_second_check_reads_only_files_that_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_classes(tmp_path / "data", {"a": 3, "b": 3})
    first = check_images(index_dataset(root), memory=tmp_path / "notes")
    read: list[str] = []
    really = check.header_size
    monkeypatch.setattr(check, "header_size", lambda data: (read.append("header"), really(data))[1])
    monkeypatch.setattr(check, "image_size", lambda data: read.append("decoded"))
    assert check_images(index_dataset(root), memory=tmp_path / "notes") == first
    assert read == []
    (root / "a/0.png").write_bytes(encoded("other"))
    assert check_images(index_dataset(root), memory=tmp_path / "notes").digest != first.digest
    assert read == ["header", "decoded"]


def show(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(cli, ["data", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document: dict[str, object] = json.loads(result.stdout)
    return document


def test_the_commands_name_data_by_its_place_or_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    root = write_classes(tmp_path / "data", {"a": 3, "b": 3})
    shown = show("show", str(root))
    assert shown["counts"] == {"all": {"a": 3, "b": 3}}
    revision = str(shown["revision"])
    (root / "a/0.png").unlink()
    found = show("diff", revision[:10], str(root))
    assert (found["before"], found["removed"]) == (revision, ["a/0.png"])
    text = CliRunner().invoke(cli, ["data", "diff", revision[:10], str(root)], catch_exceptions=False).output
    assert "1 image removed" in text
    assert "a/0.png" in text


@pytest.mark.parametrize("counts", [{"a": 3}, {"a": 3, "b": 1}])
def test_data_that_training_refuses_is_not_shown_as_fit(counts: dict[str, int], tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", counts)
    with pytest.raises(DataError) as of_training:
        index_dataset(root)
    shown = CliRunner().invoke(cli, ["data", "show", str(root)])
    assert str(shown.exception) == str(of_training.value)
