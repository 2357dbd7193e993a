"""`finetune worker`, `finetune jobs` and `finetune keys` in a workspace, with stand-in training."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click import UsageError
from click.testing import CliRunner, Result
from job_standin import StandinExecutor, wait

from finetune.cli import cli
from finetune.cli.terminal import console
from finetune.errors import Conflict, InvalidInput, NotFound, SpecError
from finetune.jobs.client import LocalJobs

_FIGURE = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 40, "sd": 0.01}
COMPARED: dict[str, Any] = {
    "object": "comparison", "split": "test", "headline": "test/top1", "left_out": 0, "registered": "my-flowers@1",
    "arms": [
        {"name": name, "runs": ["a", "b"], "metrics": {"test/top1": _FIGURE}, "cost": {"train_seconds": 2.0}, "note": ""}
        for name in ("linear_probe", "full")
    ],
    "pairs": [{
        "a": "linear_probe", "b": "full", "metric": "test/top1", "difference": -0.1, "low": -0.2, "high": 0.0,
        "p_adjusted": 0.03, "smallest_detectable": None, "outcome": "better",
    }],
    "verdict": {"choose": "full", "outcome": "better", "sentence": "full is better."},
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("FINETUNE_SERVER", "FINETUNE_API_KEY", "FINETUNE_DATABASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    (tmp_path / "My Flowers").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def running_worker(home: Path) -> Iterator[None]:
    home.mkdir()
    script = Path(__file__).parents[1] / "job_standin.py"
    with open(home / "worker.log", "wb") as log:
        process = subprocess.Popen([sys.executable, script, home, "{}"], stdout=log, stderr=log)
    yield
    process.terminate()
    assert process.wait(60) == 0


def invoke(*arguments: str) -> Result:
    """Errors of the command are raised here; what people read goes to stderr, what programs read to stdout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "width", 200)
        return CliRunner().invoke(cli, arguments, catch_exceptions=False, standalone_mode=False)


def submit(*arguments: str, **behaviour: Any) -> Result:
    settings = [f"metadata.{key}='{json.dumps(value)}'" for key, value in behaviour.items()]
    given = [argument for setting in settings for argument in ("--set", setting)]
    return invoke("jobs", "submit", "--data", "My Flowers", *given, *arguments)


def queued(**behaviour: Any) -> str:
    return submit("--detach", **behaviour).stdout.strip()


def test_a_job_is_followed_to_its_success(running_worker: None) -> None:
    result = submit(steps=3)
    assert result.return_value is None
    assert result.exit_code == 0
    job_id = result.stdout.strip()
    assert f"job {job_id}" in result.stderr
    assert "3 steps, from 0" in result.stderr
    assert "standin@1" in result.stderr


def test_a_failed_jobs_error_is_shown_and_is_the_exit_code(running_worker: None) -> None:
    error = {"code": "invalid_data", "message": "no class folder", "problems": []}
    result = submit(steps=0, error=error, exit_code=2)
    assert result.exit_code == 1
    assert "invalid_data" in result.stderr
    assert "no class folder" in result.stderr


def test_a_job_that_is_cancelled_while_it_is_followed_exits_as_interrupted(running_worker: None, home: Path) -> None:
    client = LocalJobs(home)

    def cancel_when_it_runs() -> None:
        wait(lambda: [job for job in client.list(1) if job.state == "running"])
        client.cancel(client.list(1)[0].id)

    canceller = threading.Thread(target=cancel_when_it_runs)
    canceller.start()
    result = submit("--json", steps=100_000, step_seconds=0.02)
    canceller.join()
    assert result.exit_code == 130
    assert json.loads(result.stdout)["state"] == "cancelled"


def test_a_job_that_nobody_follows_is_only_queued(home: Path) -> None:
    result = submit("--detach", "--json", steps=1)
    job = json.loads(result.stdout)
    assert (result.exit_code, job["state"], job["method"]) == (0, "queued", "linear_probe")
    stored = LocalJobs(home).store.get(job["id"])
    assert stored.spec["training_file"] == str(home.parent / "My Flowers"), "a worker elsewhere finds it"
    assert (stored.owner, stored.suffix) == ("local", "my-flowers")


def test_the_same_idempotency_key_gives_the_same_job(home: Path) -> None:
    keyed = ("--detach", "--idempotency-key", "k")
    assert submit(*keyed).stdout == submit(*keyed).stdout
    with pytest.raises(InvalidInput, match="used before with another body"):
        submit(*keyed, "--seed", "1")


def test_mistakes_are_told_before_anything_is_queued(home: Path) -> None:
    with pytest.raises(InvalidInput, match="training_file: nowhere: no such file or folder"):
        submit("--detach", "--data", "nowhere")
    with pytest.raises(SpecError, match="method"):
        submit("--detach", "--method", "ful")
    assert LocalJobs(home).list(10) == []


def test_jobs_are_listed_newest_first(home: Path) -> None:
    assert "no job yet" in invoke("jobs", "list").stderr
    first, second = queued(), queued()
    listed = json.loads(invoke("jobs", "list", "--json").stdout)["jobs"]
    assert [job["id"] for job in listed] == [second, first]
    assert [job["id"] for job in json.loads(invoke("jobs", "list", "--limit", "1", "--json").stdout)["jobs"]] == [second]
    table = invoke("jobs", "list").stderr
    assert table.index(second) < table.index(first)
    assert "tf_efficientnet_lite0, linear_probe" in table


