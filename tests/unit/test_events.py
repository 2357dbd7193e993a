"""Events of a run: kinds that clients branch on, each one once, and records that are JSON."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from finetune import events
from finetune.events import Event, Interrupted, Registered, Resumed
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir

KINDS = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event]
SAMPLES = {"str": "x", "int": 3, "float": 0.5, "bool": True}


def test_every_kind_is_one_event_with_a_sentence_of_documentation() -> None:
    assert len(KINDS) > 15
    names = [kind.kind for kind in KINDS]
    assert len(set(names)) == len(names)
    assert all(kind.__doc__ and not kind.__doc__.startswith(kind.__name__) for kind in KINDS)
    assert {kind.level for kind in KINDS} <= set(typing.get_args(events.Level))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_a_record_holds_kind_level_message_and_fields(kind: type[Event], tmp_path: Path) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    given = {field.name: SAMPLES.get(str(field.type), []) for field in dataclasses.fields(kind)}
    RunDir(tmp_path).record(kind(**given))
    (line,) = read_lines(RunDir(tmp_path).events)
    assert set(line) == {"at", "kind", "level", *names}
    assert (line["kind"], line["level"], line["message"]) == (kind.kind, kind.level, "x")
    assert json.loads(json.dumps(line)) == line


def test_the_kinds_that_others_wait_for_keep_their_names() -> None:
    assert (Registered.kind, Resumed.kind, Interrupted.kind) == ("succeeded", "resumed", "interrupted")
    assert {"planned", "training", "trained", "head_solved", "finished", "failed"} <= {kind.kind for kind in KINDS}
