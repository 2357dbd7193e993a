"""Checkpoints: whole or passed over, two are kept, a full disk leaves the earlier ones alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import CheckpointError, DiskFull
from finetune.training import checkpoint

STATE: dict[str, Any] = {
    "weights": {"w": torch.arange(6.0).reshape(2, 3)},
    "step": 7,
    "history": [{"at": 0.1, "values": {"a": 1e-17}}],
}


def no_damage(path: Path, why: str) -> None:
    raise AssertionError(f"{path.name} reported as damaged: {why}")


def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, STATE)
    found = checkpoint.load_newest(tmp_path, no_damage)
    assert found is not None
    assert torch.equal(found["weights"]["w"], STATE["weights"]["w"])
    assert {key: found[key] for key in ("step", "history")} == {key: STATE[key] for key in ("step", "history")}


def test_memory_layout_survives(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 0, {"w": torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)})
    found = checkpoint.load_newest(tmp_path, no_damage)
    assert found is not None
    assert found["w"].is_contiguous(memory_format=torch.channels_last)


def test_an_empty_folder_and_a_missing_one_hold_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path, no_damage) is None
    assert checkpoint.load_newest(tmp_path / "absent", no_damage) is None


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        checkpoint.save(tmp_path, step, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000100.pt", "step-00000100.pt.sha256", "step-00001000.pt", "step-00001000.pt.sha256",
    ]  # fmt: skip
    assert checkpoint.load_newest(tmp_path, no_damage) == {"step": 1000}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.with_name(path.name + ".sha256").unlink(),
        lambda path: path.with_name(path.name + ".sha256").write_text(""),
    ],
    ids=["bit flip", "truncated", "empty", "no checksum", "empty checksum"],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: Any) -> None:
    checkpoint.save(tmp_path, 1, {"step": 1})
    damage(checkpoint.save(tmp_path, 2, {"step": 2}))
    named: list[str] = []
    assert checkpoint.load_newest(tmp_path, lambda path, why: named.append(f"{path.name}: {why}")) == {"step": 1}
    assert len(named) == 1
    assert named[0].startswith("step-00000002.pt: ")
    assert "checksum" in named[0]


def test_a_full_disk_is_named_and_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, {"step": 1})
    monkeypatch.setattr(checkpoint, "_HashingWriter", _FullDisk)
    with pytest.raises(DiskFull, match="the disk is full"):
        checkpoint.save(tmp_path, 2, {"w": torch.zeros(100_000)})
    assert checkpoint.load_newest(tmp_path, no_damage) == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 2, "no temporary file is left"


class _FullDisk(checkpoint._HashingWriter):
    """Has room for 1,000 bytes."""

    room = 1000

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.failure
        return super().write(data)


def test_the_device_that_is_always_full_gives_its_own_error() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint._write(Path("/dev/full"), {"w": torch.zeros(100_000)})
    assert caught.value.errno == errno.ENOSPC


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    own = {"spec": "a", "dataset": "b"}
    checkpoint.check_belongs(own, own, tmp_path)
    with pytest.raises(CheckpointError, match="another run: dataset changed"):
        checkpoint.check_belongs(own, {**own, "dataset": "c"}, tmp_path)
    with pytest.raises(CheckpointError, match="spec and dataset changed"):
        checkpoint.check_belongs({}, own, tmp_path)