def test_a_job_is_shown_with_its_history(home: Path) -> None:
    job_id = queued()
    shown = invoke("jobs", "show", job_id).stderr
    assert "The job is queued." in shown
    assert "state" in shown
    assert json.loads(invoke("jobs", "show", job_id, "--json").stdout)["state"] == "queued"
    with pytest.raises(NotFound, match="no fine-tuning job 'ftjob-none'"):
        invoke("jobs", "show", "ftjob-none")


def test_a_queued_job_is_cancelled_and_following_it_says_so(home: Path) -> None:
    job_id = queued()
    assert "is cancelled" in invoke("jobs", "cancel", job_id).stderr
    assert json.loads(invoke("jobs", "cancel", job_id, "--json").stdout)["state"] == "cancelled"
    assert invoke("jobs", "show", job_id, "--follow").exit_code == 130


def test_a_finished_job_cannot_be_cancelled(home: Path) -> None:
    job_id = queued()
    client = LocalJobs(home)
    claim = client.store.claim("worker")
    assert claim is not None
    client.store.finish(claim, "failed", error_code="x", error_message="y")
    with pytest.raises(Conflict, match="already failed"):
        invoke("jobs", "cancel", job_id)


def test_a_comparison_that_is_queued_here_is_listed_followed_and_shown_with_its_verdict(home: Path) -> None:
    made = invoke("compare", "My Flowers", "--methods", "linear_probe,full", "--seeds", "2", "--detach")
    comparison_id = made.stdout.strip()
    assert comparison_id.startswith("ftcmp-")
    client = LocalJobs(home)
    stored = client.store.get(comparison_id)
    assert (stored.suffix, stored.spec["training_file"]) == ("my-flowers", str(home.parent / "My Flowers"))
    job_id = queued()
    (newest, older) = json.loads(invoke("jobs", "list", "--json").stdout)["jobs"]
    assert ([newest["id"], older["id"]], older["what"]) == ([job_id, comparison_id], "linear_probe, full")
    with pytest.raises(Conflict, match="only a job that has succeeded has a result"):
        client.result(comparison_id)
    claim = client.store.claim("worker")
    assert claim is not None
    result = {**COMPARED, "id": comparison_id, "report": str(home / "runs" / comparison_id / "report.html")}
    client.store.finish(claim, "succeeded", message="full is better.", result=result)
    assert json.loads(invoke("compare", comparison_id, "--json").stdout) == {**result, "mlflow_run_id": None}
    shown = invoke("compare", comparison_id).stderr
    for text in (
        "full is better.",
        "▸ full",
        "linear_probe − full",
        "full better",
        f"{comparison_id}/report.html",
        "my-flowers@1",
    ):
        assert text in shown, text


def test_a_comparison_in_the_queue_takes_no_places_and_a_cancelled_one_exits_as_interrupted(home: Path) -> None:
    with pytest.raises(UsageError, match="which is run by a worker"):
        invoke("compare", "My Flowers", "--detach", "--slots", "2")
    comparison_id = invoke("compare", "My Flowers", "--detach", "--json").stdout
    comparison_id = json.loads(comparison_id)["id"]
    invoke("jobs", "cancel", comparison_id)
    assert invoke("compare", comparison_id).exit_code == 130
    with pytest.raises(NotFound, match="ftcmp-none"):
        invoke("compare", "ftcmp-none")


def test_what_a_job_printed_is_printed(home: Path) -> None:
    job_id = queued()
    assert invoke("jobs", "logs", job_id).stdout == ""
    log = home / "runs" / job_id / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("first line\nlast line, torn")
    assert invoke("jobs", "logs", job_id).stdout == "first line\nlast line, torn"
    invoke("jobs", "cancel", job_id)
    assert invoke("jobs", "logs", job_id, "--follow").stdout == "first line\nlast line, torn"
    with pytest.raises(NotFound):
        invoke("jobs", "logs", "ftjob-none")


def test_a_worker_that_stops_when_idle_leaves_nothing_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.executors.local.LocalExecutor", StandinExecutor)
    jobs = [queued(steps=1) for _ in range(2)]
    invoke("worker", "--until-idle")
    assert [LocalJobs(home).get(job).state for job in jobs] == ["succeeded", "succeeded"]


def test_a_key_is_shown_once_and_listed_without_its_secret(home: Path) -> None:
    assert "no key yet" in invoke("keys", "list").stderr
    made = invoke("keys", "create", "ada", "--scope", "predict", "--days", "30")
    secret = made.stdout.strip()
    assert secret.startswith("ft_")
    key_id = secret.split("_")[1]
    listed = json.loads(invoke("keys", "list", "--json").stdout)["keys"]
    assert [(key["id"], key["owner"], key["scopes"]) for key in listed] == [(key_id, "ada", ["predict"])]
    assert listed[0]["expires_at"] - listed[0]["created_at"] == pytest.approx(30 * 86400)
    assert "valid until" in invoke("keys", "list").stderr
    assert secret not in invoke("keys", "list").stderr
    invoke("keys", "revoke", key_id)
    assert "revoked" in invoke("keys", "list").stderr
    with pytest.raises(NotFound):
        invoke("keys", "revoke", "nobody")


def test_a_key_document_has_the_secret_the_one_time(home: Path) -> None:
    made = json.loads(invoke("keys", "create", "ada", "--json").stdout)
    assert (made["owner"], made["scopes"], made["expires_at"]) == ("ada", ["jobs", "predict"], None)
    assert made["key"].startswith(f"ft_{made['id']}_")


def test_a_log_in_another_alphabet_is_printed_as_it_is(home: Path) -> None:
    job_id = queued()
    (home / "runs" / job_id).mkdir(parents=True)
    (home / "runs" / job_id / "log.txt").write_bytes("Blüten 花\n".encode())
    assert invoke("jobs", "logs", job_id).stdout_bytes == "Blüten 花\n".encode()
