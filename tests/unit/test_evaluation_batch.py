"""A folder of images is answered in parts: what was answered before a kill is not asked again, and the answers are the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from standin import picture, write_bundle

from finetune.bundle.predictor import Predictor
from finetune.errors import DataError
from finetune.evaluation import batch
from finetune.evaluation import predictions as tables
from finetune.evaluation.batch import predict_folder
from finetune.evaluation.tables import csv_lines, write_table
from finetune.progress import Progress

FILES = ("answers.csv", "answers.npz", "answers.parquet")


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    return Predictor.load(write_bundle(tmp_path / "bundle"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten images in two folders, of which the fifth cannot be read, and a file that is none."""
    folder = tmp_path / "images"
    for number in range(10):
        path = folder / ("first" if number < 5 else "second") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if number == 4 else picture(("red", "green", "blue")[number % 3]))
    (folder / "notes.txt").write_text("not an image")
    return folder


class Killed(BaseException):
    """Stands for the death of the process."""


def test_every_image_is_answered_under_its_path_and_what_cannot_be_read_is_named(
    predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    found = predict_folder(predictor, images, tmp_path / "out")
    assert (found["n_answered"], found["n_unreadable"], found["files"]) == (9, 1, list(FILES[:1] + FILES[1:]))
    assert [one["file"] for one in found["unreadable"]] == ["first/4.png"]
    assert found["summary"] == "9 images predicted by colours, 1 could not be read"
    with open(tmp_path / "out" / "answers.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["file"], row["predicted"]) for row in rows[:3]] == [
        ("first/0.png", "red"), ("first/1.png", "green"), ("first/2.png", "blue"),
    ]  # fmt: skip
    table = tables.read(tmp_path / "out" / "answers.npz")
    assert (table.embedding, table.targets) == (None, None)
    assert json.loads((tmp_path / "out" / "batch.json").read_text()) == found
    assert not (tmp_path / "out" / "parts").exists()


def test_a_batch_that_is_killed_asks_no_part_twice_and_ends_with_the_same_answers(
    predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "PART_IMAGES", 3)
    whole = predict_folder(predictor, images, tmp_path / "whole", embedding=True)
    seen: list[Progress] = []

    def dying(update: Progress) -> None:
        seen.append(update)
        if update.done > 6:
            raise Killed

    with pytest.raises(Killed):
        predict_folder(predictor, images, tmp_path / "killed", embedding=True, progress=dying)
    assert [update.done for update in seen] == [3, 6, 9]
    assert {update.total for update in seen} == {10}
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "parts").glob("*.npz")}
    assert sorted(kept) == ["000000.npz", "000001.npz"]
    asked: list[Progress] = []
    again = predict_folder(predictor, images, tmp_path / "killed", embedding=True, progress=asked.append)
    assert [update.done for update in asked] == [9, 10], "the parts that are there are not asked again"
    assert again == {**whole, "id": "killed"}
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert predict_folder(predictor, images, tmp_path / "killed") == again, "a finished batch is not done again"


def test_a_folder_of_images_that_cannot_be_read_has_an_empty_table(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"broken")
    found = predict_folder(predictor, tmp_path / "images", tmp_path / "out", embedding=True)
    assert (found["n_answered"], found["n_unreadable"]) == (0, 1)
    assert (tmp_path / "out" / "answers.csv").read_text().splitlines() == [
        "file,sha256,predicted,probability,p(red),p(green),p(blue)"
    ]


def test_a_folder_without_an_image_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="holds no image file"):
        predict_folder(predictor, tmp_path / "images", tmp_path / "out")


def test_a_table_is_written_some_rows_at_a_time_and_is_the_same(
    predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    predict_folder(predictor, images, tmp_path / "out")
    table = tables.read(tmp_path / "out" / "answers.npz")
    whole = b"".join(csv_lines(table))
    monkeypatch.setattr("finetune.evaluation.tables._ROWS_AT_ONCE", 4)
    pieces = list(csv_lines(table))
    assert (len(pieces), b"".join(pieces)) == (3, whole)
    write_table(tmp_path / "pieces.parquet", table)
    first, second = (pq.read_table(path) for path in (tmp_path / "pieces.parquet", tmp_path / "out" / "answers.parquet"))
    assert first.to_pylist() == second.to_pylist()
    assert len(first) == 9
