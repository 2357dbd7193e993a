"""The examination of data finds every planted fault, and nothing in what is sound; what it writes corrects the data."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from click.testing import CliRunner
from folders import local_sample
from numpy.typing import NDArray
from PIL import Image
from planted import CHANGES, copied, plant_copies, plant_wrong_labels, saved
from tiny_runs import shared_at, tiny_spec

from finetune.bundle.image import decode_image
from finetune.cli import cli
from finetune.cli.examining import show_examination
from finetune.data.check import check_images
from finetune.data.corrections import corrected
from finetune.data.dataset import NO_SUCH_FILE, BadImage, Dataset
from finetune.data.index import index_dataset
from finetune.data.split import split_dataset
from finetune.doctor.examine import examine, without_accepted
from finetune.doctor.finding import Examination, Finding, not_in
from finetune.doctor.labels import doubt_labels
from finetune.doctor.looks import look_at_all
from finetune.doctor.modes import classes_that_are_two
from finetune.doctor.prescribe import accepted_in, acknowledge, reopen, write_manifest
from finetune.doctor.shortcuts import find_shortcuts
from finetune.errors import DataError, InvalidInput
from finetune.features.duplicates import clusters, near_duplicates
from finetune.runs.resolve import DatasetFacts
from finetune.studies.examination import Examined, examine_request


def texture(seed: int, size_px: tuple[int, int] = (240, 180)) -> Image.Image:
    """A picture with coarse and fine structure of its own."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((size_px[1], size_px[0], 3))
    for cells, strength in ((4, 120), (16, 60), (48, 40)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize(size_px, Image.Resampling.BICUBIC)
        picture += np.asarray(noise, np.float64) * strength / 220
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def write_textures(root: Path, counts: Mapping[str, int], size_px: tuple[int, int] = (240, 180)) -> Path:
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / name / f"{number:03d}.jpg").write_bytes(saved(texture(1000 * label + number, size_px), 90))
    return root


def read(root: Path) -> Dataset:
    return split_dataset(check_images(index_dataset(root)))


def small_grey(dataset: Dataset) -> NDArray[np.float32]:
    """Embeddings that, like a network's, hardly change with the encoding, a mirror or a crop."""
    rows = []
    for sample in dataset.samples:
        picture = Image.fromarray(decode_image(sample.read())).convert("RGB")
        colours = np.asarray(picture.resize((3, 3), Image.Resampling.BOX), np.float32)
        rows.append(np.concatenate([colours.mean(axis=(0, 1)), (colours + colours[:, ::-1]).ravel() / 8]))
    return np.stack(rows)


def alike_where_copied(dataset: Dataset) -> NDArray[np.float32]:
    """Embeddings in which a copy is nearest to its original, and everything else is somewhere."""
    rng = np.random.default_rng(0)
    places = {sample.id: rng.normal(size=16) for sample in dataset.samples}
    originals = {f"a/copy{number}.jpg": f"a/{number:03d}.jpg" for number in range(8)}
    rows = [places[originals.get(one, one)] + rng.normal(size=16) * 0.1 for one in places]
    return np.stack(rows).astype(np.float32)


def examined(root: Path) -> tuple[Dataset, Examination]:
    dataset = read(root)
    return dataset, examine(dataset, small_grey(dataset), backbone="none")


# ── copies ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_copy_is_found_and_different_pictures_are_not(kind: str, tmp_path: Path) -> None:
    root = write_textures(tmp_path / "data", {"a": 8, "b": 8})
    rng = random.Random(0)
    for number in (1, 4):
        picture = Image.open(root / "a" / f"{number:03d}.jpg").convert("RGB")
        (root / "a" / f"copy{number}.jpg").write_bytes(saved(CHANGES[kind](picture, rng)))
    dataset = read(root)
    pairs = near_duplicates(dataset.samples, alike_where_copied(dataset))
    found = {frozenset((dataset.samples[pair.first].id, dataset.samples[pair.second].id)) for pair in pairs}
    assert found == {frozenset({f"a/{number:03d}.jpg", f"a/copy{number}.jpg"}) for number in (1, 4)}


