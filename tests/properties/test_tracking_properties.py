"""Whatever a metric, a param or a journal holds, MLflow takes what is made of it."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param

from finetune.tracking.journal import Journal
from finetune.tracking.record import key_text, value_text


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_every_name_becomes_one_that_mlflow_accepts(name: str) -> None:
    _validate_metric_name(key_text(name))
    _validate_param(key_text(name), "value")


@settings(max_examples=100, deadline=None)
@given(st.from_regex(r"(train|val|test|stage/[a-z]+\.[0-9]|cost)/[a-z0-9_]+", fullmatch=True))
def test_our_own_names_stay_as_they_are(name: str) -> None:
    assert key_text(name) == name


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
