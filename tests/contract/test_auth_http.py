"""API keys over HTTP: what is closed, to whom, and that a key is never told."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from archives import photographs, zip_of
from serving import END_SECONDS, in_process, live_server, registered, until
from standin import picture, write_bundle
from starlette.testclient import TestClient

from finetune.bundle.access import Access
from finetune.bundle.deployment import Deployment, Share, deploy
from finetune.bundle.registry import Registry
from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore
from finetune.jobs.store import JobStore

pytestmark = pytest.mark.usefixtures("uploads_read_here")

OPEN = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
JOBS, COMPARISONS = "/v1/fine_tuning/jobs", "/v1/fine_tuning/comparisons"
BATCHES = "/v1/batch_predictions"
OWN_BODIES: dict[str, Any] = {
    "/acknowledgements": {"kind": "duplicates"},
    "/drift/reference": {"use": "bundle"},
    "/abstention": {"precision": 0.9},
    "/revisions": {"renamed": {"daisy": "tulip"}},
    "/complete": {"part_ids": ["part_x"]},
}
ABSENT = {
    "file_id": "file-x",
    "job_id": "ftjob-x",
    "comparison_id": "ftcmp-x",
    "run_name": "full-seed0",
    "batch_id": "batch-x",
    "name": "other",
    "alias": "champion",
    "version": "1",
    "file": "model.onnx",
    "format": "onnx",
    "webhook_id": "whk-x",
    "upload_id": "upload-x",
    "check_id": "ftchk-x",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    return tmp_path


@pytest.fixture
def client(home: Path) -> Iterator[TestClient]:
    with in_process(home) as client:
        yield client


def new_key(home: Path, owner: str, *scopes: str, **options: float) -> dict[str, str]:
    secret, _ = KeyStore(open_jobs(home)).create(owner, scopes, **options)
    return {"Authorization": f"Bearer {secret}"}


def routes(client: TestClient, **headers: dict[str, str]) -> list[tuple[str, str]]:
    """(method, path) of everything in the OpenAPI document, and of what is not in it, with names that do not exist."""
    document = client.get("/docs.json", **headers).json()  # type: ignore[arg-type]
    documented = [(method.upper(), path) for path, item in document["paths"].items() for method in item]
    hidden = [("GET", "/docs.json"), ("GET", "/schema.json"), ("GET", "/nothing"), ("POST", "/v1/nothing"), ("GET", "/metrics/x")]
    return [(method, re.sub(r"\{\w+\}", "nothing", path)) for method, path in documented] + hidden


def upload(client: TestClient, key: dict[str, str]) -> str:
    file = ("Flowers.zip", zip_of(photographs()))
    answer = client.post("/v1/files", files={"file": file}, data={"purpose": "fine-tune"}, headers=key)
    return str(answer.json()["id"])


# --- with and without keys ------------------------------------------------------------------------


def test_without_any_key_this_machine_may_do_everything_as_local(client: TestClient) -> None:
    job = client.post(JOBS, json={"training_file": upload(client, {})}).json()
    assert job["organization_id"] == "local"
    stock = client.get(JOBS, headers={"Authorization": "Bearer anything"})  # the stock client always sends something
    assert stock.status_code == 200


def test_without_any_key_other_machines_may_do_nothing(home: Path) -> None:
    with in_process(home, allowed_hosts=("192.168.1.7", "127.0.0.1")) as client:
        client.base_url = "http://192.168.1.7"  # type: ignore[assignment]
        answer = client.get(JOBS)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        assert "has no API key yet" in answer.json()["detail"]
        assert client.get("/livez").status_code == 200


def test_from_the_first_key_on_every_route_needs_one(client: TestClient, home: Path) -> None:
    every = routes(client)
    key = new_key(home, "ann", "admin")
    until(lambda: client.get(JOBS).status_code == 401)  # that there is no key is remembered for a moment
    closed = [route for route in every if route[1] not in OPEN]
    assert len(closed) >= 22
    for method, path in closed:
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), path
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.headers["x-request-id"]
        assert client.request(method, path, headers=key).status_code != 401, path
    for path in OPEN:
        assert client.get(path).status_code == 200


def test_the_pages_shell_stays_open_and_holds_no_data(client: TestClient, home: Path) -> None:
    new_key(home, "ann", "admin")
    for path in ("/", "/static/app.js", "/static/page.css"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "colours" not in answer.text
    assert client.get("/static/../v1/models").status_code == 401


@pytest.mark.parametrize("text", ["", "Bearer", "Bearer ", "Basic YTpi", "Bearer ft_x", "Bearer ft_0_", "ft_x", "Bearer \u00e9"])
def test_what_is_no_key_is_refused(text: str, client: TestClient, home: Path) -> None:
    new_key(home, "ann", "admin")
    answer = client.get(JOBS, headers={"Authorization": text.encode("latin-1")})  # type: ignore[dict-item]
    assert answer.status_code == 401


def test_a_key_that_is_cut_changed_expired_or_revoked_is_refused(client: TestClient, home: Path) -> None:
    key = new_key(home, "ann", "admin")["Authorization"]
    changed = key[:-1] + ("a" if key[-1] != "a" else "b")
    keys = KeyStore(open_jobs(home))
    expired = new_key(home, "ann", "admin", lifetime_seconds=-1.0)["Authorization"]
    _, revoked_key = keys.create("ann", ["admin"])
    for text in (key[:-1], changed, expired, f"{key}x", key.replace("Bearer ft_", "Bearer xx_")):
        assert client.get(JOBS, headers={"Authorization": text}).status_code == 401
    assert client.get(JOBS, headers={"Authorization": key}).status_code == 200
    keys.revoke(revoked_key.id)
    keys.revoke(key.split("_")[1])
    until(lambda: client.get(JOBS, headers={"Authorization": key}).status_code == 401)  # accepted keys are remembered for moments
    assert client.get(JOBS).status_code == 401  # the last key is gone, and the door stays closed


def test_a_key_in_the_query_is_no_key(client: TestClient, home: Path) -> None:
    secret = new_key(home, "ann", "admin")["Authorization"].removeprefix("Bearer ")
    for name in ("api_key", "key", "token", "Authorization"):
        assert client.get(JOBS, params={name: secret}).status_code == 401


def test_two_authorizations_are_refused(client: TestClient, home: Path) -> None:
    key = new_key(home, "ann", "admin")["Authorization"]
    answer = client.get(JOBS, headers=[("Authorization", key), ("Authorization", "Bearer other")])
    assert answer.status_code == 401


def test_a_key_is_never_told_again(client: TestClient, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    keys = [new_key(home, "ann", "admin"), {"Authorization": "Bearer ft_0123456789ab_qxz7notakey"}]
    told = ""
    for key in keys:
        secret = key["Authorization"].split("_", 2)[-1]
        for path in (JOBS, "/v1/nothing", "/metrics", "/docs.json", f"{JOBS}?key=x"):
            told += client.get(path, headers=key).text
        assert secret not in told + caplog.text
    assert b"qxz7notakey" not in (home / "jobs.db").read_bytes()
    assert keys[0]["Authorization"].encode() not in (home / "jobs.db").read_bytes()


# --- scopes ---------------------------------------------------------------------------------------


def test_a_key_may_do_what_its_scopes_say(client: TestClient, home: Path) -> None:
    predict, jobs, admin = (new_key(home, "ann", scope) for scope in ("predict", "jobs", "admin"))
    allowed = {
        ("POST", "/predict"): (200, 403, 200),
        ("POST", "/v1/models/colours/predict"): (200, 403, 200),
        ("GET", "/v1/models"): (200, 200, 200),
        ("GET", "/v1/files"): (403, 200, 200),
        ("GET", JOBS): (403, 200, 200),
        ("GET", f"{JOBS}/ftjob-x/events"): (403, 404, 404),
        ("GET", "/v1/deployments/default"): (200, 200, 200),
        ("POST", "/v1/deployments/default/rollback"): (403, 403, 409),
        ("GET", "/metrics"): (403, 403, 200),
        ("DELETE", "/v1/models/colours?force=true"): (403, 403, 200),  # no job made it, so it is the administrator's
    }
    for (method, path), statuses in allowed.items():
        body = picture() if path.endswith("predict") else None
        found = tuple(client.request(method, path, content=body, headers=key).status_code for key in (predict, jobs, admin))
        assert found == statuses, path
    refused = client.get(JOBS, headers=predict)
    assert 'error="insufficient_scope"' in refused.headers["www-authenticate"]
    assert refused.json()["code"] == "forbidden"


OPEN = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
ANY_KEY = ("/v1/caller",)
TO_PREDICT = ("/predict", "/v1/models/{name}/predict")
TO_READ = ("/v1/models", "/v1/deployments")  # GET
OF_ADMINISTRATORS = {("PUT", "/v1/deployments/default"), ("POST", "/v1/deployments/default/rollback")}


def scopes_of(method: str, path: str) -> set[str]:
    """Which scopes may use a route, said apart from the routes themselves."""
    if path in ANY_KEY:
        return {"predict", "jobs", "metrics"}
    if path == "/metrics":
        return {"metrics"}
    if path in TO_PREDICT or path.startswith("/v2"):
        return {"predict"}
    if method == "GET" and path.startswith(TO_READ):
        return {"predict", "jobs"}
    return set() if (method, path) in OF_ADMINISTRATORS or path.startswith("/v1/runs") else {"jobs"}


def test_every_route_denies_keys_without_its_scope(client: TestClient, home: Path) -> None:
    keys = {scope: new_key(home, scope, scope) for scope in ("predict", "jobs", "metrics")}
    known = {"name": "colours", "version": "1", "alias": "champion"}
    n_routes = 0
    for template, item in client.get("/docs.json", headers=new_key(home, "ann", "admin")).json()["paths"].items():
        path = re.sub(r"\{(\w+)\}", lambda found: known.get(found[1], "x-1"), template)
        for method in item:
            n_routes += 1
            nameless = client.request(method, path)
            assert (nameless.status_code == 401) != (template in OPEN), (method, path)
            for scope, key in keys.items() if template not in OPEN else ():
                answer = client.request(method, path, headers=key)
                allowed = scope in scopes_of(method.upper(), template)
                ours = (
                    answer.status_code == 403 and "was not made by a job of yours" in answer.text
                )  # the model is not the caller's
                assert answer.status_code != 401
                assert (answer.status_code != 403 or ours) == allowed, (method, path, scope, answer.text)
    assert n_routes > 90


# --- owners ---------------------------------------------------------------------------------------


def owned(client: TestClient, home: Path, key: dict[str, str]) -> dict[str, str]:
    """One of everything, made by this key's owner: a file, a job that has ended with its model, and a comparison."""
    file_id = upload(client, key)
    job_id = client.post(JOBS, json={"training_file": file_id, "suffix": "mine"}, headers=key).json()["id"]
    store = JobStore(open_jobs(home))
    claim = store.claim("worker")
    assert claim is not None
    Registry(home / "models").reserve("mine", Access(claim.job.owner, "private"))  # as the worker does
    registered(home, write_bundle(home / "second"), "mine")
    store.finish(claim, "succeeded", result={"model": "mine", "version": "1"})
    comparison_id = client.post(COMPARISONS, json={"training_file": file_id, "suffix": "other"}, headers=key).json()["id"]
    client.post(f"{COMPARISONS}/{comparison_id}/cancel", headers=key)
    batch = client.post(BATCHES, json={"input_file": file_id, "model": "mine"}, headers=key).json()
    webhook = client.post("/v1/webhooks", json={"url": "https://example.org/hooks"}, headers=key).json()
    others = {
        "comparison_id": comparison_id,
        "run_name": "full-seed0",
        "batch_id": batch["id"],
        "file": "model.onnx",
        "format": "onnx",
    }
    begun = client.post("/v1/uploads", json={"filename": "a.zip", "purpose": "fine-tune", "bytes": 10}, headers=key).json()
    check = client.post(f"/v1/files/{file_id}/check", headers=key).json()
    others |= {"webhook_id": webhook["id"], "upload_id": begun["id"], "check_id": check["id"]}
    return {"file_id": file_id, "job_id": job_id, "name": "mine", "alias": "champion", "version": "1", **others}


