"""Where MLflow keeps runs and models, and the client that talks to it."""

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
from finetune.storage.files import file_lock
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import without_credentials

URI_VARIABLE = "MLFLOW_TRACKING_URI"

# A request to a server that does not answer ends in about 20 s instead of minutes. MLflow reads these at each call.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # a lock file in the current folder has nothing to do with a model
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


def destination_of(workspace: Workspace, uri: str | None = None) -> Destination:
    """Return where MLflow keeps runs: `uri`, else ``MLFLOW_TRACKING_URI``, else a SQLite file in the workspace.

    It is always said explicitly, because MLflow's own choice depends on the current folder.

    Raises:
        InvalidInput: the URI is of MLflow's retired file store.
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
    """Return an ``mlflow.MlflowClient``. Importing it takes a second or two, a first database three more.

    Raises:
        MissingExtra: MLflow is not installed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):  # what matters of what they say is raised as well
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise MissingExtra(f"MLflow is not installed ({error.name} is missing): {install_command('train')}") from None
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    if target.database is not None:
        _create_database(target.database, mlflow.MlflowClient)
    given = os.environ.get(URI_VARIABLE)
    mlflow.set_tracking_uri(target.uri)  # its registry looks models up there, whatever the client was given
    mlflow.set_registry_uri(target.uri)
    if given is None:  # which the call above has set
        os.environ.pop(URI_VARIABLE, None)
    else:
        os.environ[URI_VARIABLE] = given
    client = mlflow.MlflowClient(tracking_uri=target.uri, registry_uri=target.uri)
    if target.database is not None:
        client.search_experiments(max_results=1)  # opens the database
        remove_misread_folder(target.database)
    return client


def remove_misread_folder(database: Path) -> None:
    """Remove the empty folder that MLflow makes beside a workspace whose path has to be escaped in a URI.

    It reads the URI rightly when it opens the database, and takes it for a plain path when it makes the folder for it.
    """
    misread = Path(quote(str(database))).parent
    if misread != database.parent:
        with contextlib.suppress(OSError):
            os.removedirs(misread)


def _create_database(path: Path, client: Any) -> None:
    """Make MLflow's tables under a temporary name, then rename: a kill amid its migrations would spoil the file for good."""
    if path.exists():
        return
    with file_lock(path.with_name(f".{path.name}.lock")):  # two first runs at once: one builds, the other finds it built
        if path.exists():
            return
        unfinished = path.with_name(f".{path.name}.new")
        unfinished.unlink(missing_ok=True)
        client(tracking_uri=f"sqlite:///{quote(str(unfinished))}").search_experiments(max_results=1)
        remove_misread_folder(unfinished)
        os.replace(unfinished, path)
