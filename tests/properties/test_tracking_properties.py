"""Whatever a metric, a param or a journal holds, MLflow takes what is made of it; a journal is read once, however it grows."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param

from finetune.tracking.journal import Journal, LastPoints, points_of
from finetune.tracking.mlflow.names import key_text, metric_key, value_text


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_every_name_becomes_one_that_mlflow_accepts(name: str) -> None:
    for made in (key_text(name), metric_key(name)):
        if made is not None:
            _validate_metric_name(made)
    _validate_param(key_text(name), "value")


@settings(max_examples=100, deadline=None)
@given(st.from_regex(r"(train|val|test)/[a-z0-9_]+|[a-z]+_(seconds|mib|ms)", fullmatch=True))
def test_our_own_names_stay_as_they_are(name: str) -> None:
    assert key_text(name) == name


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["train", "val", "test"]), st.from_regex(r"[a-z0-9_]+", fullmatch=True))
def test_a_course_never_has_the_name_of_a_result(split: str, name: str) -> None:
    made = metric_key(f"{split}/{name}")
    assert made is not None
    assert made.startswith("train/")
    assert split == "train" or made != f"{split}/{name}"


@settings(max_examples=200, deadline=None)
@given(st.text() | st.lists(st.integers()) | st.none() | st.floats(), st.integers(30, 200))
def test_a_text_fits_and_is_the_same_each_time(value: object, limit: int) -> None:
    assert len(value_text(value, limit)) <= limit
    assert value_text(value, limit) == value_text(value, limit)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40), st.lists(st.integers(1, 60), max_size=8))
def test_a_journal_is_read_once_and_whole_however_it_is_cut_while_being_written(
    tmp_path_factory, numbers: list[int], cuts: list[int]
) -> None:
    path: Path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    text = "".join(json.dumps({"at": 0, "step": n, "values": {}}) + "\n" for n in numbers).encode()
    journal, seen, position = Journal(path), [], 0
    for cut in [*cuts, len(text)]:
        with open(path, "ab") as stream:
            stream.write(text[position : position + cut])
        position = min(len(text), position + cut)
        for records in journal.unread():
            seen += [record["step"] for record in records]
            journal.accept()
    assert seen == numbers


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=6), st.data())
def test_each_step_is_sent_once_however_often_a_run_goes_back_to_a_checkpoint(
    tmp_path_factory, attempts: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Each attempt cuts the journal back to `start` steps and goes on to `end`; it is looked at whenever that may be."""
    path: Path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    path.touch()
    journal, marks, sent, reached = Journal(path), LastPoints({}), [], 0

    def look() -> None:
        for records in journal.unread():
            sent.extend(point.step for record in records for point in points_of(record) if marks.add(point))
            journal.accept()

    for number, (start, end) in enumerate(attempts):
        lines = path.read_text().splitlines(keepends=True)
        start = min(start, len(lines))
        path.write_text("".join(lines[:start]))
        for step in range(start, max(start, end)):
            line = {"at": number, "step": step, "epoch": None, "values": {"train/loss": float(step)}}
            with open(path, "a") as stream:
                stream.write(json.dumps(line) + "\n")
            reached = max(reached, step + 1)
            if data.draw(st.booleans()):
                look()
    look()
    assert sorted(sent) == sent == sorted(set(sent))
    assert set(range(len(path.read_text().splitlines()))) <= set(sent)
    assert max(sent, default=-1) < max(reached, 1)