def test_what_another_owner_has_does_not_exist(client: TestClient, home: Path) -> None:
    ann, bob, admin = (
        new_key(home, "ann", "jobs", "predict"),
        new_key(home, "bob", "jobs", "predict"),
        new_key(home, "root", "admin"),
    )
    hers = owned(client, home, ann)
    document = client.get("/docs.json", headers=ann).json()
    addressed = [(method.upper(), path) for path, item in document["paths"].items() for method in item if "{" in path]
    assert len(addressed) >= 11
    bodies: dict[str, dict[str, Any]] = {
        "PUT": {"json": {"version": "1"}},
        "PATCH": {"json": {"visibility": "shared"}},
        "POST": {"content": picture()},
    }
    for method, template in addressed:
        path = template.format(**hers)
        missing = template.format(**ABSENT)
        own = next((body for end, body in OWN_BODIES.items() if path.endswith(end)), None)
        body = bodies.get(method, {}) if own is None else {"json": own}
        strange = client.request(method, path, headers=bob, **body)
        nothing = client.request(method, missing, headers=bob, **body)
        refusal = (
            (403, "forbidden") if path.startswith("/v1/runs/") else (404, "not_found")
        )  # runs of no owner are the operator's
        assert [(one.status_code, one.json()["code"]) for one in (strange, nothing)] == [refusal] * 2, path
    for path in ("/v1/files", JOBS, COMPARISONS):
        assert client.get(path, headers=bob).json()["data"] == []
        assert len(client.get(path, headers=ann).json()["data"]) == len(client.get(path, headers=admin).json()["data"]) == 1
    names = [[one["id"] for one in client.get("/v1/models", headers=key).json()["data"]] for key in (bob, ann, admin)]
    assert names == [["colours"], ["colours", "mine"], ["colours", "mine"]]
    assert client.post("/v1/models/mine/predict", content=picture(), headers=ann).status_code == 200


