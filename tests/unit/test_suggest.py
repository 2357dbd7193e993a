"""What to label next: what is chosen, what is left out, and the files that are handed on."""

from __future__ import annotations

import csv
import json
import random
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from planted import CHANGES, saved
from tiny_bundle import CLASSES, write_tiny_bundle

import finetune
from finetune.bundle.predictor import Predictor, Seen
from finetune.data.index import index_dataset
from finetune.errors import DataError, InvalidInput
from finetune.labelling.choose import choose, label_margins, label_uncertainty, margins
from finetune.labelling.page import write_suggestions
from finetune.labelling.suggest import _reason, suggest
from finetune.labelling.suggestion import Suggestions
from finetune.storage.files import sha256_file


def photographs(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write pictures with structure of their own: blurred noise, each of another colour."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        small = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        tinted = (small * rng.uniform(0.3, 1.0, 3)).astype(np.uint8)
        paths.append(folder / f"{number:02d}.png")
        Image.fromarray(tinted).resize((160, 120), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    photographs(folder / "first", 12)
    photographs(folder / "second", 12, seed=1)
    return folder


@pytest.fixture(scope="module")
def found(bundle: Path, pool: Path) -> Suggestions:
    return suggest(bundle, [pool], 6)


# ── choosing ──────────────────────────────────────────────────────────────────────────────────────


def test_unsure_pictures_are_chosen_and_spread_over_what_they_show() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 16))
    embeddings = np.repeat(centres, 50, axis=0) + rng.normal(0, 0.05, (200, 16))
    unsure = np.tile(np.arange(50) < 10, 4)
    first = np.where(unsure, 0.5 + rng.uniform(0, 0.02, 200), 0.999)
    probs = np.stack([first, 1 - first], axis=1)
    chosen = choose(1 - margins(probs), embeddings, 4)
    assert sorted(chosen // 50) == [0, 1, 2, 3], "one of each kind"
    assert unsure[choose(1 - margins(probs), embeddings, 12)].mean() > 0.7, "a fifth of the pool is unsure"


def test_equal_pools_and_seeds_give_equal_choices() -> None:
    rng = np.random.default_rng(0)
    probs, embeddings = rng.dirichlet(np.ones(3), 60), rng.normal(size=(60, 8))
    first = choose(1 - margins(probs), embeddings, 20, seed=5)
    assert first.tolist() == choose(1 - margins(probs), embeddings, 20, seed=5).tolist()
    assert len(set(first.tolist())) == 20


@pytest.mark.parametrize("n", [1, 3, 4, 9])
def test_pools_that_are_small_alike_or_certain_are_chosen_from(n: int) -> None:
    same = np.ones((4, 5))
    certain = np.tile([1.0, 0.0], (4, 1))
    chosen = choose(1 - margins(certain), same, n)
    assert len(set(chosen.tolist())) == min(n, 4)
    assert choose(1 - margins(np.ones((4, 1))), same, n).shape == chosen.shape, "a model with one class"


def test_the_margin_is_between_the_first_two() -> None:
    assert margins(np.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])) == pytest.approx([0.2, 1.0])


# ── what is suggested ─────────────────────────────────────────────────────────────────────────────


def test_the_least_certain_come_first_with_their_reasons(found: Suggestions) -> None:
    assert [one.rank for one in found.chosen] == [1, 2, 3, 4, 5, 6]
    assert [one.margin for one in found.chosen] == sorted(one.margin for one in found.chosen)
    assert sum(one.stands_for for one in found.chosen) == found.n_pictures == 24
    first = found.chosen[0]
    assert first.relative.startswith(("first/", "second/"))
    assert first.reason.startswith(f"{first.likely[0]} {first.probabilities[0]:.0%}, {first.likely[1]}")


