"""A file that exists in a run folder is complete; a journal survives a torn last line."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.errors import DiskFull
from finetune.events import DataWarning, Resumed, Trained, TrainingStarted
from finetune.storage.files import (
    atomic_path,
    delete_temporary,
    files_under,
    folder_bytes,
    found_in,
    modified_ns,
    read_json,
    write_atomic,
    write_json,
)
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    target = tmp_path / "value.json"
    write_json(target, {"a": 1})

    def half(stream) -> None:
        stream.write(b'{"a":')
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        write_atomic(target, half)
    assert read_json(target) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_a_full_disk_is_named_with_the_file_and_what_to_do(tmp_path: Path):
    target = tmp_path / "big.bin"
    with pytest.raises(DiskFull, match=r"big\.bin.*Free some space"), atomic_path(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_json_refuses_what_json_cannot_say(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})


def test_a_journal_is_read_up_to_a_torn_last_line(tmp_path: Path):
    run = RunDir(tmp_path / "run").create()
    run.metric(1, {"train/loss": 2.0}, epoch=0.5)
    run.metric(2, {"train/loss": 1.0})
    with open(run.metrics, "a") as stream:
        stream.write('{"at": 1, "st')
    lines = read_lines(run.metrics)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["values"] == {"train/loss": 2.0}


def test_a_journal_goes_on_after_a_torn_line_without_losing_the_next(tmp_path: Path):
    run = RunDir(tmp_path / "run").create()
    run.record(TrainingStarted("the run started", {}))
    with open(run.events, "a") as stream:
        stream.write('{"at": 1, "ki')
    run.record(Resumed("the run goes on", step=3, exact=True))
    assert [line["kind"] for line in read_lines(run.events)] == ["training", "resumed"]


def test_a_journal_keeps_messages_with_unusual_line_ends(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.record(DataWarning("one\u2028two\x85three"))
    assert [event["message"] for event in read_lines(run.events)] == ["one\u2028two\x85three"]


def test_a_journal_holds_what_json_cannot_say_as_null_and_file_names_of_any_bytes(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.metric(3, {"train/loss": float("nan"), "train/lr": 0.1})
    run.record(Trained("it diverged", {"val/loss": float("inf")}))
    run.record(DataWarning("caf\udce9.jpg cannot be read"))
    assert read_lines(run.metrics)[0]["values"] == {"train/loss": None, "train/lr": 0.1}
    diverged, warning = read_lines(run.events)
    assert diverged["metrics"] == {"val/loss": None}
    assert warning["message"] == "caf\udce9.jpg cannot be read"


def test_what_vanishes_while_a_folder_is_counted_counts_nothing(tmp_path: Path):
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"x" * 5000)
    found = files_under(tmp_path)
    next(found)
    for name in ("first", "second", "third"):
        shutil.rmtree(tmp_path / name)
    assert not list(found)
    assert folder_bytes(tmp_path) == 0
    assert folder_bytes(tmp_path / "never") == 0


@pytest.fixture
def vanishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that another process deletes after it has been listed with its neighbours, before it is looked into."""
    folder, scandir = tmp_path / "vanishing", os.scandir
    for name in ("before", "vanishing", "zuletzt"):
        (tmp_path / name / "in").mkdir(parents=True)
        (tmp_path / name / "in" / "found.json").touch()
        (tmp_path / name / ".half.0123456789ab.tmp").touch()

    def listed(path: str | Path | int = ".") -> Iterator[os.DirEntry[str]]:
        if not isinstance(path, int) and Path(path) in (folder, folder / "in"):
            monkeypatch.setattr(os, "scandir", scandir)
            shutil.rmtree(folder)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listed)
    return folder


def test_what_vanishes_while_a_pattern_is_looked_for_is_left_out(tmp_path: Path, vanishing: Path) -> None:
    found = found_in(tmp_path, "*/in/*.json")
    assert sorted(found) == [tmp_path / name / "in" / "found.json" for name in ("before", "zuletzt")]
    assert not vanishing.exists()
    assert modified_ns(found[0]) == found[0].stat().st_mtime_ns
    assert modified_ns(vanishing / "in" / "found.json") is None
    assert found_in(vanishing, "*") == []


def test_what_vanishes_while_temporary_files_are_deleted_is_no_error(tmp_path: Path, vanishing: Path) -> None:
    (tmp_path / "before" / ".folder.0123456789ab.tmp" / "deep").mkdir(parents=True)
    delete_temporary(tmp_path)
    assert not vanishing.exists()
    assert [path.name for path in tmp_path.rglob(".*")] == []
    assert len(list(tmp_path.rglob("found.json"))) == 2