def test_a_job_that_ends_takes_over_nothing(client: TestClient, home: Path) -> None:
    ann, bob = new_key(home, "ann", "jobs", "predict"), new_key(home, "bob", "predict")
    owned(client, home, ann)
    until(lambda: client.post("/v1/models/mine/predict", content=picture(), headers=ann).status_code == 200)
    for key in (ann, bob):
        answer = client.post("/predict", content=picture(), headers=key)
        assert (answer.status_code, answer.json()["model"]) == (200, "colours")


def test_a_private_model_answers_and_is_named_to_nobody_else(tmp_path: Path) -> None:
    ann, bob, root = (
        new_key(tmp_path, "ann", "jobs", "predict"),
        new_key(tmp_path, "bob", "jobs", "predict"),
        new_key(tmp_path, "root", "admin"),
    )
    with in_process(tmp_path, wait=False) as client:
        owned(client, tmp_path, ann)  # the first model of an empty server: its default
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/predict", content=picture(), headers=ann).json()["model"] == "mine"
        told = [
            client.post("/predict", content=picture(), headers=bob),
            client.post("/v1/models/mine/predict", content=picture(), headers=bob),
            client.post("/v1/models/mines/predict", content=picture(), headers=bob),
            client.get("/v1/deployments/default", headers=bob),
            client.get("/v1/models", headers=bob),
            client.get("/metrics", headers=bob),
            client.get("/readyz"),
        ]
        assert [answer.status_code for answer in told] == [404, 404, 404, 200, 200, 403, 200]
        assert told[0].json()["detail"].startswith("This server has no default model that you may use")
        for position in (0, 2, 3, 4, 5, 6):
            assert '"mine"' not in told[position].text.replace("'", '"')
        shared = client.patch("/v1/models/mine", json={"visibility": "shared"}, headers=ann)
        assert (shared.status_code, shared.json()["visibility"]) == (200, "shared")
        assert client.post("/predict", content=picture(), headers=bob).json()["model"] == "mine"
        assert client.get("/readyz").json()["model"] == "mine"
        assert client.patch("/v1/models/mine", json={"visibility": "private"}, headers=bob).status_code == 403
        assert client.patch("/v1/models/mine", json={"visibility": "private"}, headers=root).status_code == 409  # the default


