"""Starting the service for tests: inside this process, or as the real server process on a free port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from processes import children_of
from starlette.testclient import TestClient

from finetune.bundle.registry import Registry
from service.asgi import create_app
from service.settings import ServerSettings
from service.state import ServerState

URL = "http://127.0.0.1"
START_SECONDS = 240  # for a server to answer, on a machine that is busy
END_SECONDS = 240  # for a server that was told to stop: a bound for a hang, never a wait


@contextlib.contextmanager
def in_process(home: Path, *, wait: bool = True, **settings: object) -> Iterator[TestClient]:
    """A client of the whole application without a port. Waits until the default model is loaded."""
    app = create_app(ServerSettings(home, watch_seconds=0.02, threads=2, **settings))  # type: ignore[arg-type]
    with TestClient(app, base_url=URL) as client:
        if wait:
            until(lambda: client.get("/readyz").status_code == 200)
        yield client


def state_of(client: TestClient) -> ServerState:
    """The state of the server, inside the application's middleware."""
    app = client.app
    while not hasattr(app, "state"):
        app = app.app  # type: ignore[union-attr]
    return app.state.server  # type: ignore[union-attr]


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for a condition; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


@dataclass(frozen=True)
class LiveServer:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def home(self) -> Path:
        return self.log.parent

    def process_tree(self) -> list[int]:
        """The ids of the server process and of everything that it started, directly or not."""
        found = [self.process.pid]
        for pid in found:
            found += children_of(pid)
        return found


@contextlib.contextmanager
def live_server(
    home: Path,
    *arguments: str,
    worker: bool = False,
    ready: bool = True,
    port: int = 0,
    environment: dict[str, str] | None = None,
) -> Iterator[LiveServer]:
    """`python -m service` on a port that it finds free, ready (or at least answering); ended with SIGTERM."""
    log = home / "server.log"
    environment = {**os.environ, "FINETUNE_HOME": str(home), **(environment or {})}
    command = [sys.executable, "-m", "service", "--port", str(port), *([] if worker else ["--no-worker"]), *arguments]
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until(lambda: _port_of(process, log) is not None, START_SECONDS)
        url = f"{URL}:{_port_of(process, log)}"
        with httpx.Client(base_url=url) as client:
            until(lambda: _answers(client, process, "/readyz" if ready else "/livez"), START_SECONDS)
        yield LiveServer(url, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _port_of(process: subprocess.Popen[bytes], log: Path) -> int | None:
    """Return the port that a server says it listens on; None while it has not said so."""
    assert process.poll() is None, f"the server ended before it was ready:\n{log.read_text(errors='replace')[-2000:]}"
    return port_in(log)


def port_in(log: Path) -> int | None:
    """Return the port that is named in what a server has printed; None while there is none."""
    said = re.search(r"serves on http://\S+:(\d+) ", log.read_text(errors="replace"))
    return None if said is None else int(said[1])


def _answers(client: httpx.Client, process: subprocess.Popen[bytes], path: str) -> bool:
    assert process.poll() is None, "the server ended before it was ready"
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


def registered(home: Path, bundle: Path, name: str = "colours") -> Registry:
    """The workspace's registry with one version of the bundle in it."""
    registry = Registry(home / "models")
    registry.register(bundle, name)
    return registry
