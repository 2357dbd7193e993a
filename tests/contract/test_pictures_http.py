"""What people look at can be read over HTTP: the images of an upload and of a run, what a run answered, what it measured."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from archives import photographs, zip_of
from folders import encoded
from PIL import Image
from serving import in_process, registered
from standin import write_bundle
from starlette.testclient import TestClient

from finetune.evaluation.predictions import Predictions, digests_as_rows, write
from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore
from finetune.jobs.store import JobStore
from finetune.storage.rundir import RunDir

pytestmark = pytest.mark.usefixtures("uploads_read_here")

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    with in_process(tmp_path) as client:
        yield client


def uploaded(client: TestClient, key: dict[str, str] | None = None, images: dict[str, bytes] | None = None) -> str:
    sent = {"file": ("photos.zip", zip_of(images or photographs()))}
    return str(client.post("/v1/files", files=sent, data={"purpose": "fine-tune"}, headers=key).json()["id"])


def test_the_images_of_an_upload_are_listed_by_class_in_pages_and_shown_small_or_whole(client: TestClient) -> None:
    file = uploaded(client)
    everything = client.get(f"/v1/files/{file}/images").json()
    names = [one["id"] for one in everything["data"]]
    assert len(names) == len(photographs())
    first = client.get(f"/v1/files/{file}/images", params={"limit": 2}).json()
    assert first["has_more"]
    rest = client.get(f"/v1/files/{file}/images", params={"after": first["last_id"]}).json()
    assert [one["id"] for one in (*first["data"], *rest["data"])] == names
    label = everything["data"][0]["labels"][0]
    of_label = client.get(f"/v1/files/{file}/images", params={"label": label}).json()["data"]
    assert 0 < len(of_label) < len(names)
    assert {tuple(one["labels"]) for one in of_label} == {(label,)}

    whole = client.get(f"/v1/files/{file}/image", params={"id": names[0]})
    assert whole.headers["content-type"] == "image/png"
    assert whole.content == photographs()[names[0]]
    small = client.get(f"/v1/files/{file}/image", params={"id": names[0], "side_px": 16})
    assert max(Image.open(io.BytesIO(small.content)).size) == 16
    assert "immutable" in small.headers["cache-control"]


@pytest.mark.parametrize("name", ["../photos.zip", "/etc/passwd", "no/such.jpg", "daisy"])
def test_an_id_that_is_no_image_of_the_dataset_leads_nowhere(client: TestClient, name: str) -> None:
    assert client.get(f"/v1/files/{uploaded(client)}/image", params={"id": name}).status_code == 404


def test_a_deleted_upload_has_no_images_any_more(client: TestClient) -> None:
    file = uploaded(client)
    assert client.get(f"/v1/files/{file}/images").status_code == 200
    client.delete(f"/v1/files/{file}")
    assert client.get(f"/v1/files/{file}/images").status_code == 404


def table_of(rows: list[str], images: dict[str, bytes]) -> dict[str, bytes]:
    return {**images, "labels.csv": "\n".join(rows).encode()}


def test_images_that_a_table_labels_are_shown_and_can_be_corrected(client: TestClient) -> None:
    images = {f"images/{number}.png": image for number, image in enumerate(photographs().values())}
    rows = ["file,label", *(f"{name},{'even' if number % 2 == 0 else 'odd'}" for number, name in enumerate(images))]
    file = uploaded(client, images=table_of(rows, images))
    listed = client.get(f"/v1/files/{file}/images").json()["data"]
    assert {one["id"] for one in listed} == set(images)
    assert all(one["correctable"] for one in listed)
    shown = client.get(f"/v1/files/{file}/image", params={"id": "images/0.png"})
    assert shown.content == images["images/0.png"]
    copy = client.post(f"/v1/files/{file}/revisions", json={"labels": {"images/0.png": "odd"}})
    assert copy.status_code == 201, copy.text
    before, after = (client.get(f"/v1/files/{one}").json()["summary"]["counts"]["all"] for one in (file, copy.json()["id"]))
    assert after == {"even": before["even"] - 1, "odd": before["odd"] + 1}


@pytest.mark.parametrize(("column", "reason"), [("group", "groups or weights"), ("labels", "several labels")])
def test_a_table_that_says_more_than_a_class_is_shown_and_not_corrected(client: TestClient, column: str, reason: str) -> None:
    images = {f"{number}.png": image for number, image in enumerate(photographs().values())}
    if column == "group":
        rows = ["file,label,group", *(f"{name},{'ab'[number % 2]},g{number}" for number, name in enumerate(images))]
        table = {"labels.csv": "\n".join(rows).encode()}
    else:
        lines = [json.dumps({"file": name, "label": ["a", "b"][: 1 + number % 2]}) for number, name in enumerate(images)]
        table = {"labels.jsonl": "\n".join(lines).encode()}
    file = uploaded(client, images={**images, **table})
    listed = client.get(f"/v1/files/{file}/images").json()["data"]
    assert len(listed) == len(images)
    wanted = next(one for one in listed if not one["correctable"])
    refused = client.post(f"/v1/files/{file}/revisions", json={"labels": {wanted["id"]: "a"}})
    assert refused.status_code == 409
    assert reason in refused.json()["detail"]


def test_another_owner_sees_neither_images_nor_answers(client: TestClient, tmp_path: Path) -> None:
    keys = KeyStore(open_jobs(tmp_path))
    hers, stranger = ({"Authorization": f"Bearer {keys.create(owner, ('jobs',))[0]}"} for owner in ("ann", "bob"))
    file = uploaded(client, hers)
    job = client.post(JOBS, json={"training_file": file}, headers=hers).json()["id"]
    assert client.get(f"/v1/files/{file}/images", headers=hers).status_code == 200
    for path in (f"/v1/files/{file}/images", f"{JOBS}/{job}/answers", f"{JOBS}/{job}/metrics", f"{JOBS}/{job}/image?id=x"):
        assert client.get(path, headers=stranger).status_code == 404, path
    assert client.get("/v1/caller", headers=stranger).json() == {
        "object": "caller", "owner": "bob", "scopes": ["jobs"], "needs_key": True,
    }  # fmt: skip


def test_the_answers_of_a_run_come_most_confident_first_and_can_be_chosen(client: TestClient, tmp_path: Path) -> None:
    file = uploaded(client)
    images = [one["id"] for one in client.get(f"/v1/files/{file}/images").json()["data"]][:4]
    job = client.post(JOBS, json={"training_file": file}).json()["id"]
    assert client.get(f"{JOBS}/{job}/answers").status_code == 404  # it has not run
    assert client.get(f"{JOBS}/{job}/metrics").json()["data"] == []
    assert JobStore(open_jobs(tmp_path)).claim("worker") is not None
    run = RunDir(tmp_path / "runs" / job).create()
    logits = np.array([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 4.0]], np.float32)
    targets = np.array([0, 1, 0, 1])
    write(
        run.predictions_of("test"),
        Predictions("test", "multiclass", ("a", "b"), tuple(images), digests_as_rows([""] * 4), targets, logits),
    )
    run.metric(5, {"train/loss": 0.5}, epoch=1.0)

    answers = client.get(f"{JOBS}/{job}/answers").json()["data"]
    assert [one["id"] for one in answers] == [images[3], images[1], images[0], images[2]]
    assert answers[0]["probability"] == pytest.approx(1 / (1 + np.exp(-4)))
    wrong = client.get(f"{JOBS}/{job}/answers", params={"wrong": True}).json()["data"]
    assert [(one["id"], one["label"], one["answer"]) for one in wrong] == [(images[1], "b", "a"), (images[2], "a", "b")]
    assert wrong[0]["label_probability"] == pytest.approx(1 / (1 + np.exp(3)))
    cell = client.get(f"{JOBS}/{job}/answers", params={"label": "b", "answer": "b"}).json()["data"]
    assert [one["id"] for one in cell] == [images[3]]
    shown = client.get(f"{JOBS}/{job}/image", params={"id": images[1]})
    assert shown.content == photographs()[images[1]]
    assert client.get(f"{JOBS}/{job}/metrics").json()["data"] == [{"step": 5, "epoch": 1.0, "values": {"train/loss": 0.5}}]


def test_who_deployed_what_and_when_is_listed_newest_first(client: TestClient, tmp_path: Path) -> None:
    registered(tmp_path, tmp_path / "bundle", "other")
    before = client.get("/v1/deployments/default/history").json()["data"]
    assert client.put("/v1/deployments/default", json={"reference": "other@1"}).status_code == 200
    history = client.get("/v1/deployments/default/history").json()["data"]
    assert [one["reference"] for one in history] == ["other@1", *(one["reference"] for one in before)]
    assert history[0]["by"] == "local"
    assert history[0]["at"] > 1_700_000_000


def test_a_corrected_copy_has_other_labels_and_the_original_stays_as_it_is(client: TestClient) -> None:
    file = uploaded(client, images=photographs({"daisy": 6, "rose": 3}))
    before = client.get(f"/v1/files/{file}").json()["summary"]["counts"]
    labels = {"daisy/0.png": "rose", "daisy/1.png": "rose", "daisy/2.png": None}
    wanted = {"labels": labels, "renamed": {"rose": "Rosa"}}
    answer = client.post(f"/v1/files/{file}/revisions", json=wanted)
    assert answer.status_code == 201, answer.text
    copy = answer.json()
    assert answer.headers["location"] == f"/v1/files/{copy['id']}"
    assert copy["summary"]["counts"] == {"all": {"Rosa": 3, "daisy": 3, "rose": 2}}
    images = {one["id"] for one in client.get(f"/v1/files/{copy['id']}/images").json()["data"]}
    assert images == {
        f"{name}.png" for name in ("Rosa/0", "Rosa/1", "Rosa/2", "daisy/3", "daisy/4", "daisy/5", "rose/0", "rose/1")
    }
    assert client.get(f"/v1/files/{file}").json()["summary"]["counts"] == before
    client.delete(f"/v1/files/{file}")
    shown = client.get(f"/v1/files/{copy['id']}/image", params={"id": "rose/0.png"})
    assert shown.content == photographs()["daisy/0.png"]


def test_two_images_of_one_name_in_one_class_are_both_kept(client: TestClient) -> None:
    file = uploaded(client)
    copy = client.post(f"/v1/files/{file}/revisions", json={"labels": {"daisy/0.png": "rose"}}).json()
    assert copy["summary"]["counts"] == {"all": {"daisy": 2, "rose": 4}}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({}, "nothing is changed"),
        ({"labels": {"daisy/9.png": "rose"}}, "no such image"),
        ({"renamed": {"tulip": "x"}}, "no such class"),
        (
            {"renamed": {"rose": "../x"}},
            "renamed.rose: '../x' cannot be the name of a class; a class name has 1 to 200 characters",
        ),
        ({"renamed": {"rose": ""}}, "it is empty"),
        ({"renamed": {"rose": "x" * 201}}, "1 to 200 characters"),
        ({"labels": {"daisy/0.png": ".hidden"}}, "no dot at its beginning"),
        ({"labels": {"daisy/0.png": "a\\b"}}, "no backslash"),
        ({"labels": {"daisy/0.png": "a\u202eb"}}, "control or direction characters"),
        ({"labels": {"daisy/0.png": "__MACOSX"}}, "labels.daisy/0.png: '__MACOSX' cannot be the name of a class: systems and"),
        ({"labels": {"daisy/0.png": "@eaDir"}}, "labels.daisy/0.png: '@eaDir' cannot be"),
        ({"labels": {"daisy/0.png": " Thumbs.db"}}, "labels.daisy/0.png: ' Thumbs.db' cannot be"),
        ({"renamed": {"rose": "daisy"}}, "only one class"),
    ],
)
def test_a_correction_that_cannot_be_made_says_why_and_leaves_nothing(
    client: TestClient, tmp_path: Path, wanted: dict[str, object], said: str
) -> None:
    file = uploaded(client)
    answer = client.post(f"/v1/files/{file}/revisions", json=wanted)
    assert answer.status_code == 422, answer.text
    assert said in answer.text
    assert str(tmp_path) not in answer.text  # where the server keeps it is nobody's business
    assert len(client.get("/v1/files").json()["data"]) == 1
    assert [path.name for path in (tmp_path / "files").iterdir()] == [file]


def test_too_few_classes_are_a_problem_of_the_field_that_brought_them_about(client: TestClient) -> None:
    problem = client.post(f"/v1/files/{uploaded(client)}/revisions", json={"renamed": {"rose": "daisy"}}).json()
    ((field, detail),) = [(one["field"], one["detail"]) for one in problem["errors"]]
    assert field == "renamed"
    assert "only one class" in detail


@pytest.mark.parametrize("label", ["train", "val", "test images"])
def test_a_label_that_sounds_like_a_split_is_a_class_beside_others(client: TestClient, label: str) -> None:
    answer = client.post(f"/v1/files/{uploaded(client)}/revisions", json={"labels": {"daisy/0.png": label}})
    assert answer.status_code == 201, answer.text
    assert answer.json()["summary"]["counts"] == {"all": {"daisy": 2, "rose": 3, label: 1}}


def test_a_copy_in_which_images_would_be_read_with_another_class_is_refused(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.revisions.is_system", lambda name: False)  # the readers of folders leave these out all the same
    file = uploaded(client)
    wanted = {"labels": {"daisy/0.png": "__MACOSX", "daisy/1.png": "rose"}}
    answer = client.post(f"/v1/files/{file}/revisions", json=wanted)
    assert answer.status_code == 422, answer.text
    assert [one["field"] for one in answer.json()["errors"]] == ["labels.daisy/0.png"]
    assert "is not read as a class" in answer.json()["detail"]
    assert len(client.get("/v1/files").json()["data"]) == 1


def test_a_copy_with_a_class_of_one_image_has_no_splits(client: TestClient) -> None:
    file = uploaded(client)
    answer = client.post(f"/v1/files/{file}/revisions", json={"labels": {"daisy/0.png": "zz"}})
    assert answer.status_code == 201, answer.text
    counts = answer.json()["summary"]["counts"]
    before = client.get(f"/v1/files/{file}").json()["summary"]["counts"]["all"]
    assert counts == {"all": {**before, "daisy": before["daisy"] - 1, "zz": 1}}


def test_tables_are_read_in_a_child_process(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    table = b"file_name,label\n0.png,a\n1.png,a\n2.png,b\n3.png,b\n"
    images = {f"{number}.png": encoded(f"{number}") for number in range(4)}
    file = uploaded(client, images={**images, "metadata.csv": table})

    def read_here(*_: object, **__: object) -> None:
        raise AssertionError("the server reads a table itself")

    monkeypatch.setattr("service.pictures.index_dataset", read_here)
    listed = client.get(f"/v1/files/{file}/images").json()["data"]
    assert [(one["id"], one["labels"]) for one in listed] == [
        ("0.png", ["a"]), ("1.png", ["a"]), ("2.png", ["b"]), ("3.png", ["b"])
    ]  # fmt: skip
