"""What the checks in this folder share: commands that are run to their end, and servers that run while they are asked."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

READY_SECONDS = 120
POINTING_BACK = ("PYTHONPATH", "FINETUNE_", "MLFLOW_", "BENTOML_")  # into the checkout, or into what its user has


def run(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    rights: Mapping[str, Any] | None = None,
    stderr_too: bool = False,
) -> str:
    """Run a command in a clean environment to its end and return its stdout; where it fails, end with all that it said.

    Args:
        environment: variables on top of the clean ones.
        rights: as whom to run it: ``user``, ``group`` and ``extra_groups`` of `subprocess.run`.
        stderr_too: return stderr among stdout.
    """
    ended = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if stderr_too else subprocess.PIPE,
        text=True,
        check=False,
        **(rights or {}),
    )
    if ended.returncode != 0:
        sys.exit(
            f"{Path(sys.argv[0]).name}: exit code {ended.returncode} of {shlex.join(command)}\n{ended.stdout}\n{ended.stderr}"
        )
    return ended.stdout


def clean_environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without what would point back into the checkout."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(POINTING_BACK)}
    return {**kept, "MLFLOW_DISABLE_TELEMETRY": "true", "BENTOML_DO_NOT_TRACK": "True", **more}


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def serving(
    command: Sequence[str],
    port: int,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    rights: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Run a server that listens on `port`, until the block ends; yield its address once it is ready."""
    url, log = f"http://127.0.0.1:{port}", cwd / "server.log"
    with open(log, "wb") as stream:
        server = subprocess.Popen(
            command,
            cwd=cwd,
            env=clean_environment(environment or {}),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            **(rights or {}),
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not answers(f"{url}/readyz"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    """Return whether a GET of `url` is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
