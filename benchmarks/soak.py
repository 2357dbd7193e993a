"""One real server under a moderate load of everything at once for a while: does its memory stay flat, and does it answer?

    python benchmarks/soak.py --minutes 15 --out soak.json --picture soak.png

Predictions, uploads (and their deletion), real fine-tuning jobs one after the other, lists, and readers of live events share one
`finetune serve` with its worker. Each job that ends registers a new version, which the server swaps to under load. Every few
seconds the resident memory of the server's processes is read from /proc; a line is fitted to what comes after the warm-up.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from job_chaos import write_pictures

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
    failures: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, status: int, said: str) -> None:
        with self._lock:
            self.answers[f"{what} {status}"] += 1
            if not 200 <= status < 300 and len(self.failures) < REMEMBERED_FAILURES:
                self.failures.append(f"{what} {status}: {said[:300]}")

    def not_2xx(self) -> int:
        return sum(count for what, count in self.answers.items() if not what.split()[-1].startswith("2"))


@dataclass(frozen=True)
class Client:
    """Asks one server, and counts."""

    http: httpx.Client
    tally: Tally

    def ask(self, what: str, method: str, path: str, **request: Any) -> httpx.Response | None:
        """The answer if it is a 2xx; `what` is what it is counted as. No answer at all counts as status 0."""
        try:
            answer = self.http.request(method, path, **request)
        except httpx.TransportError as error:
            self.tally.add(what, 0, repr(error))
            return None
        self.tally.add(what, answer.status_code, answer.text)
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
    """The lasting processes by what they are: server and worker. Training processes come and go, and are left out."""
    (worker,) = _children(server)
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
    design = np.stack([t, np.ones_like(t)], axis=1)
    solved, *_ = np.linalg.lstsq(design, y, rcond=None)
    left = y - design @ solved
    error = np.sqrt(left @ left / (len(t) - 2) / np.sum((t - t.mean()) ** 2))
    return {
        "mib_per_hour": round(float(solved[0]), 2),
        "standard_error": round(float(error), 2),
        "after_warm_up_mib": round(float(y[: len(y) // 5].mean()), 1),
        "at_the_end_mib": round(float(y[-len(y) // 5 :].mean()), 1),
        "highest_mib": round(float(np.max(mib)), 1),
    }


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


def soak(home: Path, minutes: float) -> tuple[dict[str, Any], dict[str, list[float]]]:
    pictures = home / "pictures"
    write_pictures(pictures)
    archive, picture = archive_of(pictures), next(pictures.rglob("*.png")).read_bytes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "FINETUNE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    with open(home / "server.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "finetune", "serve", "--port", str(port)], env=environment, stdout=log, stderr=log
        )
    tally = Tally()
    limits = httpx.Limits(max_connections=64)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as http:
            client = Client(http, tally)
            _until(lambda: _answers(http, server, "/livez"), 120)
            form = {"files": {"file": ("pictures.zip", archive)}, "data": {"purpose": "fine-tune"}}
            file_id = http.post("/v1/files", **form).raise_for_status().json()["id"]  # type: ignore[arg-type]
            http.post("/v1/fine_tuning/jobs", json={"training_file": file_id, **JOB}).raise_for_status()
            _until(lambda: _answers(http, server, "/readyz"), 300)  # the first model is there
            samples = _under_load(client, server.pid, archive, picture, file_id, 60 * minutes)
    finally:
        server.send_signal(signal.SIGTERM)
        exit_code = server.wait(60)
    report = {
        "minutes": minutes,
        "requests": tally.answers.total(),
        "not_2xx": tally.not_2xx(),
        "answers": dict(sorted(tally.answers.items())),
        "jobs": dict(tally.jobs),
        "failures": tally.failures,
        "memory": {name: slope(samples["seconds"], samples[name]) for name in samples if name != "seconds"},
        "server_exit_code": exit_code,
    }
    return report, samples


def _under_load(
    client: Client, server: int, archive: bytes, picture: bytes, file_id: str, seconds: float
) -> dict[str, list[float]]:
    stop = threading.Event()
    loads: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (predicts, (client, picture, stop)),
        (predicts, (client, picture, stop)),
        (uploads, (client, archive, stop)),
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
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path, help="draw the memory over time there (needs matplotlib)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        report, samples = soak(Path(folder), given.minutes)
    if given.out:
        given.out.write_text(json.dumps({**report, "samples": samples}, indent=2) + "\n")
    if given.picture:
        draw(samples, report, given.picture)
    print(f"{report['requests']} requests in {given.minutes:g} minutes, {report['not_2xx']} not answered with 2xx")
    print(f"jobs: {report['jobs']}")
    for what, count in report["answers"].items():
        print(f"  {what:32} {count:6}")
    for line in report["failures"]:
        print(f"  {line}")
    for name, found in report["memory"].items():
        print(
            f"{name:12} {found['after_warm_up_mib']:7.1f} → {found['at_the_end_mib']:7.1f} MiB,"
            f" {found['mib_per_hour']:+.2f} ± {found['standard_error']:.2f} MiB/h"
        )
    sys.exit(1 if report["not_2xx"] or report["server_exit_code"] else 0)


if __name__ == "__main__":
    main()
