"""Starting the service for tests: inside this process, or as the real server process on a free port."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from starlette.testclient import TestClient

from finetune.bundle.registry import Registry
from service.asgi import create_app
from service.settings import Settings

URL = "http://127.0.0.1"
PORTS = range(20_000, 32_000)  # below those that Linux gives to outgoing connections, so that none takes one meanwhile
START_SECONDS = STOP_SECONDS = 120.0  # as long as a very busy machine may take


@contextlib.contextmanager
def in_process(home: Path, *, wait: bool = True, **settings: object) -> Iterator[TestClient]:
    """A client of the whole application without a port. Waits until the default model is loaded."""
    app = create_app(Settings(home, watch_seconds=0.02, threads=2, **settings))  # type: ignore[arg-type]
    with TestClient(app, base_url=URL) as client:
        if wait:
            until(lambda: client.get("/readyz").status_code == 200)
        yield client


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
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

    def process_tree(self) -> list[int]:
        """The ids of the server process and of everything that it started, directly or not."""
        found = [self.process.pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        return found


@contextlib.contextmanager
def live_server(
    home: Path,
    *arguments: str,
    worker: bool = False,
    ready: bool = True,
    port: int | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[LiveServer]:
    """`python -m service` on a free port, ready (or at least answering); ended with SIGTERM, and surely ended."""
    port = port or free_port()
    log = home / "server.log"
    environment = {**os.environ, "FINETUNE_HOME": str(home), **(environment or {})}
    command = [sys.executable, "-m", "service", "--port", str(port), *([] if worker else ["--no-worker"]), *arguments]
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"{URL}:{port}"
        with httpx.Client(base_url=url) as client:
            until(lambda: _answers(client, process, "/readyz" if ready else "/livez"), START_SECONDS)
        yield LiveServer(url, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def free_port() -> int:
    """Return a port that nobody listens on, drawn at random, because other tests draw too."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", port))
            return port


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
