"""Advice is worded for the interface that a user works with, and errors fit the terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from folders import write_classes

import finetune
from finetune.advice import for_http, for_python
from finetune.cli.terminal import wrapped

COMMON = [
    (
        "name it with --set data.label_column=NAME (its columns are a, b)",
        "name it with settings={'data.label_column': 'NAME'} (its columns are a, b)",
        'name it with {"data": {"label_column": "NAME"}} (its columns are a, b)',
    ),
    (
        "--set 'data.splits={site_a: train, site_b: val}' says what they are",
        "settings={'data.splits': {'site_a': 'train', 'site_b': 'val'}} says what they are",
        '{"data": {"splits": {"site_a": "train", "site_b": "val"}}} says what they are',
    ),
    (
        "cut it: --set 'data.label_separator=|'.",
        "cut it: settings={'data.label_separator': '|'}.",
        'cut it: {"data": {"label_separator": "|"}}.',
    ),
    ("at most --folds 4.", "at most folds=4.", 'at most {"data": {"folds": 4}}.'),
    ("(finetune compare DATA --folds 5)", "(finetune.compare(DATA, folds=5))", '(a request with {"data": {"folds": 5}})'),
    (
        "finetune train 'my photos' --folds 3 --set data.val_fraction=0.1",
        "finetune.train('my photos', folds=3, settings={'data.val_fraction': 0.1})",
        'a request with {"data": {"folds": 3, "val_fraction": 0.1}}',
    ),
    (
        "finetune check DATA --fix a.csv writes it",
        "finetune.check(DATA, fix='a.csv') writes it",
        "finetune check DATA --fix a.csv writes it",
    ),
    ("finetune predict a.png --model NAME", "finetune.load('NAME').predict('a.png')", "finetune predict a.png --model NAME"),
    ("compare with --folds, or not", "compare with --folds, or not", "compare with --folds, or not"),
]


@pytest.mark.parametrize(("text", "python", "http"), COMMON)
def test_advice_is_worded_for_its_door(text: str, python: str, http: str) -> None:
    assert for_python(text) == python
    assert for_http(text) == http


def test_a_command_in_backquotes_stays_as_it_is_over_http() -> None:
    text = "Make one with `finetune train --data FOLDER --name NAME`; at most --folds 4"
    assert for_http(text) == 'Make one with `finetune train --data FOLDER --name NAME`; at most {"data": {"folds": 4}}'


def test_an_error_in_python_proposes_arguments(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", {"cat": 3, "dog": 3})
    (root / "labels.csv").write_text("file,colour,size\ncat/0.png,a,b\ndog/0.png,b,c\n", encoding="utf-8")
    for call in (finetune.check, finetune.train):
        with pytest.raises(finetune.FinetuneError) as refused:
            call(root / "labels.csv", workspace=tmp_path / "home", progress=False)
        assert "settings={'data.label_column': 'NAME'}" in str(refused.value)
        assert not re.search(r"(^|\s)--[a-z]", str(refused.value))


def test_messages_are_wrapped_with_a_hanging_indent_and_flags_stay_whole() -> None:
    text = "labels.csv: no column for the label; name it with --set data.label_column=NAME " + "and more " * 10 + "/a" * 60
    lines = wrapped(text, 80, indent=4, taken=20)
    assert len(lines[0]) <= 60
    assert any("--set data.label_column=NAME" in line for line in lines)
    assert all(line.startswith("    ") for line in lines[1:])
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-1] == "    " + "/a" * 60, "a path is not broken"
    assert " ".join(line.strip() for line in lines) == text
    assert wrapped("a\n  b", 80, indent=2) == ["a", "  b"]


@pytest.mark.parametrize(
    ("keyword", "advice"),
    [
        ({"learning_rate": 0.1}, "settings={'hyperparameters.learning_rate': 0.1}"),
        ({"lr": 0.1}, "settings={'hyperparameters.learning_rate': 0.1}"),
        ({"dropout": 0.2}, "settings={'model.head.dropout': 0.2}"),
        ({"stages": 2}, "settings={'method.stages': 2}"),
        ({"augmentation": "strong"}, "settings={'augmentation': 'strong'}"),
        ({"epoch": 3}, "Did you mean 'epochs'?"),
        ({"zzz": 1}, "It takes data, method, model, epochs, folds"),
    ],
)
def test_a_keyword_that_python_does_not_take_is_answered_with_what_to_write(keyword: dict[str, Any], advice: str) -> None:
    with pytest.raises(TypeError, match=re.escape(advice)):
        finetune.train("photos", **keyword)


def test_functions_without_settings_say_what_they_take() -> None:
    with pytest.raises(TypeError, match=re.escape("finetune.load() has no argument 'version'. It takes reference, workspace.")):
        finetune.load("photos", version=2)  # type: ignore[call-arg]