def test_what_has_a_label_already_is_not_suggested(tmp_path: Path) -> None:
    pictures = photographs(tmp_path / "pool", 10)
    (tmp_path / "pool" / "second.png").write_bytes(pictures[9].read_bytes())
    (tmp_path / "pool" / "broken.jpg").write_bytes(b"nothing")
    seen = Seen.of([sha256_file(pictures[0])], [sha256_file(pictures[1])])
    write_tiny_bundle(tmp_path / "bundle", seen=seen)
    (tmp_path / "labelled" / "ash").mkdir(parents=True)
    (tmp_path / "labelled" / "ash" / "known.png").write_bytes(pictures[2].read_bytes())
    found = suggest(tmp_path / "bundle", [tmp_path / "pool"], 50, labelled=tmp_path / "labelled")
    assert {Path(one.file).name for one in found.chosen} == {path.name for path in pictures[3:]}
    assert (found.seen, found.same_bytes, len(found.unreadable)) == (3, 1, 1)
    assert found.left_out == (
        "1 file: cannot be read", "3 files: labelled already", "1 file: the same bytes as another",
    )  # fmt: skip


@pytest.mark.parametrize("change", ["re-encoded", "resized", "mirrored", "brighter"])
def test_a_near_copy_of_a_suggested_or_labelled_picture_is_left_out(bundle: Path, tmp_path: Path, change: str) -> None:
    pictures = photographs(tmp_path / "pool", 8)
    with Image.open(pictures[3]) as picture:
        (tmp_path / "pool" / "copy.jpg").write_bytes(saved(CHANGES[change](picture.convert("RGB"), random.Random(0)), 90))
    found = suggest(bundle, [tmp_path / "pool"], 9)
    assert (len(found.chosen), found.near_copies) == (8, 1)
    (tmp_path / "labelled" / "ash").mkdir(parents=True)
    (tmp_path / "pool" / "copy.jpg").rename(tmp_path / "labelled" / "ash" / "copy.jpg")
    against = suggest(bundle, [tmp_path / "pool"], 9, labelled=tmp_path / "labelled")
    assert {Path(one.file).name for one in against.chosen} == {path.name for path in pictures} - {"03.png"}
    assert against.near_copies == 1


def test_what_cannot_be_suggested_from_is_said(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no readable picture"):
        suggest(bundle, [tmp_path / "empty"])
    for folders, labelled in (([tmp_path / "nowhere"], None), ([tmp_path], tmp_path / "nowhere")):
        with pytest.raises(DataError, match=r"nowhere: no such folder or file"):
            suggest(bundle, folders, labelled=labelled)
    with pytest.raises(InvalidInput, match="at least 1"):
        suggest(bundle, [tmp_path / "empty"], 0)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_and_the_page_hold_every_suggestion(found: Suggestions, tmp_path: Path) -> None:
    paths = write_suggestions(tmp_path, found)
    with open(paths["table"], newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(int(row["rank"]), row["file"], row["predicted"]) for row in rows] == [
        (one.rank, one.file, one.likely[0]) for one in found.chosen
    ]
    page = paths["page"].read_text(encoding="utf-8")
    assert page.count("<figure>") == page.count("data:image/jpeg") == 6
    assert "://" not in page, "the page loads nothing"


def test_what_label_studio_exports_of_the_import_is_read_as_data(found: Suggestions, pool: Path, tmp_path: Path) -> None:
    """A person accepts the model's answers; the export stands beside the pictures."""
    paths = write_suggestions(tmp_path, found)
    tasks = json.loads(paths["label_studio"].read_text(encoding="utf-8"))
    page = ET.fromstring(paths["labelling_page"].read_text(encoding="utf-8"))
    control = page.find("Choices")
    assert control is not None
    assert [choice.get("value") for choice in control] == list(CLASSES)
    image = page.find("Image")
    assert image is not None
    for task in tasks:
        (prediction,) = task["predictions"]
        (answer,) = prediction["result"]
        assert (answer["from_name"], answer["to_name"]) == (control.get("name"), control.get("toName")) == ("label", "image")
        assert f"${image.get('name')}" == image.get("value")
        assert answer["value"]["choices"][0] in CLASSES
        task["annotations"] = [{"result": prediction["result"]}]
    export = pool / "export.json"
    export.write_text(json.dumps(tasks), encoding="utf-8")
    try:
        dataset = index_dataset(pool, for_training=False)
    finally:
        export.unlink()
    labels = {sample.id: dataset.label_text(sample) for sample in dataset.samples}
    assert labels == {one.relative: one.likely[0] for one in found.chosen}


def test_from_python(bundle: Path, pool: Path, tmp_path: Path, found: Suggestions) -> None:
    again = finetune.suggest(pool, bundle, 6, out=tmp_path / "out", progress=False)
    assert [one.file for one in again.chosen] == [one.file for one in found.chosen]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "label_studio.json", "label_studio.xml", "suggestions.csv", "suggestions.html",
    ]  # fmt: skip
    document = json.loads(json.dumps(again.to_dict()))
    assert len(document["suggestions"]) == 6
    assert document["model"] == "trees"


