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
from finetune.rundir import workspace

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 3000
# Requests in flight get this long to finish after SIGTERM. BentoML's own default is a day: one open stream would block the exit.
GRACEFUL_SHUTDOWN_SECONDS = 10


def serve(host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, *, model: str | None = None, has_api_key: bool = False) -> None:
    """Become the server process; does not return.

    Raises:
        InvalidInput: `host` is not an address, or one that others can reach while there is no API key.
    """
    address = listen_address(host, has_api_key=has_api_key)
    environment = server_environment(os.environ, address, model=model)
    os.execve(sys.executable, server_command(address, port), environment)


def listen_address(host: str, *, has_api_key: bool) -> str:
    """`host` as an IP address that may be listened on."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise InvalidInput(f"--host {host}: an IP address to listen on is needed, such as 127.0.0.1") from None
    if not address.is_loopback and not has_api_key:
        raise InvalidInput(
            f"--host {host}: others could reach this address, and there is no API key that would keep strangers out. "
            "Listen on 127.0.0.1 (the default) and put a proxy that authenticates in front"
        )
    return str(address)


def server_command(address: str, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "bentoml", "serve", "service.app:Service"),
        *("--host", address, "--port", str(port)),
        *("--timeout-graceful-shutdown", str(GRACEFUL_SHUTDOWN_SECONDS)),
        *("--working-dir", str(Path(__file__).resolve().parents[1])),
    ]


def server_environment(inherited: Mapping[str, str], address: str, *, model: str | None) -> dict[str, str]:
    """`inherited` with what the server needs; what is set already stays, except the model that was asked for."""
    home = workspace()
    names = [*inherited.get("FINETUNE_ALLOWED_HOSTS", "").split(","), f"[{address}]" if ":" in address else address]
    defaults = {
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(home / "bentoml"),
        "OMP_NUM_THREADS": "1",
    }
    asked = {"FINETUNE_HOME": str(home), "FINETUNE_ALLOWED_HOSTS": ",".join(filter(None, names))}
    if model is not None:
        asked["FINETUNE_MODEL"] = str(Path(model).absolute()) if Path(model).is_dir() else model
    return {**defaults, **inherited, **asked}