def test_a_model_that_does_not_exist_is_answered_as_another_owners_wherever_one_is_named(tmp_path: Path) -> None:
    registry = registered(tmp_path, write_bundle(tmp_path / "bundle", with_weights=True), "secret")
    registry.set_access("secret", Access(owner="ann", visibility="private"))
    bob = new_key(tmp_path, "bob", "jobs", "predict")
    with in_process(tmp_path, wait=False) as client:
        file_id = upload(client, bob)
        arms = {"methods": ["linear_probe", "full"]}

        def told(model: str) -> list[str]:
            asked = (
                client.post(JOBS, json={"training_file": file_id, "model": model}, headers=bob),
                client.post(f"/v1/files/{file_id}/check", json={"model": model}, headers=bob),
                client.post(COMPARISONS, json={"training_file": file_id, "model": model, **arms}, headers=bob),
                client.post(BATCHES, json={"input_file": file_id, "model": model}, headers=bob),
                client.post(f"/v1/models/{model}/predict", content=picture(), headers=bob),
                client.get(f"/v1/models/{model.replace('@', '/versions/')}", headers=bob),
                client.get(f"/v2/models/{model.replace('@', '/versions/')}", headers=bob),
            )
            assert [answer.status_code for answer in asked] == [422, 422, 422, 422, 404, 404, 404]
            documents = [answer.json() for answer in asked]
            return [(one.get("errors") or [one])[0].get("detail", one.get("error")) for one in documents]

        for model in ("secret@1", "nosuch@1", "secre@1", "secret@7"):
            name = model.partition("@")[0]
            for sentence in told(model):
                assert sentence == f"no model '{name}'; GET /v1/models lists those that you may use", model


