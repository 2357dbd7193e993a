"""The OpenAPI document is complete and true: what it says is what happens, also for requests that nobody sends on purpose."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from archives import photographs, zip_of
from serving import in_process, live_server, registered
from standin import write_bundle

from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore
from finetune.jobs.store import JobStore
from service.limits import HEALTH_CHECKS

SURFACE = {
    "/v1/files": {"get", "post"},
    "/v1/files/{file_id}": {"get", "delete"},
    "/v1/fine_tuning/jobs": {"get", "post"},
    "/v1/fine_tuning/jobs/{job_id}": {"get", "delete"},
    "/v1/fine_tuning/jobs/{job_id}/cancel": {"post"},
    "/v1/fine_tuning/jobs/{job_id}/events": {"get"},
    "/v1/fine_tuning/jobs/{job_id}/checkpoints": {"get"},
    "/v1/fine_tuning/jobs/{job_id}/logs": {"get"},
    "/v1/fine_tuning/comparisons": {"get", "post"},
    "/v1/fine_tuning/comparisons/{comparison_id}": {"get", "delete"},
    "/v1/fine_tuning/comparisons/{comparison_id}/cancel": {"post"},
    "/v1/fine_tuning/comparisons/{comparison_id}/events": {"get"},
    "/v1/fine_tuning/comparisons/{comparison_id}/logs": {"get"},
    "/v1/fine_tuning/comparisons/{comparison_id}/result": {"get"},
    "/v1/fine_tuning/comparisons/{comparison_id}/report": {"get"},
    "/v1/fine_tuning/comparisons/{comparison_id}/runs": {"get"},
    "/v1/fine_tuning/comparisons/{comparison_id}/runs/{run_name}": {"get"},
    "/v1/fine_tuning/comparisons/{comparison_id}/runs/{run_name}/report": {"get"},
    "/v1/batch_predictions": {"get", "post"},
    "/v1/batch_predictions/{batch_id}": {"get", "delete"},
    "/v1/batch_predictions/{batch_id}/cancel": {"post"},
    "/v1/batch_predictions/{batch_id}/events": {"get"},
    "/v1/batch_predictions/{batch_id}/logs": {"get"},
    "/v1/batch_predictions/{batch_id}/result": {"get"},
    "/v1/batch_predictions/{batch_id}/answers": {"get"},
    "/v1/models": {"get"},
    "/v1/models/{name}": {"get", "patch", "delete"},
    "/v1/models/{name}/aliases/{alias}": {"put"},
    "/v1/models/{name}/aliases/{alias}/rollback": {"post"},
    "/v1/deployments/default": {"get", "put"},
    "/v1/deployments/default/rollback": {"post"},
    "/v1/models/{name}/predict": {"post"},
    "/predict": {"post"},
    "/v1/models/{name}/versions/{version}": {"get"},
    "/v1/models/{name}/versions/{version}/drift": {"get"},
    "/v1/models/{name}/versions/{version}/drift/reference": {"put"},
    "/v1/models/{name}/versions/{version}/report": {"get"},
    "/v1/models/{name}/versions/{version}/bundle": {"get"},
    "/v1/models/{name}/versions/{version}/predictions": {"get"},
    "/v1/fine_tuning/jobs/{job_id}/result": {"get"},
    "/v1/fine_tuning/jobs/{job_id}/diagnosis": {"get"},
    "/v2": {"get"},
    "/v2/models/{name}": {"get"},
    "/v2/models/{name}/infer": {"post"},
    "/livez": {"get"},
    "/readyz": {"get"},
    "/metrics": {"get"},
}
# A schema cannot say which bytes are an archive, an image, or the id of a file that exists; what it says of the rest is checked.
NOT_SAYABLE = "positive_data_acceptance"
# Ids that exist, so that more than "not found" is seen. 503 is an answer: without a model left, a server is not ready.
CONFIG = """
[parameters]
"path.file_id" = "{file_id}"
"path.job_id" = "{job_id}"
"path.comparison_id" = "{comparison_id}"
"path.run_name" = "full-seed0"
"path.batch_id" = "{batch_id}"
"path.check_id" = "{check_id}"
"path.name" = "colours"
"path.version" = "1"
"path.alias" = "champion"
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "503"]
# POST …/cancel deletes an upload, of which this check knows DELETE alone.
[[operations]]
include-path = "/v1/uploads/{{upload_id}}"
checks.ensure_resource_availability.enabled = false
"""


def test_the_whole_surface_is_documented_and_says_what_is_open(tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False) as client:
        document = client.get("/docs.json").json()
    found = {path: set(item) for path, item in document["paths"].items()}
    assert found.items() >= SURFACE.items()
    assert document["security"] == [{"key": []}, {}]
    for path, item in document["paths"].items():
        for operation in item.values():
            assert (operation.get("security") == []) == (path in HEALTH_CHECKS)
            assert "4XX" in operation["responses"] or path in HEALTH_CHECKS
    for reference in re.findall(r'"\$ref": ?"#/components/schemas/([^"]+)"', str(document).replace("'", '"')):
        assert reference in document["components"]["schemas"]


def test_every_schema_has_a_name_of_its_own(tmp_path: Path) -> None:
    """Two models of one name get their module's before theirs, with which generators of clients cannot deal."""
    with in_process(tmp_path, wait=False) as client:
        names = client.get("/docs.json").json()["components"]["schemas"]
    assert not [name for name in names if "__" in name]