# ── several labels per image ──────────────────────────────────────────────────────────────────────


def test_with_several_labels_an_image_is_uncertain_near_the_thresholds() -> None:
    thresholds = np.array([0.5, 0.2])
    assert label_margins(np.array([[0.5, 0.2], [1.0, 0.0], [0.75, 0.6]]), thresholds) == pytest.approx(
        np.array([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]])
    )
    assert label_uncertainty(np.array([[0.5, 0.2], [1.0, 0.0], [0.5, 0.0]]), thresholds) == pytest.approx([1.0, 0.0, 0.5])


def test_suggestions_of_a_model_with_several_labels_hold_all_that_it_predicts(pool: Path, tmp_path: Path) -> None:
    thresholds = [1e-9, 1e-9, 1e-9, 0.9, 1e-9]
    write_tiny_bundle(tmp_path / "bundle", task="multilabel", calibration={"thresholds": thresholds})
    found = suggest(tmp_path / "bundle", [pool], 6)
    predictor = Predictor.load(tmp_path / "bundle")
    assert found.task == "multilabel"
    assert [one.margin for one in found.chosen] == sorted(one.margin for one in found.chosen)
    limit = dict(zip(CLASSES, thresholds, strict=True))
    for one in found.chosen:
        scores = predictor.predict(Path(one.file).read_bytes()).several.scores  # type: ignore[union-attr]
        assert set(one.given) == {name for name in CLASSES if scores[name] >= limit[name]}
        assert one.reason.startswith(f"least certain: {one.likely[0]} {one.probabilities[0]:.0%}")
    assert any(len(one.given) != 1 for one in found.chosen)
    paths = write_suggestions(tmp_path / "out", found)
    rows = list(csv.DictReader(paths["table"].read_text(encoding="utf-8").splitlines()))
    assert [json.loads(row["predicted"]) for row in rows] == [list(one.given) for one in found.chosen]
    tasks = json.loads(paths["label_studio"].read_text(encoding="utf-8"))
    answers = [[result["value"]["choices"] for result in task["predictions"][0]["result"]] for task in tasks]
    assert answers == [[list(one.given)] if one.given else [] for one in found.chosen]
    assert ET.fromstring(paths["labelling_page"].read_text(encoding="utf-8")).find("Choices").get("choice") == "multiple"  # type: ignore[union-attr]


def test_pictures_of_one_colour_are_not_suggested(bundle: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "pool", 6)
    for name, grey in (("black.png", 0), ("white.png", 255), ("grey.png", 90)):
        Image.new("RGB", (160, 120), (grey,) * 3).save(tmp_path / "pool" / name)
    found = suggest(bundle, [tmp_path / "pool"], 9)
    assert {Path(one.file).name for one in found.chosen} == {f"{number:02d}.png" for number in range(6)}
    assert found.blank == 3
    assert "3 files: one colour throughout, so there is nothing to label" in found.left_out
    assert found.to_dict()["left_out"]["blank"] == 3
    for picture in (tmp_path / "pool").glob("0*.png"):
        picture.unlink()
    with pytest.raises(DataError, match="nothing to label"):
        suggest(bundle, [tmp_path / "pool"], 9)


@pytest.mark.parametrize(
    ("stands_for", "said"), [(1, "unlike the others"), (2, "1 picture that was not"), (3, "2 pictures that were not")]
)
def test_a_reason_agrees_in_number(stands_for: int, said: str) -> None:
    assert said in _reason(("a", "b"), (0.6, 0.4), stands_for, "")
