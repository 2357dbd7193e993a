"""Starting the server: the command line and the environment that `bentoml serve` needs, and becoming that process.

Knows addresses and BentoML's flags; does not know what is served.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from finetune.errors import InvalidInput
from finetune.jobs.database import DATABASE_VARIABLE, open_jobs
from finetune.jobs.keys import KeyStore
from finetune.rundir import workspace

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 3000
# Requests in flight get this long to finish after SIGTERM. BentoML's own default is a day: one open stream would block the exit.
GRACEFUL_SHUTDOWN_SECONDS = 10


def serve(host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, *, model: str | None = None, worker: bool = True) -> None:
    """Become the server process, which also runs a worker unless told otherwise; does not return.

    Raises:
        InvalidInput: `host` is not an address, or one that others can reach while there is no API key.
        StoreError: the job database cannot be used.
    """
    address = listen_address(host, has_api_key=has_api_key(workspace()))
    environment = server_environment(os.environ, address, model=model, worker=worker)
    os.execve(sys.executable, server_command(address, port), environment)


def has_api_key(home: Path) -> bool:
    """Whether this workspace's job database has a key that works. A workspace without a database has none."""
    if not os.environ.get(DATABASE_VARIABLE) and not (home / "jobs.db").exists():
        return False
    engine = open_jobs(home)
    try:
        return KeyStore(engine).any_usable()
    finally:
        engine.dispose()


def listen_address(host: str, *, has_api_key: bool) -> str:
    """`host` as an IP address that may be listened on."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise InvalidInput(f"--host {host}: an IP address to listen on is needed, such as 127.0.0.1") from None
    if not address.is_loopback and not has_api_key:
        raise InvalidInput(
            f"--host {host}: others could reach this address, and there is no API key that would keep strangers out. "
            "Make one with finetune keys create, or listen on 127.0.0.1 (the default)"
        )
    return str(address)


def server_command(address: str, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "bentoml", "serve", "service.app:Service"),
        *("--host", address, "--port", str(port)),
        *("--timeout-graceful-shutdown", str(GRACEFUL_SHUTDOWN_SECONDS)),
        *("--working-dir", str(Path(__file__).resolve().parents[1])),
    ]


def server_environment(inherited: Mapping[str, str], address: str, *, model: str | None, worker: bool = False) -> dict[str, str]:
    """`inherited` with what the server needs; what is set already stays, except the model that was asked for."""
    home = workspace()
    names = [*inherited.get("FINETUNE_ALLOWED_HOSTS", "").split(","), f"[{address}]" if ":" in address else address]
    defaults = {
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(home / "bentoml"),
        "OMP_NUM_THREADS": "1",
    }
    asked = {"FINETUNE_HOME": str(home), "FINETUNE_ALLOWED_HOSTS": ",".join(filter(None, names))}
    if worker:
        asked["FINETUNE_WORKER"] = "1"
    if model is not None:
        asked["FINETUNE_MODEL"] = str(Path(model).absolute()) if Path(model).is_dir() else model
    return {**defaults, **inherited, **asked}
