"""The table of answers: what is written is read back, what is damaged is refused, and its documentation is true."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from answers import made_up, table
from tiny_runs import carry_out_at, tiny_spec, write_stripes

from finetune.errors import InvalidInput
from finetune.evaluation import predictions as module
from finetune.evaluation.evaluate import evaluate, read_evaluation
from finetune.evaluation.predictions import Predictions, concatenate, digests_as_rows, read, write
from finetune.storage.rundir import RunDir

UNREADABLE_NAME = os.fsdecode(b"caf\xe9/\xff.jpg")


def full_table(n: int = 9) -> Predictions:
    """Every column, and ids that no encoding can spell."""
    rows = table(*made_up(n, 3))
    embedding = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
    return replace(rows, embedding=embedding, ids=(UNREADABLE_NAME, "a,b\n.jpg", *rows.ids[2:]))


def assert_same(found: Predictions, expected: Predictions) -> None:
    for field in fields(Predictions):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other, field.name


@pytest.mark.parametrize("left_out", [(), ("targets",), ("embedding",), ("targets", "embedding")])
def test_a_table_is_read_as_it_was_written(tmp_path: Path, left_out: tuple[str, ...]) -> None:
    expected = replace(full_table(), **dict.fromkeys(left_out))
    write(tmp_path / "val.npz", expected)
    assert_same(read(tmp_path / "val.npz"), expected)


def test_a_table_of_nothing_is_a_table(tmp_path: Path) -> None:
    empty = full_table().take([])
    write(tmp_path / "val.npz", empty)
    assert_same(read(tmp_path / "val.npz"), empty)
    assert len(empty) == 0


def test_equal_tables_are_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, full_table())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_whatever_byte_is_lost_or_changed_the_table_is_the_same_or_refused(tmp_path: Path) -> None:
    path, expected = tmp_path / "val.npz", full_table()
    write(path, expected)
    whole = path.read_bytes()
    chance = np.random.default_rng(0)
    refused = 0
    positions = range(0, len(whole), 3)
    for position in positions:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(chance.integers(8))
        for damaged in (whole[:position], bytes(flipped)):
            path.write_bytes(damaged)
            try:
                found = read(path)
            except InvalidInput:
                refused += 1
            else:
                assert_same(found, expected)
    assert refused > 1.5 * len(positions), "most bytes are covered by a checksum"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": 2}, "schema version 2, this version reads 1"),
        ({"columns": ["logits"]}, "where logits are listed in the header"),
        ({"ids": ["1.jpg"]}, "predictions of 1 images"),
        ({"classes": None}, "not a table of predictions"),
    ],
)
def test_a_table_that_contradicts_its_header_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = tmp_path / "val.npz"
    write(path, full_table())
    arrays = dict(np.load(path))
    header = {**json.loads(arrays["header"].tobytes()), **change}
    np.savez(path, **{**arrays, "header": np.frombuffer(json.dumps(header).encode(), np.uint8)})
    with pytest.raises(InvalidInput, match=says):
        read(path)


def test_what_is_no_table_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nothing\.npz: not a table of predictions"):
        read(tmp_path / "nothing.npz")
    np.savez(tmp_path / "other.npz", logits=np.zeros(3))
    with pytest.raises(InvalidInput, match="not a table of predictions"):
        read(tmp_path / "other.npz")
    np.savez(tmp_path / "pickled.npz", header=np.array([{}], dtype=object))
    with pytest.raises(InvalidInput, match="allow_pickle"):
        read(tmp_path / "pickled.npz")


def test_columns_of_different_lengths_are_no_table() -> None:
    whole = full_table()
    for column in ("logits", "targets", "sha256", "embedding", "ids"):
        with pytest.raises(InvalidInput, match="do not fit"):
            replace(whole, **{column: getattr(whole, column)[:-1]})


def test_rows_are_taken_in_the_order_asked_and_put_together_again() -> None:
    whole = full_table()
    odd, even = whole.take([7, 5, 3, 1]), whole.take(np.arange(0, 9, 2))
    assert odd.ids == tuple(whole.ids[row] for row in (7, 5, 3, 1))
    together = concatenate([even, odd], "cv")
    assert together.split == "cv"
    order = [0, 2, 4, 6, 8, 7, 5, 3, 1]
    assert_same(together, replace(whole.take(order), split="cv"))
    assert evaluate(together).values == pytest.approx(evaluate(whole).values)
    assert concatenate([even, replace(odd, embedding=None)], "cv").embedding is None


def test_only_tables_of_the_same_classes_are_put_together() -> None:
    one = full_table()
    for others in ([], [one, replace(one, classes=("a", "b", "c"))], [one, replace(one, task="multilabel")]):
        with pytest.raises(InvalidInput, match="same task and classes"):
            concatenate(others, "cv")


def test_without_labels_there_is_nothing_to_judge() -> None:
    with pytest.raises(InvalidInput, match="no labels to be compared with"):
        evaluate(replace(full_table(), targets=None))


def test_digests_go_in_and_out_as_text() -> None:
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(3)]
    rows = digests_as_rows([*digests, ""])
    assert rows.shape == (4, 32)
    known = replace(full_table().take(range(4)), sha256=rows)
    assert known.digests() == [*digests, "0" * 64], "zeros where it is not known"
    assert digests_as_rows([]).shape == (0, 32)


# ── what a run writes ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    home = tmp_path_factory.mktemp("home")
    run = RunDir(home / "runs" / "probe")
    carry_out_at(home, tiny_spec(write_stripes(home / "pictures", 60)), run)
    return run


def test_its_documentation_is_true_of_what_a_run_writes(run: RunDir) -> None:
    """The module's docstring lists the arrays with their shapes and types, for readers that have NumPy alone."""
    documented = re.findall(r"^    (\w+) +\((\w+),(?: (\w+))?\) (\w+)", module.__doc__ or "", re.MULTILINE)
    assert len(documented) == 6
    seen = 0
    for split in ("val", "test"):
        with np.load(run.predictions_of(split), allow_pickle=False) as arrays:
            assert set(arrays.files) == {name for name, *_ in documented} - {"thresholds"}
            header = json.loads(arrays["header"].tobytes())
            sizes = {"N": len(header["ids"]), "C": len(header["classes"]), "D": arrays["embedding"].shape[1], "32": 32}
            for name, *axes, dtype in documented:
                if name == "thresholds":  # of images that may have several labels
                    continue
                assert arrays[name].dtype == dtype, name
                if name != "header":
                    assert arrays[name].shape == tuple(sizes[axis] for axis in axes if axis), name
                seen += 1
        assert set(re.findall(r"\w+", re.search(r"JSON text: (.*?)\n\n", module.__doc__ or "", re.DOTALL)[1])) >= set(header)  # type: ignore[index]
    assert seen == 10


def test_a_row_is_the_answer_to_the_image_that_it_names(run: RunDir) -> None:
    rows = [line.split(",") for line in run.split.read_text().splitlines()[1:]]
    for split in ("val", "test"):
        found = read(run.predictions_of(split))
        assert list(found.ids) == [path for path, _, part, *_ in rows if part == split]
        assert found.digests() == [sha256 for _, _, part, sha256, *_ in rows if part == split]
        assert [found.classes[label] for label in found.labels] == [label for _, label, part, *_ in rows if part == split]
        assert evaluate(found, (20, 20, 20)) == read_evaluation(run.evaluation).evaluations[split]
