"""One real server under a moderate load of everything at once for a while: does its memory stay flat, and does it answer?

    python benchmarks/soak.py --minutes 30 --out soak.json --picture soak.png

These share one `finetune serve` with its worker: single predictions, batches, the Open Inference Protocol, uploads in one piece
and in parts, real fine-tuning jobs one after the other, batch predictions and data checks in the queue, promotions with canary
and shadow, pages of models and jobs, plans, damaged requests, readers of live events, webhooks, and samples of the inputs. Each
job that ends registers a new version. Every few seconds the resident memory of the server's processes is read from /proc. A line
is fitted to what comes after the warm-up, and one to the least of each minute: the server returns freed memory every few seconds,
and what a leak would add is what remains. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from job_chaos import write_pictures
from numpy.typing import NDArray

WARM_UP_FRACTION = 0.25
SAMPLE_SECONDS = 5.0
READERS = 4
REMEMBERED_FAILURES = 20
JOB = {
    "suffix": "soak",
    "model": {"backbone": "test_resnet", "weights": "none", "input_size_px": 64},
    "method": {"type": "full", "bn": "train"},
    "hyperparameters": {"n_epochs": 3, "batch_size": 6},
    "compute": {"device": "cpu", "precision": "float32", "threads": 1},
}


@dataclass
class Tally:
    """What was asked and how it was answered."""

    answers: Counter[str] = field(default_factory=Counter)  # "POST predict 200"
    jobs: Counter[str] = field(default_factory=Counter)  # by how they ended
    n_failures: int = 0
    failures: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, status: int, said: str, expected: Sequence[int] = ()) -> None:
        with self._lock:
            self.answers[f"{what} {status}"] += 1
            if status not in expected and not (200 <= status < 300 and not expected):
                self.n_failures += 1
                if len(self.failures) < REMEMBERED_FAILURES:
                    self.failures.append(f"{what} {status}: {said[:300]}")


@dataclass(frozen=True)
class Client:
    """Asks one server, and counts."""

    http: httpx.Client
    tally: Tally

    def ask(self, what: str, method: str, path: str, expected: Sequence[int] = (), **request: Any) -> httpx.Response | None:
        """The answer if it is a 2xx; `what` is what it is counted as. No answer at all counts as status 0.

        Args:
            expected: statuses that are right; by default all of success.
        """
        try:
            answer = self.http.request(method, path, **request)
        except httpx.TransportError as error:
            self.tally.add(what, 0, repr(error))
            return None
        self.tally.add(what, answer.status_code, "" if answer.is_success else answer.text, expected)
        return answer if answer.is_success else None


def archive_of(folder: Path) -> bytes:
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return packed.getvalue()


# ── what the clients do ───────────────────────────────────────────────────────────────────────────


def predicts(client: Client, picture: bytes, stop: threading.Event) -> None:
    number = 0
    while not stop.wait(0.25):
        number += 1
        where = "/predict" if number % 2 else "/v1/models/soak/predict"
        client.ask("POST predict", "POST", where, params={"explain": str(number % 5 == 0).lower()}, content=picture)


def uploads(client: Client, archive: bytes, stop: threading.Event) -> None:
    form = {"purpose": "fine-tune"}
    while not stop.wait(3.0):
        answer = client.ask("POST files", "POST", "/v1/files", files={"file": ("soak.zip", archive)}, data=form)
        if answer is not None:
            client.ask("DELETE file", "DELETE", f"/v1/files/{answer.json()['id']}")


def batches(client: Client, picture: bytes, stop: threading.Event) -> None:
    files = [("images", ("a.png", picture))] * 24
    packed = b"".join(struct.pack("<I", len(picture)) + picture for _ in range(8))
    tensor = {"name": "images", "datatype": "BYTES", "shape": [8], "parameters": {"binary_data_size": len(packed)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    lengths = {"Inference-Header-Content-Length": str(len(head))}
    while not stop.wait(2.0):
        client.ask("POST predict, 24 images", "POST", "/predict", files=files)
        client.ask("POST infer, 8 images", "POST", "/v2/models/soak/infer", content=head + packed, headers=lengths)


def uploads_in_parts(client: Client, archive: bytes, stop: threading.Event) -> None:
    pieces = [archive[: len(archive) // 2], archive[len(archive) // 2 :]]
    wanted = {"filename": "soak.zip", "purpose": "batch", "bytes": len(archive)}
    while not stop.wait(7.0):
        begun = client.ask("POST upload", "POST", "/v1/uploads", json=wanted)
        if begun is None:
            continue
        path = f"/v1/uploads/{begun.json()['id']}"
        parts = [
            client.ask("POST part", "POST", f"{path}/parts", files={"data": ("part", piece)}, data={"part_number": number})
            for number, piece in enumerate(pieces, start=1)
        ]
        ids = [part.json()["id"] for part in parts if part is not None]
        done = client.ask("POST upload complete", "POST", f"{path}/complete", json={"part_ids": ids})
        if done is not None:
            client.ask("DELETE file", "DELETE", f"/v1/files/{done.json()['file']['id']}")


def promotes(client: Client, stop: threading.Event) -> None:
    """Swap the champion between the two newest versions, with and without a canary and a shadow."""
    for number in itertools.count():
        if stop.wait(6.0):
            return
        model = client.ask("GET model", "GET", "/v1/models/soak")
        if model is None:
            continue
        newest = [one["version"] for one in model.json()["versions"]][:2]
        body = {"version": newest[number % len(newest)], "force": True}
        client.ask("PUT alias", "PUT", "/v1/models/soak/aliases/champion", json=body)
        shares = {kind: {"reference": "soak@latest", "percent": 20.0} for kind in ("canary", "shadow")} if number % 2 else {}
        wanted = {"reference": "soak@champion", "force": True, **shares}
        client.ask("PUT deployment", "PUT", "/v1/deployments/default", json=wanted)


def queues(client: Client, file_id: str, stop: threading.Event) -> None:
    """Batch predictions and data checks, one after the other, each read and deleted."""
    requests: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
        ("/v1/batch_predictions", "/v1/batch_predictions", {"input_file": file_id, "model": "soak"}, ("result", "answers")),
        (f"/v1/files/{file_id}/check", "/v1/checks", {"model": JOB["model"]}, ("result", "report")),
    ]
    for where, path, body, results in itertools.cycle(requests):
        if stop.wait(5.0):
            return
        created = client.ask(f"POST {path}", "POST", where, json=body)
        if created is None:
            continue
        place = f"{path}/{created.json()['id']}"
        ended = False
        while not ended and not stop.wait(1.0):
            job = client.ask(f"GET {path}", "GET", place)
            ended = job is not None and job.json()["finished_at"] is not None
            if ended and job is not None:
                client.tally.jobs[f"{path} {job.json()['status']}"] += 1
                for name in results if job.json()["status"] == "succeeded" else ():
                    client.ask(f"GET {path} {name}", "GET", f"{place}/{name}")
                client.ask(f"DELETE {path}", "DELETE", place)


def looks(client: Client, file_id: str, job_id: str, stop: threading.Event) -> None:
    """What the page and an operator look at."""
    job, version = f"/v1/fine_tuning/jobs/{job_id}", "/v1/models/soak/versions/latest"
    paths = [
        *(f"{job}/{name}" for name in ("result", "diagnosis", "metrics", "logs", "checkpoints", "events", "answers?split=val")),
        *(f"{version}{name}" for name in ("", "/card", "/report", "/bundle", "/predictions?format=csv", "/drift")),
        *(f"/v1/files/{file_id}{name}" for name in ("", "/images", "/image?id=class0/0.png&side_px=64")),
        *(
            "/v1/deployments/default",
            "/v1/deployments/default/history",
            "/v1/webhooks",
            "/v1/uploads",
            "/v1/caller",
            "/v2/models/soak",
        ),
    ]
    plan = {"methods": ["linear_probe", "full"], "images": 100, "model": JOB["model"]}
    for path in itertools.cycle(paths):
        if stop.wait(0.7):
            return
        client.ask("GET looks", "GET", path)
        if path == paths[0]:
            client.ask("POST plan", "POST", "/v1/fine_tuning/plans", json=plan)


def breaks(client: Client, picture: bytes, stop: threading.Event) -> None:
    """Requests that are wrong, each of which has its own answer."""
    form = {"purpose": "fine-tune"}
    while not stop.wait(3.0):
        client.ask("POST predict, damaged", "POST", "/predict", (400, 415, 422), content=picture[:100] + bytes(50))
        client.ask("POST predict, of no model", "POST", "/v1/models/nobody/predict", (404,), content=picture)
        client.ask("POST job, wrong", "POST", "/v1/fine_tuning/jobs", (422,), json={"training_file": "file-x", "seed": "1"})
        client.ask("POST files, no archive", "POST", "/v1/files", (422,), files={"file": ("a.zip", b"PK" * 99)}, data=form)


def submits(client: Client, file_id: str, stop: threading.Event) -> None:
    """One job after the other, each looked at until it has ended."""
    while not stop.is_set():
        created = client.ask("POST job", "POST", "/v1/fine_tuning/jobs", json={"training_file": file_id, **JOB})
        ended = created is None
        while not ended and not stop.wait(1.0):
            assert created is not None
            job = client.ask("GET job", "GET", f"/v1/fine_tuning/jobs/{created.json()['id']}")
            ended = job is not None and job.json()["finished_at"] is not None
            if ended and job is not None:
                client.tally.jobs[job.json()["status"]] += 1
        stop.wait(2.0)


def lists(client: Client, stop: threading.Event) -> None:
    paths = ("/v1/fine_tuning/jobs", "/v1/files", "/v1/models", "/metrics", "/readyz", "/docs.json", "/")
    number = 0
    while not stop.wait(0.5):
        client.ask("GET lists", "GET", paths[number % len(paths)])
        number += 1


def follows(client: Client, stop: threading.Event) -> None:
    """Read the events of the newest job to their end, again and again."""
    while not stop.wait(1.0):
        answer = client.ask("GET lists", "GET", "/v1/fine_tuning/jobs?limit=1")
        for job in [] if answer is None else answer.json()["data"]:
            path = f"/v1/fine_tuning/jobs/{job['id']}/events"
            try:
                with client.http.stream("GET", path, headers={"Accept": "text/event-stream"}, timeout=60) as stream:
                    for _ in stream.iter_lines():
                        if stop.is_set():
                            return
                client.tally.add("GET events as a stream", stream.status_code, "")
            except httpx.TransportError as error:
                client.tally.add("GET events as a stream", 0, repr(error))


# ── what is measured ──────────────────────────────────────────────────────────────────────────────


def processes_of(server: int) -> dict[str, int]:
    """The lasting processes by what they are: server and worker. Others come and go, and are left out."""
    (worker,) = [pid for pid in _children(server) if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return {"server": server, "worker": worker}


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def resident_mib(pid: int) -> float:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024


def slope(seconds: list[float], mib: list[float]) -> dict[str, float]:
    """A line through what comes after the warm-up, with the standard error of its slope if samples were independent."""
    t, y = np.asarray(seconds) / 3600, np.asarray(mib)
    kept = t >= WARM_UP_FRACTION * t[-1]
    t, y = t[kept], y[kept]
    minutes = np.floor(60 * t)
    least = np.array([np.flatnonzero(minutes == minute)[y[minutes == minute].argmin()] for minute in np.unique(minutes)])
    line, of_least = _line(t, y), _line(t[least], y[least])
    return {
        "mib_per_hour": line[0],
        "standard_error": line[1],
        "least_of_minutes_mib_per_hour": of_least[0],
        "least_of_minutes_standard_error": of_least[1],
        "after_warm_up_mib": round(float(y[: len(y) // 5].mean()), 1),
        "at_the_end_mib": round(float(y[-len(y) // 5 :].mean()), 1),
        "highest_mib": round(float(np.max(mib)), 1),
    }


def _line(t: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """The slope of a fitted line, and its standard error; not a number for fewer than three points."""
    if len(t) < 3:
        return float("nan"), float("nan")
    design = np.stack([t, np.ones_like(t)], axis=1)
    solved, *_ = np.linalg.lstsq(design, y, rcond=None)
    left = y - design @ solved
    error = np.sqrt(left @ left / (len(t) - 2) / np.sum((t - t.mean()) ** 2))
    return round(float(solved[0]), 2), round(float(error), 2)


def draw(samples: dict[str, list[float]], report: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    minutes = np.asarray(samples["seconds"]) / 60
    for name in sorted(samples.keys() - {"seconds"}):
        axes.plot(minutes, samples[name], label=f"{name} ({report['memory'][name]['mib_per_hour']:+.1f} MiB/h)")
    axes.axvline(WARM_UP_FRACTION * minutes[-1], color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120)


@contextmanager
def receiver() -> Iterator[tuple[str, Counter[str]]]:
    """A receiver of webhooks: its address, and how many events of each type have come."""
    received: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received[json.loads(self.rfile.read(int(self.headers["content-length"])))["type"]] += 1
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/hooks", received
        server.shutdown()


def soak(home: Path, minutes: float) -> tuple[dict[str, Any], dict[str, list[float]]]:
    pictures = home / "pictures"
    write_pictures(pictures)
    archive, picture = archive_of(pictures), next(pictures.rglob("*.png")).read_bytes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "FINETUNE_HOME": str(home), "OMP_NUM_THREADS": "1", "FINETUNE_SAMPLE_INPUTS": "0.1"}
    environment["FINETUNE_WEBHOOK_NETWORKS"] = "127.0.0.0/8"
    with open(home / "server.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "finetune", "serve", "--port", str(port)], env=environment, stdout=log, stderr=log
        )
    tally = Tally()
    limits = httpx.Limits(max_connections=64)
    try:
        with (
            receiver() as (hook, received),
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=limits) as http,
        ):
            client = Client(http, tally)
            _until(lambda: _answers(http, server, "/livez"), 600)
            form = {"files": {"file": ("pictures.zip", archive)}, "data": {"purpose": "fine-tune"}}
            file_id = http.post("/v1/files", **form).raise_for_status().json()["id"]  # type: ignore[arg-type]
            http.post("/v1/webhooks", json={"url": hook}).raise_for_status()
            job = http.post("/v1/fine_tuning/jobs", json={"training_file": file_id, **JOB}).raise_for_status().json()["id"]
            _until(lambda: _answers(http, server, "/readyz"), 600)  # the first model is there
            _until(lambda: http.get(f"/v1/fine_tuning/jobs/{job}").json()["finished_at"] is not None, 600)
            plan = {"methods": ["full"], "model": JOB["model"]}
            http.post("/v1/fine_tuning/plans", json=plan, timeout=600).raise_for_status()  # measured once
            samples = _under_load(client, server.pid, archive, picture, file_id, job, 60 * minutes)
    finally:
        server.send_signal(signal.SIGTERM)
        exit_code = server.wait(300)
    report = {
        "minutes": minutes,
        "requests": tally.answers.total(),
        "failures": tally.n_failures,
        "answers": dict(sorted(tally.answers.items())),
        "jobs": dict(tally.jobs),
        "webhooks": dict(received),
        "first_failures": tally.failures,
        "memory": {name: slope(samples["seconds"], samples[name]) for name in samples if name != "seconds"},
        "server_exit_code": exit_code,
    }
    return report, samples


def _under_load(
    client: Client, server: int, archive: bytes, picture: bytes, file_id: str, job_id: str, seconds: float
) -> dict[str, list[float]]:
    stop = threading.Event()
    loads: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (predicts, (client, picture, stop)),
        (predicts, (client, picture, stop)),
        (batches, (client, picture, stop)),
        (uploads, (client, archive, stop)),
        (uploads_in_parts, (client, archive, stop)),
        (promotes, (client, stop)),
        (queues, (client, file_id, stop)),
        (looks, (client, file_id, job_id, stop)),
        (breaks, (client, picture, stop)),
        (submits, (client, file_id, stop)),
        (lists, (client, stop)),
        *[(follows, (client, stop))] * READERS,
    ]
    threads = [threading.Thread(target=load, args=arguments) for load, arguments in loads]
    for thread in threads:
        thread.start()
    processes = processes_of(server)
    samples: dict[str, list[float]] = {"seconds": [], **{name: [] for name in processes}}
    began = time.monotonic()
    try:
        while (at := time.monotonic() - began) < seconds:
            samples["seconds"].append(round(at, 1))
            for name, pid in processes.items():
                samples[name].append(round(resident_mib(pid), 2))
            if len(samples["seconds"]) % 24 == 1:
                print(f"{at:6.0f} s  " + "  ".join(f"{name} {samples[name][-1]:.0f} MiB" for name in processes), flush=True)
            time.sleep(SAMPLE_SECONDS)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return samples


def _answers(http: httpx.Client, server: subprocess.Popen[bytes], path: str) -> bool:
    assert server.poll() is None, "the server ended"
    try:
        return http.get(path).status_code == 200
    except httpx.TransportError:
        return False


def _until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "the server did not become ready"
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path, help="draw the memory over time there (needs matplotlib)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        report, samples = soak(Path(folder), given.minutes)
    if given.out:
        given.out.write_text(json.dumps({**report, "samples": samples}, indent=2) + "\n")
    if given.picture:
        draw(samples, report, given.picture)
    print(f"{report['requests']} requests in {given.minutes:g} minutes, {report['failures']} not answered as they should be")
    print(f"jobs: {report['jobs']}\nwebhooks: {report['webhooks']}")
    for what, count in report["answers"].items():
        print(f"  {what:32} {count:6}")
    for line in report["first_failures"]:
        print(f"  {line}")
    for name, found in report["memory"].items():
        print(
            f"{name:12} {found['after_warm_up_mib']:7.1f} → {found['at_the_end_mib']:7.1f} MiB,"
            f" {found['mib_per_hour']:+.2f} ± {found['standard_error']:.2f} MiB/h, the least of each minute"
            f" {found['least_of_minutes_mib_per_hour']:+.2f} ± {found['least_of_minutes_standard_error']:.2f}"
        )
    sys.exit(1 if report["failures"] or report["server_exit_code"] else 0)


if __name__ == "__main__":
    main()