def test_copies_of_copies_are_one_group() -> None:
    assert clusters(7, [(0, 3), (3, 5), (1, 2)]) == [[0, 3, 5], [1, 2]]


def test_copies_across_splits_and_labels_are_told_apart(tmp_path: Path) -> None:
    root = write_textures(tmp_path / "data", {"a": 12, "b": 12})
    (root / "b" / "again.jpg").write_bytes((root / "a" / "003.jpg").read_bytes())
    (root / "a" / "twice.jpg").write_bytes((root / "a" / "005.jpg").read_bytes())
    dataset, examination = examined(root)
    assert [case.ids for case in examination.of("conflicting_labels").cases] == [("a/003.jpg", "b/again.jpg")]  # type: ignore[union-attr]
    assert {case.ids for case in examination.of("duplicates").cases} == {("a/005.jpg", "a/twice.jpg")}  # type: ignore[union-attr]
    assert examination.of("leaks") is None, "files with the same bytes are drawn together"
    moved = {"a/twice.jpg": "test", "a/005.jpg": "train"}
    apart = replace(dataset, samples=tuple(replace(s, split=moved.get(s.id, s.split)) for s in dataset.samples))
    leaks = examine(apart, small_grey(apart), backbone="none").of("leaks")
    assert leaks is not None
    assert (leaks.count, leaks.severity, set(leaks.cases[0].ids)) == (1, "problem", {"a/005.jpg", "a/twice.jpg"})


# ── labels and shortcuts ──────────────────────────────────────────────────────────────────────────


def test_wrong_labels_come_first_and_right_ones_are_not_doubted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    root = write_textures(tmp_path / "data", {"a": 40, "b": 40, "c": 40}, (24, 18))
    dataset = read(root)
    labels = np.array([sample.labels[0] for sample in dataset.samples])
    embeddings = (np.eye(3)[labels] * 4 + rng.normal(size=(len(labels), 3))).astype(np.float32)
    assert doubt_labels(dataset.samples, embeddings, 3) is not None
    wrong = [3, 50, 100]
    other = tuple(replace(s, target=(s.labels[0] + 1) % 3) if number in wrong else s for number, s in enumerate(dataset.samples))
    doubts = doubt_labels(other, embeddings, 3)
    assert doubts is not None
    assert set(wrong) <= set(doubts.doubted[:5])
    assert len(doubts.doubted) <= 10
    assert [int(doubts.suggested[one]) for one in wrong] == [int(labels[one]) for one in wrong]


def test_too_few_images_are_no_ground_for_doubt(tmp_path: Path) -> None:
    dataset = read(write_textures(tmp_path / "data", {"a": 5, "b": 5}, (24, 18)))
    assert doubt_labels(dataset.samples, small_grey(dataset), 2) is None


@pytest.mark.parametrize(
    ("plant", "fact"), [("size", "width in pixels"), ("format", "file format"), ("name", "pattern of the file name")]
)
def test_a_fact_that_gives_the_label_away_is_named(plant: str, fact: str, tmp_path: Path) -> None:
    root = write_textures(tmp_path / "data", {"a": 30, "b": 30, "c": 30}, (60, 44))
    assert find_shortcuts(read(root).samples, look_at_all(read(root).samples), 3) == []
    for number, path in enumerate(sorted((root / "b").iterdir())):
        if plant == "size":
            path.write_bytes(saved(texture(5000 + number, (80, 44)), 90))
        elif plant == "format":
            Image.open(path).save(path.with_suffix(".png"))
            path.unlink()
        else:
            path.rename(path.with_name(f"scanner_{path.name}"))
    dataset = read(root)
    found = {one.fact: one for one in find_shortcuts(dataset.samples, look_at_all(dataset.samples), 3)}
    assert fact in found
    assert found[fact].given_away[0][0] == dataset.classes.index("b")
    assert found[fact].given_away[0][1] > 0.9


# ── pictures and classes ──────────────────────────────────────────────────────────────────────────


