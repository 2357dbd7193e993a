"""Where MLflow keeps runs, and how to look at them: the tracking URI, the settings of its client, the command for its pages."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from finetune.distribution import install_command
from finetune.errors import InvalidInput, MissingExtra

# A request to a server that does not answer ends in about 20 s instead of minutes. MLflow reads these at each call.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}


@dataclass(frozen=True)
class Destination:
    """Where MLflow keeps runs. `artifact_root` is None when a tracking server decides that itself."""

    uri: str
    artifact_root: str | None
    database: Path | None = None  # our own SQLite file, which may have to be created

    @property
    def shown(self) -> str:
        """The URI without a password."""
        return without_credentials(self.uri)


def destination(workspace: Path) -> Destination:
    """``MLFLOW_TRACKING_URI``, else a SQLite file in the workspace. Always explicit: MLflow's own choice depends on the cwd."""
    artifact_root = (workspace.absolute() / "mlartifacts").as_uri()
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        database = workspace.absolute() / "mlflow.db"
        return Destination(f"sqlite:///{database}", artifact_root, database)
    if uri.startswith("file:") or ("://" not in uri and uri != "databricks"):
        raise InvalidInput(
            f"MLFLOW_TRACKING_URI={uri}: MLflow's file store is not supported (MLflow itself has retired it). "
            "Give sqlite:////absolute/path/mlflow.db, postgresql://… or http(s)://…, or leave it unset"
        )
    serves_artifacts = uri.startswith(("http://", "https://", "databricks"))
    return Destination(uri, None if serves_artifacts else artifact_root)


def without_credentials(text: str) -> str:
    return re.sub(r"://[^/@\s]+@", "://***@", text)


@dataclass(frozen=True)
class UiCommand:
    """The command that shows the workspace's MLflow pages, with the environment it needs on top of the present one."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    url: str


def open_ui(workspace: Path, host: str = "127.0.0.1", port: int = 5000) -> NoReturn:
    """Become MLflow's server: this process is replaced, so that Ctrl-C and signals go straight to it.

    Raises:
        MissingExtra: MLflow is not installed.
        InvalidInput: as `ui_command`.
    """
    command = ui_command(workspace, host, port)
    if importlib.util.find_spec("mlflow") is None:
        raise MissingExtra(f"MLflow is not installed here. Install it with the training extra: {install_command('train')}")
    os.execve(command.arguments[0], command.arguments, {**os.environ, **command.environment})


def ui_command(workspace: Path, host: str, port: int) -> UiCommand:
    """How to start MLflow's pages on the embedded database: one worker, no job executor, this machine only.

    Raises:
        InvalidInput: `host` is not a loopback address (these pages ask for no password), or MLflow already runs elsewhere.
    """
    target = destination(workspace)
    if target.artifact_root is None:
        raise InvalidInput(f"MLFLOW_TRACKING_URI={target.shown} is a server already: open that address in a browser")
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise InvalidInput(
            f"--host {host}: MLflow's pages ask for no password, so they are shown on this machine only (127.0.0.1). "
            "From elsewhere use an SSH tunnel, or run an MLflow server with authentication and set MLFLOW_TRACKING_URI"
        )
    names = ("localhost", "127.0.0.1", "[::1]")
    hosts = ",".join(allowed for name in names for allowed in (name, f"{name}:{port}"))
    options = {
        "--backend-store-uri": target.uri,
        "--default-artifact-root": target.artifact_root,
        "--host": host,
        "--port": str(port),
        "--workers": "1",
        "--allowed-hosts": hosts,
    }
    return UiCommand(
        arguments=(sys.executable, "-m", "mlflow", "server", *(word for option in options.items() for word in option)),
        environment={**ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        url=f"http://{f'[{host}]' if ':' in host else host}:{port}",
    )


def run_url(ui: str, experiment_id: str, run_id: str) -> str:
    """The page of one run under the MLflow pages at `ui`, in their mode for training rather than for language models."""
    return f"{ui.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}?workflowType=machine_learning"
