"""bundle.json reads back as it was written, and every field that is off is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import tiny_manifest, write_tiny_bundle

from finetune.bundle.manifest import METADATA_PREFIX, Manifest, metadata_problems, read_manifest, write_manifest
from finetune.errors import BundleError


def test_a_manifest_survives_json() -> None:
    manifest = tiny_manifest()
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_numbers_survive_to_the_last_bit() -> None:
    manifest = dataclasses.replace(tiny_manifest(), metrics={"val/top1": 0.1 + 0.2, "val/nll": 5e-324})
    assert Manifest.from_json(manifest.to_json()).metrics == manifest.metrics


def test_writing_adds_checksums_of_the_files_that_are_there(tmp_path: Path) -> None:
    written = write_tiny_bundle(tmp_path)
    assert read_manifest(tmp_path) == written
    assert sorted(written.files) == ["model.onnx", "probe.npz"]


def test_a_folder_without_model_cannot_become_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot become a bundle without model\.onnx and probe\.npz"):
        write_manifest(tmp_path, tiny_manifest())
    assert not list(tmp_path.iterdir())


def test_a_manifest_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path)
    before = (tmp_path / "bundle.json").read_bytes()
    with pytest.raises(BundleError, match="classes"):
        write_manifest(tmp_path, dataclasses.replace(tiny_manifest(), classes=()))
    assert (tmp_path / "bundle.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes": []}, "classes: "),
        ({"classes": ["a", "b", "a"]}, "classes ['a'] are listed twice"),
        ({"classes": ["a", 7]}, "classes.1: "),
        ({"outputs": ["probs"]}, "outputs ['probs'] must contain each of ['probs', 'logits', 'embedding'] once"),
        ({"outputs": ["probs", "logits", "embedding"]}, "cam.available is True, but outputs are"),
        ({"outputs": ["probs", "logits", "embedding", "heatmap"]}, "outputs.3: "),
        ({"metrics": {"val/top1": "high"}}, "metrics.val/top1: "),
        ({"files": {"../../etc/passwd": "0" * 64}}, "files."),
        ({"files": {"model.onnx": "abc"}}, "files.model.onnx: "),
        ({"backbone": {}}, "backbone must have a name"),
        ({"model": {"opset": 18}}, "model must have an input_name"),
        ({"created_at": None}, "created_at: "),
        ({"owner": "me"}, "owner: "),
        ({"preprocess": {**tiny_manifest().preprocess.to_dict(), "std": [1, 1, 0]}}, "preprocess.std.2: "),
    ],
)
def test_a_field_that_is_off_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps({**tiny_manifest().to_dict(), **changes}))
    assert says in str(caught.value)


def test_all_fields_that_are_off_are_named_at_once() -> None:
    given = {**tiny_manifest().to_dict(), "created_at": "yesterday", "spec_digest": 7, "name": ""}
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(given))
    assert {problem.where for problem in caught.value.problems} == {"created_at", "spec_digest", "name"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[]", "must be a JSON object, found list"),
        ("[" * 100_000, "is nested too deeply"),
        ("{}", "schema_version None, this finetune reads 1. Export the bundle again"),
        ('{"schema_version": 2}', "schema_version 2, this finetune reads 1. It was written by a newer finetune"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(text)
    assert says in caught.value.message


def test_nan_is_not_written() -> None:
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        dataclasses.replace(tiny_manifest(), metrics={"val/top1": float("nan")}).to_json()


def test_the_model_carries_everything_but_what_is_only_known_after_it_is_written() -> None:
    manifest = tiny_manifest()
    carried = {key.removeprefix(METADATA_PREFIX) for key in manifest.model_metadata()}
    assert carried == set(manifest.to_dict()) - {"name", "version", "files", "abstain"}
    assert not metadata_problems(manifest, manifest.model_metadata())


def test_what_the_model_says_otherwise_is_named_and_foreign_notes_are_not() -> None:
    manifest = tiny_manifest()
    said = {**manifest.model_metadata(), "finetune.classes": '["x"]', "producer": "somebody", "finetune.note": "not a field"}
    (problem,) = metadata_problems(manifest, said)
    assert problem.where == "classes"
    assert problem.message.endswith('model.onnx says ["x"]')
