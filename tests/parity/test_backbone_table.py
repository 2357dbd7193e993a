"""The table of what was tried: every family in it, tried again."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.export.trial import try_backbone
from finetune.model.tried import Trial, read_trials, write_trials

TRIALS = read_trials()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", TRIALS)
def test_a_family_does_what_the_table_says(family: str) -> None:
    known = TRIALS[family]
    found = try_backbone(known.backbone)
    assert (found.works, found.reason) == (known.works, known.reason)
    assert (found.n_stages, found.cam_kind, found.input_size_px, found.n_parameters) == (
        known.n_stages, known.cam_kind, known.input_size_px, known.n_parameters,
    )  # fmt: skip


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    works = Trial("resnet10t", works=True, n_stages=5, cam_kind="linear", input_size_px=176, n_parameters=4, milliseconds=2.5)
    given = {"resnet": works, "odd": Trial("odd_one", works=False, reason='it ends, so to say, in "nothing"')}
    write_trials(given, tmp_path / "table.csv")
    assert read_trials(tmp_path / "table.csv") == {"odd": given["odd"], "resnet": given["resnet"]}
    assert read_trials(tmp_path / "none.csv") == {}
    assert len(TRIALS) >= 10


def test_a_backbone_that_cannot_be_used_says_why() -> None:
    found = try_backbone("no_such_network")
    assert not found.works
    assert "timm has no architecture" in found.reason


def test_a_small_backbone_is_tried_from_freezing_to_export() -> None:
    found = try_backbone("test_resnet")
    assert (found.works, found.reason, found.n_stages, found.cam_kind) == (True, "", 5, "linear")
    assert found.milliseconds > 0
