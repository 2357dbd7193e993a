"""MLflow's tracking URI and artifact location, and the client for them."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finetune.distribution import install_command
from finetune.errors import InvalidInput, MissingExtra
from finetune.runtime.collector import importing
from finetune.storage.files import file_lock
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import without_credentials

URI_VARIABLE = "MLFLOW_TRACKING_URI"

# Requests to a server that does not respond fail after about 20 s instead of minutes. MLflow reads these at each call.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # a lock file in the current folder is unrelated to the model
}


@dataclass(frozen=True)
class Destination:
    """Where MLflow stores runs. `artifact_root` is None if a tracking server decides it."""

    uri: str
    artifact_root: str | None
    database: Path | None = None  # the workspace's own SQLite file, which may have to be created

    @property
    def shown(self) -> str:
        """The URI without a password."""
        return without_credentials(self.uri)


def destination_of(workspace: Workspace, uri: str | None = None) -> Destination:
    """Return where MLflow stores runs: at `uri`, else at ``MLFLOW_TRACKING_URI``, else in a SQLite file in the workspace.

    The location is always passed explicitly, because MLflow's default depends on the current folder.

    Raises:
        InvalidInput: the URI is of MLflow's deprecated file store.
    """
    uri = uri or os.environ.get(URI_VARIABLE)
    artifact_root = workspace.mlflow_artifacts.as_uri()
    if not uri:
        return Destination(f"sqlite:///{quote(str(workspace.mlflow_database))}", artifact_root, workspace.mlflow_database)
    if uri.startswith("file:") or ("://" not in uri and uri != "databricks"):
        raise InvalidInput(
            f"{URI_VARIABLE}={uri}: MLflow's file store is not supported (MLflow itself has retired it). "
            "Give sqlite:////absolute/path/mlflow.db, postgresql://… or http(s)://…, or leave it unset"
        )
    serves_artifacts = uri.startswith(("http://", "https://", "databricks"))
    return Destination(uri, None if serves_artifacts else artifact_root)


def connect(target: Destination) -> Any:
    """Return an ``mlflow.MlflowClient``.

    Without garbage collection, importing MLflow and its database layer takes one second of CPU time instead of two.

    Raises:
        MissingExtra: MLflow is not installed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):  # their important log messages are also raised as exceptions
        logging.getLogger(name).setLevel(logging.ERROR)
    with importing("mlflow"):
        return _connect(target)


def _connect(target: Destination) -> Any:
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise MissingExtra(f"MLflow is not installed ({error.name} is missing): {install_command('train')}") from None
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    if target.database is not None:
        _create_database(target.database, mlflow.MlflowClient)
    given = os.environ.get(URI_VARIABLE)
    mlflow.set_tracking_uri(target.uri)  # MLflow's model registry uses this global URI, not the client's
    mlflow.set_registry_uri(target.uri)
    if given is None:  # the call above has set it
        os.environ.pop(URI_VARIABLE, None)
    else:
        os.environ[URI_VARIABLE] = given
    client = mlflow.MlflowClient(tracking_uri=target.uri, registry_uri=target.uri)
    if target.database is not None:
        client.search_experiments(max_results=1)  # opens the database
        remove_misread_folder(target.database)
    return client


def remove_misread_folder(database: Path) -> None:
    """Remove the empty folder that MLflow creates beside a workspace whose path needs escaping in a URI.

    MLflow decodes the URI correctly when it opens the database, but uses it as a plain path when it creates the parent folder.
    """
    misread = Path(quote(str(database))).parent
    if misread != database.parent:
        with contextlib.suppress(OSError):
            os.removedirs(misread)


def _create_database(path: Path, client: Any) -> None:
    """Create MLflow's database under a temporary name and rename it: a kill during its migrations would corrupt it for good."""
    if path.exists():
        return
    with file_lock(path.with_name(f".{path.name}.lock")):  # of two simultaneous first runs, one creates it and the other finds it
        if path.exists():
            return
        unfinished = path.with_name(f".{path.name}.new")
        unfinished.unlink(missing_ok=True)
        client(tracking_uri=f"sqlite:///{quote(str(unfinished))}").search_experiments(max_results=1)
        remove_misread_folder(unfinished)
        os.replace(unfinished, path)
