"""One set of images in every format, from the request to the model: the same samples, split and weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from formats import FORMATS, Contents, zipped
from serving import in_process
from starlette.testclient import TestClient
from tiny_runs import carry_out_at, tiny_spec, weights_of

from finetune.data.split import read_recorded_split
from finetune.storage.files import read_json
from finetune.storage.rundir import RunDir

CONTENTS: Contents = {None: {"007": 12, "naïve cat": 9, "null": 10}}
QUICK = ("class folders", "parquet")
UPLOADED = ("metadata.csv", "saved dataset", "coco", "label studio", "imagenet lists")


def trained(location: Path, home: Path) -> tuple[str, object, str, list[str]]:
    """The weights, the split and the digest of the data of a run, and the class names of its bundle."""
    run = RunDir(home / "runs" / "one")
    carry_out_at(home, tiny_spec(location), run)
    split = sorted((row.sha256, row.label, row.split) for row in read_recorded_split(run.split))
    resolved, bundle = read_json(run.resolved), read_json(run.bundle / "bundle.json")
    return weights_of(run.bundle), split, resolved["dataset"]["digest"], bundle["classes"]


def same_models(names: list[str], root: Path) -> None:
    places = {name: FORMATS[name].write(root / name.replace(",", "") / "data", CONTENTS) for name in names}
    places |= {"zip": zipped(places["class folders"])}
    found = {name: trained(place, root / name.replace(",", "") / "home") for name, place in places.items()}
    assert len(found) == len(names) + 1
    expected = found["class folders"]
    assert expected[3] == ["007", "naïve cat", "null"]
    assert {name for name, one in found.items() if one != expected} == set()


def test_the_model_is_the_same_from_a_folder_an_archive_and_a_table(tmp_path: Path) -> None:
    same_models(list(QUICK), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_model_is_the_same_from_every_format(tmp_path: Path) -> None:
    same_models(list(FORMATS), tmp_path)


@pytest.mark.longer
def test_exports_go_in_over_http_and_a_job_takes_it(tmp_path: Path) -> None:
    with in_process(tmp_path / "home", wait=False) as client:
        counts = {name: _uploaded(client, zipped(FORMATS[name].write(tmp_path / name / "data", CONTENTS))) for name in UPLOADED}
    assert {name for name, one in counts.items() if one != {"all": dict(CONTENTS[None])}} == set()


def _uploaded(client: TestClient, archive: Path) -> dict[str, object]:
    answer = client.post("/v1/files", files={"file": (archive.name, archive.read_bytes())}, data={"purpose": "fine-tune"})
    assert answer.status_code == 201, answer.text
    file = answer.json()
    assert any("was read as" in sentence for sentence in file["summary"]["understood"])
    job = client.post("/v1/fine_tuning/jobs", json={"training_file": file["id"]})
    assert job.status_code == 201, job.text
    counts: dict[str, object] = file["summary"]["counts"]
    return counts