def test_what_is_tried_beside_the_default_is_named_only_to_those_who_may_use_it(tmp_path: Path) -> None:
    registry = registered(tmp_path, write_bundle(tmp_path / "bundle"))
    registered(tmp_path, write_bundle(tmp_path / "hers"), "secret")
    deploy(registry, Deployment("colours", shadow=Share("secret@1", 10.0)))
    registry.set_access("secret", Access(owner="ann", visibility="private"))
    ann, bob = new_key(tmp_path, "ann", "predict"), new_key(tmp_path, "bob", "predict")
    with in_process(tmp_path) as client:
        shown = [client.get("/v1/deployments/default", headers=key).json() for key in (ann, bob)]
    assert [one["reference"] for one in shown] == ["colours", "colours"]
    assert shown[0]["shadow"] == {"reference": "secret@1", "percent": 10.0}
    assert shown[1]["shadow"] is None


def test_no_owner_takes_the_model_of_everybody_away_or_takes_its_place(tmp_path: Path) -> None:
    registry = registered(tmp_path, write_bundle(tmp_path / "bundle"))
    registered(tmp_path, write_bundle(tmp_path / "hers"), "hers")
    registry.set_access("hers", Access(owner="ann", visibility="shared"))
    deploy(registry, Deployment("colours", canary=Share("hers", 100.0)))
    ann, bob = (new_key(tmp_path, owner, "jobs", "predict") for owner in ("ann", "bob"))
    root = new_key(tmp_path, "root", "admin")
    with in_process(tmp_path) as client:

        def answering() -> str:
            answer = client.post("/predict", content=picture(), headers=bob)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["model"])

        assert answering() == "hers"
        refused = [
            client.patch("/v1/models/hers", json={"visibility": "private"}, headers=ann),
            client.delete("/v1/models/hers", headers=ann),
            client.delete("/v1/models/hers?force=true", headers=ann),
            client.delete("/v1/models/hers@1?force=true", headers=ann),
        ]
        assert [(answer.status_code, "the canary of the server's default" in answer.text) for answer in refused] == [
            (409, True)
        ] * 4
        registry.set_access("hers", Access(owner="ann", visibility="private"))  # from the shell of the server
        until(lambda: answering() == "colours")  # what may be used is remembered for a second
        assert client.delete("/v1/models/hers?force=true", headers=root).status_code == 200
        named = {"training_file": upload(client, bob), "suffix": "hers"}
        assert client.post(JOBS, json=named, headers=bob).status_code == 409
        assert answering() == "colours"


