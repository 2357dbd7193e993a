"""Bundles in object storage: whole and checked, or refused in one sentence."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_bundle import CLASSES, write_tiny_bundle

from finetune.bundle.manifest import read_manifest
from finetune.bundle.predictor import Predictor
from finetune.bundle.registry import Registry
from finetune.bundle.remote import fetch_bundle, push_bundle
from finetune.cli import cli
from finetune.errors import BundleError, DataError, NotReady
from finetune.evaluation.predictions import Predictions, digests_as_rows, write
from service.models import LoadedModels


def table_of(classes: tuple[str, ...]) -> Predictions:
    logits = np.eye(len(classes), dtype=np.float32)
    digests = digests_as_rows([""] * len(classes))
    ids = tuple(f"{name}.png" for name in classes)
    return Predictions("test", "multiclass", classes, ids, digests, np.arange(len(classes)), logits)


@pytest.fixture
def address() -> Iterator[str]:
    name = f"memory://{uuid.uuid4().hex}/trees/1"
    yield name
    memory = fsspec.filesystem("memory")
    if memory.exists(name):
        memory.rm(name, recursive=True)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_tiny_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_bundle_comes_back_bit_by_bit_and_is_fetched_once(
    bundle: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_bundle(bundle, address)
    fetched = fetch_bundle(address, tmp_path / "kept")
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {
        path.name: path.read_bytes() for path in bundle.iterdir()
    }
    monkeypatch.setattr(fsspec.filesystem("memory"), "get_file", None)
    assert fetch_bundle(address + "/", tmp_path / "kept") == fetched


def test_the_manifest_goes_last_so_a_push_that_is_cut_short_is_no_bundle(
    bundle: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    put = memory.put_file

    def breaks(local: str, remote: str, **options: object) -> None:
        if remote.endswith("probe.npz"):
            raise ConnectionError("the network is gone")
        put(local, remote, **options)

    monkeypatch.setattr(memory, "put_file", breaks)
    with pytest.raises(DataError, match=f"{address}: cannot be read: the network is gone"):
        push_bundle(bundle, address)
    with pytest.raises(BundleError, match=r"bundle\.json: no such folder or file\. A bundle is a folder with bundle\.json in it"):
        fetch_bundle(address, tmp_path / "kept")


def test_a_file_that_was_changed_there_is_refused_and_nothing_is_kept(bundle: Path, address: str, tmp_path: Path) -> None:
    push_bundle(bundle, address)
    fsspec.filesystem("memory").pipe_file(f"{address}/model.onnx", b"another network")
    with pytest.raises(BundleError, match=r"model\.onnx is not what bundle\.json says"):
        fetch_bundle(address, tmp_path / "kept")
    assert not list((tmp_path / "kept").glob("*"))


def test_an_address_keeps_the_bundle_that_it_has(bundle: Path, address: str, tmp_path: Path) -> None:
    push_bundle(bundle, address)
    push_bundle(bundle, address)  # the same again is no conflict
    write_tiny_bundle(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="there is another bundle already"):
        push_bundle(tmp_path / "other", address)


def test_a_version_goes_to_another_workspace_with_its_answers_to_the_test_images(
    bundle: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "answers.npz", table_of(CLASSES))
    table = (tmp_path / "answers.npz").read_bytes()
    here = Registry(tmp_path / "here/models")
    here.register(bundle, "trees", predictions=tmp_path / "answers.npz")
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "here"))
    pushed = CliRunner().invoke(cli, ["models", "push", "trees@champion", address], catch_exceptions=False)
    assert (pushed.exit_code, pushed.stderr) == (0, f"trees@1 is at {address}\n")

    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "there"))
    for time in (1, 2):
        pulled = CliRunner().invoke(cli, ["models", "pull", address], catch_exceptions=False)
        assert (pulled.exit_code, pulled.stdout) == (0, "trees@1\n")
        assert ("It was registered before, as trees@1" in pulled.stderr) == (time == 2)
        assert "Requests without a model name are answered by trees@champion, version 1" in pulled.stderr
    there = Registry(tmp_path / "there/models")
    (version,) = there.list()
    assert read_manifest(version.path).files == read_manifest(bundle).files
    assert there.predictions_of(version).read_bytes() == table
    assert there.names() == ("trees",), "what was fetched is not a model of its own"


@pytest.mark.parametrize("kind", ["junk", "of other classes", "absent"])
def test_what_is_no_table_of_the_models_predictions_is_left_out_and_said(
    kind: str, bundle: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "answers.npz"
    table.write_bytes(b"a table")
    if kind == "of other classes":
        write(table, table_of(("a", "b")))
    push_bundle(bundle, address, None if kind == "absent" else table)
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "there"))
    pulled = CliRunner().invoke(cli, ["models", "pull", address], catch_exceptions=False)
    assert (pulled.exit_code, pulled.stdout) == (0, "trees@1\n")
    why = {"junk": "is not a table of predictions", "of other classes": "other classes", "absent": "is not there"}[kind]
    assert f"predictions.npz {why}" in pulled.stderr.replace("has the predictions of a model with ", "")
    there = Registry(tmp_path / "there/models")
    assert not there.predictions_of(there.lookup("trees@1")).exists()


def test_a_bundle_that_lacks_its_model_is_not_registered(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    del manifest["files"]["model.onnx"]
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "there"))
    with pytest.raises(BundleError, match=r"model\.onnx: bundle\.json has no checksum for it"):
        CliRunner().invoke(cli, ["models", "pull", str(bundle)], catch_exceptions=False)
    assert Registry(tmp_path / "there/models").list() == ()


def test_a_bucket_of_a_real_s3_server_holds_bundles(bucket: str, bundle: Path, tmp_path: Path) -> None:
    push_bundle(bundle, f"{bucket}/trees/1")
    fetched = Registry(tmp_path / "models").locate(f"{bucket}/trees/1")
    assert read_manifest(fetched) == read_manifest(bundle)
    with pytest.raises(BundleError, match=r"/trees/2/bundle\.json: no such folder or file"):
        Registry(tmp_path / "models").locate(f"{bucket}/trees/2")


def test_a_server_answers_with_a_bundle_at_an_address_as_soon_as_it_is_there(
    bundle: Path, address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = LoadedModels(Registry(tmp_path / "models"), default=address)
    models.refresh()
    with pytest.raises(NotReady, match=r"cannot be fetched from its address yet; the server's log has the reason") as refused:
        models.default()
    assert address not in str(refused.value)
    models.refresh()
    assert len([record for record in caplog.records if address in record.message]) == 1, "said once, not every second"
    push_bundle(bundle, address)
    models.refresh()
    assert isinstance(models.default().predictor, Predictor)
    assert models.default().bundle.path.is_relative_to(tmp_path / "models")