def test_a_method_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False) as client:
        answer = client.patch("/v1/files/file-x")
        assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET, HEAD")
        assert client.patch("/v1/fine_tuning/jobs").headers["allow"] == "GET, HEAD, POST"


@pytest.mark.slow
@pytest.mark.timeout(2500)
@pytest.mark.parametrize("closed", [False, True], ids=["open", "with a key"])
def test_two_thousand_generated_requests_find_no_fault(closed: bool, tmp_path: Path) -> None:
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    headers: dict[str, str] = {}
    if closed:
        secret, _ = KeyStore(open_jobs(tmp_path)).create("ann", ["predict", "jobs"])
        headers = {"Authorization": f"Bearer {secret}"}
    unchecked = [NOT_SAYABLE] if closed else [NOT_SAYABLE, "ignored_auth"]
    with live_server(tmp_path) as server, httpx.Client(base_url=server.url, headers=headers, timeout=240) as client:
        files = {"file": ("flowers.zip", zip_of(photographs()))}
        file_id = client.post("/v1/files", files=files, data={"purpose": "fine-tune"}).json()["id"]
        job_id = client.post("/v1/fine_tuning/jobs", json={"training_file": file_id}).json()["id"]
        comparison_id = client.post("/v1/fine_tuning/comparisons", json={"training_file": file_id}).json()["id"]
        batch_id = client.post("/v1/batch_predictions", json={"input_file": file_id}).json()["id"]
        check_id = client.post(f"/v1/files/{file_id}/check").json()["id"]
        store = JobStore(open_jobs(tmp_path))
        for _ in range(4):  # what a worker holds cannot be deleted, so the identifiers below mean something to the end
            assert store.claim("worker") is not None
        config = tmp_path / "schemathesis.toml"
        ids = {"file_id": file_id, "job_id": job_id, "comparison_id": comparison_id, "batch_id": batch_id}
        config.write_text(CONFIG.format(**ids, check_id=check_id))
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{server.url}/docs.json"),
                *(argument for name, value in headers.items() for argument in ("-H", f"{name}: {value}")),
                *("--exclude-checks", ",".join(unchecked), "--max-examples", "60", "--seed", "1", "--no-color"),
                *("--continue-on-failure", "--request-timeout", "20"),
            ],
            check=False, capture_output=True, text=True, cwd=tmp_path, timeout=2400,
        )  # fmt: skip
        log = server.log.read_text()
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-2000:]
    generated = re.search(r"(\d+) generated", ran.stdout)
    assert generated is not None
    assert int(generated[1]) >= 2000
    assert not re.search(r" 500 [\d.]+ ms", log)