def test_another_owners_file_and_name_cannot_be_used(client: TestClient, home: Path) -> None:
    ann, bob = new_key(home, "ann", "jobs"), new_key(home, "bob", "jobs")
    hers = owned(client, home, ann)
    with_her_file = client.post(JOBS, json={"training_file": hers["file_id"]}, headers=bob)
    with_no_file = client.post(JOBS, json={"training_file": "file-x"}, headers=bob)
    told = [answer.json()["errors"][0]["detail"] for answer in (with_her_file, with_no_file)]
    assert told[0].replace(hers["file_id"], "file-x") == told[1]
    his = upload(client, bob)
    for name in ("mine", "colours"):
        taken = client.post(JOBS, json={"training_file": his, "suffix": name}, headers=bob)
        assert (taken.status_code, taken.json()["code"]) == (409, "conflict")
    assert client.post(JOBS, json={"training_file": his, "suffix": "his"}, headers=bob).status_code == 201
    again = client.post(JOBS, json={"training_file": hers["file_id"], "suffix": "mine"}, headers=ann)
    assert again.status_code == 201


def test_an_idempotency_key_belongs_to_its_owner(client: TestClient, home: Path) -> None:
    ann, bob = new_key(home, "ann", "jobs"), new_key(home, "bob", "jobs")
    made = [
        client.post(JOBS, json={"training_file": upload(client, key), "suffix": name}, headers={**key, "Idempotency-Key": "1"})
        for key, name in ((ann, "a"), (bob, "b"))
    ]
    assert [answer.status_code for answer in made] == [201, 201]
    assert made[0].json()["id"] != made[1].json()["id"]


# --- the real server ------------------------------------------------------------------------------


def test_a_server_with_a_key_may_listen_for_others_and_without_one_may_not(home: Path) -> None:
    key = new_key(home, "ann", "predict")
    with live_server(home, "--host", "0.0.0.0") as server:
        assert httpx.post(f"{server.url}/predict", content=picture(), timeout=END_SECONDS).status_code == 401
        assert httpx.post(f"{server.url}/predict", content=picture(), headers=key, timeout=END_SECONDS).status_code == 200
        log = server.log.read_text()
    _, key_id, secret = key["Authorization"].split("_", 2)  # the secret part may hold underscores of its own
    assert secret not in log
    KeyStore(open_jobs(home)).revoke(key_id)
    ran = subprocess.run(
        [sys.executable, "-m", "service", "--host", "0.0.0.0"],
        check=False, capture_output=True, text=True, timeout=240, env={**os.environ, "FINETUNE_HOME": str(home)},
    )  # fmt: skip
    assert ran.returncode == 2
    assert "no API key" in ran.stderr
