"""Images that a server keeps: within a number of bytes and an age, oldest first out, gone with their version."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from standin import picture, write_bundle

from finetune.bundle.registry import ModelVersion, Registry
from finetune.cli import cli
from finetune.errors import InvalidInput
from finetune.evaluation.predict import image_samples
from finetune.monitoring.samples import SampleStore, SamplingPolicy, copy_samples, delete_samples, folder_of, samples_of
from finetune.storage.backup import restore_backup, write_backup
from service.settings import ServerSettings

RECORD = {"owner": "ann", "confidence": 0.5, "novelty": None}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "models")
    registry.register(write_bundle(tmp_path / "bundle"), "colours")
    registry.register(tmp_path / "bundle", "others")
    return registry


def one_size(registry: Registry) -> int:
    """What one sample of these tests takes on disk."""
    store = SampleStore(registry, SamplingPolicy())
    assert store.keep("colours", "1", image(0), RECORD, 1000.0)
    size = store.size_bytes
    delete_samples(samples_of(registry, registry.lookup("colours")))
    return size


def image(number: int) -> bytes:
    return picture("red", (8, 8)) + f"{number:04d}".encode()  # what stands behind a picture is not read


def names(registry: Registry, model: str = "colours") -> list[str]:
    return [sample.path.name.partition("-")[0] for sample in samples_of(registry, registry.lookup(model))]


def version(registry: Registry) -> ModelVersion:
    return registry.lookup("colours")


def test_a_sample_is_the_bytes_that_were_sent_beside_who_asked_and_what_was_answered(registry: Registry) -> None:
    assert SampleStore(registry, SamplingPolicy()).keep("colours", "1", image(7), RECORD, 1_700_000_000.25)
    (sample,) = samples_of(registry, version(registry))
    assert sample.path.read_bytes() == image(7)
    assert sample.path.suffix == ".png"
    said = {key: sample.record[key] for key in ("at", "model", "version", "owner")}
    assert said == {"at": "2023-11-14T22:13:20.250Z", "model": "colours", "version": "1", "owner": "ann"}
    assert folder_of(registry, version(registry)).stat().st_mode & 0o077 == 0
    assert [file.id for file in image_samples([folder_of(registry, version(registry))])] == [str(sample.path)]


def test_the_oldest_make_room_over_all_models(registry: Registry) -> None:
    size = one_size(registry)
    store = SampleStore(registry, SamplingPolicy(max_bytes=3 * size + size // 2))
    for number in range(6):
        store.keep("colours" if number % 2 else "others", "1", image(number), RECORD, 1000.0 + number)
        assert store.size_bytes <= 3 * size + size // 2
    assert (names(registry), names(registry, "others")) == (["00000001003000", "00000001005000"], ["00000001004000"])
    assert not store.keep("colours", "1", bytes(4 * size), RECORD, 2000.0), "larger than all that may be kept"
    assert len(names(registry)) == 2, "and nothing was deleted for it"


def test_what_is_too_old_goes_without_anything_new(registry: Registry) -> None:
    store = SampleStore(registry, SamplingPolicy(max_age_seconds=100.0))
    for number in range(3):
        store.keep("colours", "1", image(number), RECORD, 1000.0 + 50 * number)
    store.enforce(1120.0)
    assert names(registry) == ["00000001050000", "00000001100000"]
    SampleStore(registry, SamplingPolicy(max_age_seconds=100.0)).enforce(9999.0)  # a server that starts later
    assert names(registry) == []
    assert list(folder_of(registry, version(registry)).iterdir()) == []


def test_what_others_delete_and_what_a_killed_writer_left_is_noticed(registry: Registry) -> None:
    size = one_size(registry)
    store = SampleStore(registry, SamplingPolicy(max_age_seconds=100.0))
    store.keep("colours", "1", image(0), RECORD, 1000.0)
    store.keep("others", "1", image(1), RECORD, 1000.0)
    registry.delete("others", force=True)
    assert not store.keep("others", "1", image(2), RECORD, 1001.0), "its version is gone"
    (folder_of(registry, version(registry)) / "00000001002000-abc.json").write_text("{}")
    (folder_of(registry, version(registry)) / ".00000001002500-abc.jpg.123abc.tmp").write_bytes(bytes(99))
    assert len(samples_of(registry, version(registry))) == 1
    store.enforce(1003.0)
    assert store.size_bytes == size + 2
    assert not (registry.root / "others" / "monitoring" / "1").exists()
    store.enforce(9999.0)
    assert list(folder_of(registry, version(registry)).iterdir()) == []


def test_copies_begin_with_what_is_best_to_label_next(registry: Registry, tmp_path: Path) -> None:
    store = SampleStore(registry, SamplingPolicy())
    for number, (confidence, novelty) in enumerate([(0.9, 0.3), (0.4, 0.2), (0.99, 0.97), (0.6, None)]):
        store.keep("colours", "1", image(number), {"owner": "ann", "confidence": confidence, "novelty": novelty}, 1000.0 + number)
    lines = copy_samples(samples_of(registry, version(registry)), tmp_path / "out")
    assert [line["confidence"] for line in lines] == [0.99, 0.4, 0.6, 0.9]
    copied = [(tmp_path / "out" / line["file"]).read_bytes() for line in lines]
    assert copied == [image(2), image(1), image(3), image(0)]
    assert [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()] == lines
    with pytest.raises(InvalidInput, match="is not empty"):
        copy_samples([], tmp_path / "out")


def test_the_command_shows_copies_and_deletes_them(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))

    def run(*words: str) -> str:
        done = CliRunner().invoke(cli, ["models", "samples", "colours", *words])
        assert done.exit_code == 0, done.output
        return done.output

    assert "No images sent to colours@1 are stored" in run()
    store = SampleStore(registry, SamplingPolicy())
    for number, owner in enumerate(("ann", "bob", "ann")):
        store.keep("colours", "1", image(number), {**RECORD, "owner": owner}, 1_700_000_000.0 + number)
    assert "3 images sent to colours@1" in run()
    shown = json.loads(run("--out", str(tmp_path / "out"), "--owner", "ann", "--json"))
    assert (shown["n"], shown["oldest"]) == (2, "2023-11-14T22:13:20.000Z")
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert "2 images deleted" in run("--owner", "ann", "--delete")
    assert [sample.record["owner"] for sample in samples_of(registry, version(registry))] == ["bob"]
    assert CliRunner().invoke(cli, ["models", "samples", "colours", "--delete", "--out", "x"]).exit_code == 2


def test_a_backup_holds_no_samples_and_a_quota_does_not_count_them(registry: Registry, tmp_path: Path) -> None:
    owned = registry.owned_bytes("ann")
    SampleStore(registry, SamplingPolicy()).keep("colours", "1", image(0), RECORD, 1000.0)
    write_backup(tmp_path, tmp_path.parent / "backup.tar", jobs_database=None)
    restored = tmp_path.parent / "restored"
    restore_backup(tmp_path.parent / "backup.tar", restored)
    assert (restored / "models" / "colours" / "1" / "bundle.json").exists()
    assert not list(restored.rglob("sampled-inputs"))
    assert registry.owned_bytes("ann") == owned


@pytest.mark.parametrize("text", ["1.5", "-0.1", "one", "nan"])
def test_a_share_that_is_none_is_refused_when_the_server_starts(text: str) -> None:
    with pytest.raises(InvalidInput, match="FINETUNE_SAMPLE_INPUTS"):
        ServerSettings.from_environment({**os.environ, "FINETUNE_SAMPLE_INPUTS": text})


def test_sampling_is_off_by_default() -> None:
    assert ServerSettings.from_environment({}).sampling.fraction == 0.0
    given = {"FINETUNE_SAMPLE_INPUTS": "0.01", "FINETUNE_SAMPLE_BYTES": "500", "FINETUNE_SAMPLE_DAYS": "7"}
    chosen = ServerSettings.from_environment(given)
    assert chosen.sampling == SamplingPolicy(0.01, 500, 7 * 86400.0)