def test_pictures_of_nothing_and_small_classes_are_reported_and_sound_data_is_not(tmp_path: Path) -> None:
    root = write_textures(tmp_path / "data", {"a": 24, "b": 24})
    _, sound = examined(root)
    assert [finding.kind for finding in sound.findings] == []
    Image.new("RGB", (100, 100), (90, 90, 90)).save(root / "a/blank.png")
    Image.fromarray(np.kron(np.indices((18, 24)).sum(axis=0) % 2 * 28, np.ones((10, 10))).astype(np.uint8)).save(
        root / "a/dark.png"
    )
    texture(8).resize((4, 3)).resize((240, 180), Image.Resampling.BICUBIC).save(root / "b/blurred.png")
    texture(9).resize((20, 16)).save(root / "b/tiny.png")
    write_textures(root, {"a": 0, "b": 0, "c": 4})
    _, examination = examined(root)
    found = {finding.kind: [case.ids for case in finding.cases] for finding in examination.findings}
    assert found["blank"] == [("a/blank.png",)]
    assert found["dark"] == [("a/dark.png",)]
    assert found["blurred"] == [("b/blurred.png",)]
    assert found["tiny"] == [("b/tiny.png",)]
    assert {"small_classes", "imbalance"} <= set(found)
    order = [finding.severity for finding in examination.findings]
    assert order == sorted(order, key=["problem", "doubt", "note"].index)


def test_facts_about_images_are_kept_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = read(write_textures(tmp_path / "data", {"a": 3, "b": 3}))
    first = look_at_all(dataset.samples, memory=tmp_path / "notes")
    monkeypatch.setattr("finetune.doctor.looks._look", lambda sample: pytest.fail("looked at again"))
    assert look_at_all(dataset.samples, memory=tmp_path / "notes") == first
    assert len(first) == 6


# ── what is done about it ─────────────────────────────────────────────────────────────────────────


def test_the_manifest_corrects_the_data_and_touches_no_file(tmp_path: Path) -> None:
    root = write_textures(tmp_path / "data", {"a": 12, "b": 12})
    (root / "a" / "twice.jpg").write_bytes((root / "a" / "005.jpg").read_bytes())
    (root / "a" / "small.jpg").write_bytes(saved(texture(3).resize((150, 112))))
    Image.new("RGB", (100, 100), (90, 90, 90)).save(root / "b/blank.png")
    before = {path: path.read_bytes() for path in root.rglob("*.*")}
    dataset, examination = examined(root)
    n_out, n_grouped, _ = write_manifest(tmp_path / "fixed.csv", dataset, examination, given_splits=False)
    assert {path: path.read_bytes() for path in root.rglob("*.*")} == before
    fixed = corrected(dataset, tmp_path / "fixed.csv")
    assert {sample.id for sample in dataset.samples} - {sample.id for sample in fixed.samples} == {"a/twice.jpg", "b/blank.png"}
    assert (n_out, n_grouped) == (2, 2)
    groups = {sample.id: sample.group for sample in fixed.samples if sample.group}
    assert groups == dict.fromkeys(("a/003.jpg", "a/small.jpg"), groups["a/003.jpg"])
    again = split_dataset(replace(fixed, samples=tuple(replace(s, split=None) for s in fixed.samples)))
    sides = {sample.split for sample in again.samples if sample.group}
    assert len(sides) == 1


def test_a_manifest_is_edited_by_hand_and_its_mistakes_are_told_at_once(tmp_path: Path) -> None:
    root = write_textures(tmp_path / "data", {"a": 6, "b": 6})
    dataset, examination = examined(root)
    path = tmp_path / "fixed.csv"
    write_manifest(path, dataset, examination, given_splits=False)
    rows = {row["file"]: row for row in csv.DictReader(path.read_text().splitlines())}

    def edited(**changes: dict[str, str]) -> Path:
        with open(path, "w", newline="") as stream:
            table = csv.DictWriter(stream, list(rows["a/000.jpg"]))
            table.writeheader()
            table.writerows({**row, **changes.get(row["file"][0], {})} for row in rows.values())
        return path

    rows["a/000.jpg"]["label"] = "b"
    assert dict(zip((s.id for s in corrected(dataset, edited()).samples), (s.target for s in dataset.samples), strict=True))
    fixed = {sample.id: sample.target for sample in corrected(dataset, path).samples}
    assert fixed["a/000.jpg"] == 1
    rows["a/001.jpg"]["label"] = "bb"
    with pytest.raises(DataError) as refused:
        corrected(dataset, edited(b={"use": "no"}))
    assert [problem.where for problem in refused.value.problems] == ["a/001.jpg"]
    with pytest.raises(DataError, match="yes or no"):
        corrected(dataset, edited(b={"use": "perhaps"}))
    with pytest.raises(DataError, match="it has no column"):
        corrected(dataset, Path(__file__))


def test_what_is_acknowledged_stays_so_and_new_cases_are_reported(tmp_path: Path) -> None:
    root = write_textures(tmp_path / "data", {"a": 12, "b": 12})
    (root / "b" / "again.jpg").write_bytes((root / "a" / "003.jpg").read_bytes())
    _, examination = examined(root)
    notes = tmp_path / "acknowledged.txt"
    with pytest.raises(InvalidInput, match="Did you mean 'conflicting_labels'"):
        acknowledge(notes, examination, ["conflicting_label"])
    assert acknowledge(notes, examination, ["conflicting_labels"]) == 1
    assert acknowledge(notes, examination, ["conflicting_labels"]) == 0
    (root / "b" / "other.jpg").write_bytes((root / "a" / "007.jpg").read_bytes())
    found = examined(root)[1].of("conflicting_labels")
    assert found is not None
    left = without_accepted(found, accepted_in(notes))
    assert (found.count, left.count, left.acknowledged) == (2, 1, 1)
    assert left.cases[0].ids == ("a/007.jpg", "b/other.jpg")


# ── the command ───────────────────────────────────────────────────────────────────────────────────

pytestmark = pytest.mark.usefixtures("unmeasured_machine")

TINY = ["--model", "test_efficientnet", "--set", "model.weights=none", "--set", "model.input_size_px=64"]


def check(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["check", *arguments, *TINY], catch_exceptions=False, standalone_mode=False)


def test_the_command_examines_writes_a_page_and_a_manifest_that_a_run_is_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    root = write_textures(tmp_path / "data", {"a": 12, "b": 12})
    (root / "a" / "twice.jpg").write_bytes((root / "a" / "005.jpg").read_bytes())
    page, fixed = tmp_path / "page.html", tmp_path / "fixed.csv"
    document = json.loads(check(str(root), "--page", str(page), "--fix", str(fixed), "--json").stdout)
    assert document["examination"]["revision"] == document["dataset"]["revision"]
    assert "duplicates" in {finding["kind"] for finding in document["examination"]["findings"]}
    text = page.read_text()
    assert "Files with the same bytes" in text
    assert "http" not in text.replace("http-equiv", ""), "the page loads nothing"
    assert text.count("data:image/jpeg") >= 2
    again = json.loads(check(str(root), "--set", f"data.manifest={fixed}", "--json").stdout)
    assert sum(again["dataset"]["sizes"].values()) == 24
    assert again["dataset"]["revision"] != document["dataset"]["revision"]
    with pytest.raises(DataError, match="may contain your own corrections"):
        check(str(root), "--fix", str(fixed), "--json")
    assert json.loads(check(str(root), "--quick", "--json").stdout)["examination"] is None


def test_a_second_examination_is_read_and_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_spec(write_textures(tmp_path / "data", {"a": 12, "b": 12}))
    first = examine_request(spec, shared_at(tmp_path / "home"))
    monkeypatch.setattr("finetune.studies.examination.examine", lambda *given, **named: pytest.fail("examined again"))
    assert examine_request(spec, shared_at(tmp_path / "home")).examination == first.examination


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    root = write_textures(tmp_path / "data", {"a": 3, "b": 3})
    (root / "loose.jpg").write_bytes(saved(texture(1)))
    (root / "b" / "cut.jpg").write_bytes(saved(texture(2))[:400])
    with pytest.raises(DataError) as refused:
        check(str(root))
    said = {str(Path(problem.where).name): problem.message for problem in refused.value.problems}
    assert "loose.jpg" in said["data"]
    assert "cut.jpg" in said


# ── photographs ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_planted_copies_in_real_photographs(photos: Path, tmp_path: Path) -> None:
    copied(photos / "train", tmp_path / "data")
    planted = plant_copies(tmp_path / "data", 0.05)
    found = examine_request(tiny_spec(tmp_path / "data", model="tf_efficientnet_lite0"), shared_at(tmp_path / "home"))
    finding = found.examination.of("near_duplicates")
    assert finding is not None
    groups = [set(case.ids) for case in finding.cases]
    recall = sum(any({copy, original} <= group for group in groups) for copy, original in planted.items()) / len(planted)
    n_pairs = sum(len(group) - 1 for group in groups)
    assert recall >= 0.95
    assert sum(any({copy, original} <= group for group in groups) for copy, original in planted.items()) / n_pairs >= 0.95


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_planted_wrong_labels_in_real_photographs(photos: Path, tmp_path: Path) -> None:
    copied(photos / "train", tmp_path / "data")
    planted = plant_wrong_labels(tmp_path / "data", 0.05)
    found = examine_request(tiny_spec(tmp_path / "data", model="tf_efficientnet_lite0"), shared_at(tmp_path / "home"))
    ids = [sample.id for sample in found.dataset.samples]
    order = np.argsort(found.examination.confidence, kind="stable")
    is_wrong = np.array([ids[one] in planted for one in order])
    assert is_wrong[: len(ids) // 10].sum() / len(planted) >= 0.9
    right_before = np.cumsum(~is_wrong)[is_wrong]
    auroc = 1 - right_before.mean() / (~is_wrong).sum()
    assert auroc >= 0.95


def test_classes_that_differ_in_spelling_alone_are_named(tmp_path: Path) -> None:
    counts = {"T-Shirt": 6, "t shirt": 4, "rain_hat": 5, "rain-hat": 4, "ｓｏｃｋｓ": 4, "socks": 5, "coat": 5}
    _, found = examined(write_textures(tmp_path, counts, (60, 50)))
    finding = found.of("alike_names")
    assert finding is not None
    assert finding.count == 3
    assert [case.suggested for case in finding.cases] == ["T-Shirt", "rain_hat", "socks"]
    assert "'T-Shirt' (6) and 't shirt' (4)" in finding.evidence
    assert not any("coat" in case.said for case in finding.cases)


def test_every_job_begins_with_a_look_at_its_classes(tmp_path: Path) -> None:
    dataset = read(write_textures(tmp_path, {"house cat": 60, "house-cat": 5, "dog": 50}, (40, 30)))
    told = DatasetFacts.of(dataset).warnings
    assert [line.partition(":")[0] for line in told] == [
        "Classes that differ in spelling alone", "Classes with few images", "Classes of very different size",
    ]  # fmt: skip
    assert DatasetFacts.of(read(write_textures(tmp_path / "even", {"cat": 25, "dog": 30}, (40, 30)))).warnings == ()


# ── a class that is two ───────────────────────────────────────────────────────────────────────────


def kinds_of_things(counts: tuple[int, ...], apart: float = 6.0, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Embeddings of several kinds, each a cloud of its own, and which kind each is."""
    rng = np.random.default_rng(seed)
    kinds = np.repeat(np.arange(len(counts)), counts)
    centres = rng.normal(size=(len(counts), 40))
    centres *= apart / np.linalg.norm(centres, axis=1, keepdims=True)
    return (centres[kinds] + rng.normal(size=(len(kinds), 40))).astype(np.float32), kinds.astype(np.int64)


def test_two_kinds_of_things_under_one_name_are_told_from_classes_of_one_kind() -> None:
    embeddings, kinds = kinds_of_things((90, 80, 120, 70, 30))
    assert classes_that_are_two(embeddings, kinds) == []
    merged = np.where(kinds == 2, 1, kinds)
    (found,) = classes_that_are_two(embeddings, merged)
    assert found.label == 1
    assert found.apart > 5
    assert found.share == pytest.approx(80 / 200, abs=0.02)
    assert {int(kinds[one]) for one in found.first} == {2}
    assert {int(kinds[one]) for one in found.second} == {1}


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_class_of_one_kind_is_not_called_two(seed: int) -> None:
    embeddings, kinds = kinds_of_things((200, 100, 100), seed=seed)
    embeddings[kinds == 0] *= 1.5
    assert classes_that_are_two(embeddings, kinds) == []


def test_what_is_too_small_or_all_the_same_is_not_looked_at() -> None:
    embeddings, kinds = kinds_of_things((70, 20))
    assert classes_that_are_two(embeddings, kinds) == [], "no other class says how different images of one kind are"
    same = np.ones((200, 8), np.float32)
    assert classes_that_are_two(same, np.repeat([0, 1], 100)) == []


def test_missing_files_are_a_finding_of_their_own_and_what_was_acknowledged_can_be_taken_back(tmp_path: Path) -> None:
    bad = (BadImage("labels.csv, row 2: a.jpg", NO_SUCH_FILE), BadImage("b.jpg", "not an image file"))
    write_textures(tmp_path / "photos", {"a": 4, "b": 4})
    dataset = replace(read(tmp_path / "photos"), bad=bad)
    found = examine(dataset, np.zeros((8, 4), np.float32), backbone="none")
    missing, unreadable = found.of("missing_files"), found.of("unreadable")
    assert missing is not None
    assert unreadable is not None
    assert [case.ids for case in missing.cases] == [("labels.csv, row 2: a.jpg",)]
    assert missing.evidence == "1 row of 10 name no file that exists; they are left out."
    assert [case.ids for case in unreadable.cases] == [("b.jpg",)]
    accepted = tmp_path / "acknowledged.txt"
    assert acknowledge(accepted, found, ["missing_files", "unreadable"]) == 2
    with pytest.raises(
        InvalidInput, match=r"--reopen small_classes: no case of it was acknowledged in this data; acknowledged are"
    ):
        reopen(accepted, found, ["small_classes"])
    assert reopen(accepted, found, ["missing_files"]) == 1
    assert accepted_in(accepted) == {unreadable.cases[0].key}
    assert reopen(accepted, found, [unreadable.cases[0].key]) == 1
    assert accepted_in(accepted) == frozenset()
    with pytest.raises(InvalidInput, match="neither a kind of finding nor the key of a case here"):
        reopen(accepted, found, ["unredable"])


def test_notes_are_named_and_what_was_acknowledged_says_how_it_is_taken_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    note = Finding("formats", "note", "Formats", 2, "3 PNG (RGB) and 1 JPEG (L).", "Nothing.")
    doubt = Finding("blank", "doubt", "Pictures of nothing", 0, "…", "…", acknowledged=2)
    found = Examination("0" * 64, 4, ("a", "b"), (note, doubt), "none")
    show_examination(Examined(found, read(write_textures(tmp_path / "photos", {"a": 2, "b": 2})), None, None, None, (0, 0, 0)))  # type: ignore[arg-type]
    said = " ".join(capfd.readouterr().err.split())
    assert "note Formats: 3 PNG (RGB) and 1 JPEG (L)." in said
    assert "acknowledged before, not shown: 2 of blank (--reopen blank reports them again)" in said


def test_what_an_examination_says_is_not_said_a_second_time_with_the_plan(tmp_path: Path) -> None:
    root = write_textures(tmp_path / "photos", {"a": 12, "b": 12})
    (root / "b" / "again.jpg").write_bytes((root / "a" / "003.jpg").read_bytes())
    dataset, found = examined(root)
    warnings = DatasetFacts.of(dataset).warnings
    assert len(warnings) == 2, "the same photograph under two labels, and classes with few images"
    assert not_in(found, (*warnings, "photos: 1 file not named like an image")) == ["photos: 1 file not named like an image"]
    assert not_in(replace(found, findings=()), warnings) == list(warnings)


def test_formats_that_pillow_alone_cannot_read_are_named_and_animations_are_said(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)) for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    frames[1].save(tmp_path / "still.gif")
    pillow_heif.from_pillow(frames[2]).save(tmp_path / "phone.heic")
    names = ("moving.gif", "moving.webp", "still.gif", "phone.heic")
    looks = look_at_all([replace(local_sample(tmp_path / name, 0), sha256=name) for name in names])
    assert {name: look.animated for name, look in looks.items()} == dict(zip(names, (True, True, False, False), strict=True))
    assert (looks["phone.heic"].format, looks["phone.heic"].mode) == ("HEIF", "")
