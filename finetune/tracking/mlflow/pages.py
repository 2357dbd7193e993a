"""MLflow's pages in a browser: run its server for the workspace's own database, and build links to a run or comparison.

Links select MLflow's view for model training; its default is a view for language models. MLflow is not imported here: its server
is a separate process that is queried over HTTP.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import httpx

from finetune.distribution import install_command
from finetune.errors import FinetuneError, InvalidInput, MissingExtra, NotFound
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import without_credentials
from finetune.tracking.mlflow.connection import ENVIRONMENT, Destination, destination_of, remove_misread_folder
from finetune.tracking.mlflow.views import EXPERIMENT_VIEW, VIEW_TAG

TRAINING_VIEW = {"workflowType": "machine_learning"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
START_SECONDS = 120.0


class ServerFailed(FinetuneError):
    """MLflow's server did not start or does not respond."""

    code = "mlflow_server_failed"


@dataclass(frozen=True)
class ServerCommand:
    """The command that runs MLflow's server, with environment variables to add to the present ones."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    url: str


@dataclass(frozen=True)
class Link:
    """A page and its title."""

    title: str
    url: str


def show_pages(
    workspace: Workspace, run_id: str | None, host: str, port: int, tell: Callable[[Link], object], *, browse: bool
) -> None:
    """Serve MLflow's pages until interrupted and open them; if a remote tracking server is used, only open its pages.

    Args:
        run_id: MLflow's id of the run or comparison to open; None opens the experiments.
        tell: called with every link, first with the one that is opened.
        browse: open a browser, if this machine has one.

    Raises:
        MissingExtra: MLflow is not installed.
        InvalidInput: as `server_command` raises it.
        ServerFailed: the server does not start.
        NotFound: the server at this address does not know the run.
    """
    target = destination_of(workspace)
    with contextlib.ExitStack() as stack:
        server = None
        if target.artifact_root is None:
            url = target.uri.rstrip("/")
        else:
            command = server_command(target, host, port)
            url = command.url
            if not is_healthy(url):
                _refuse_taken_port(host, port)
                server = stack.enter_context(_running(command))
                _wait_until_healthy(server, url)
                if target.database is not None:
                    remove_misread_folder(target.database)
        links = links_to(url, run_id)
        for link in links:
            tell(link)
        if browse and _has_browser():
            webbrowser.open(links[0].url)
        if server is not None:
            server.wait()


def server_command(target: Destination, host: str, port: int) -> ServerCommand:
    """Return the command for MLflow's server on a database: one worker, no job executor, reachable from this machine only.

    Raises:
        MissingExtra: MLflow is not installed.
        InvalidInput: `host` is not a loopback address: these pages ask for no password.
    """
    if host not in LOOPBACK:
        raise InvalidInput(
            f"--host {host}: MLflow's pages ask for no password, so they are shown on this machine only (127.0.0.1). "
            "From elsewhere use an SSH tunnel, or run an MLflow server with authentication and set MLFLOW_TRACKING_URI"
        )
    if importlib.util.find_spec("mlflow") is None:
        raise MissingExtra(f"MLflow is not installed here. Install it with the training extra: {install_command('train')}")
    names = ("localhost", "127.0.0.1", "[::1]")
    options = {
        "--backend-store-uri": target.uri,
        "--default-artifact-root": str(target.artifact_root),
        "--host": host,
        "--port": str(port),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
        "--allowed-hosts": ",".join(allowed for name in names for allowed in (name, f"{name}:{port}")),
    }
    return ServerCommand(
        arguments=(sys.executable, "-m", "mlflow", "server", *(word for option in options.items() for word in option)),
        environment={**ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        url=f"http://{f'[{host}]' if ':' in host else host}:{port}",
    )


def links_to(url: str, run_id: str | None) -> list[Link]:
    """Return links to the pages of a run, or of all experiments, on the MLflow server at `url`; the most useful first.

    Raises:
        NotFound: the server does not know the run.
    """
    if run_id is None:
        return [_link_to_experiments(url)]
    answer = _ask(url, "runs/get", run_id=run_id)
    if answer.status_code != 200:
        raise NotFound(
            f"the MLflow at {without_credentials(url)} has no run {run_id}: it shows another database. Give another --port, "
            "or see what is missing with finetune mlflow sync"
        )
    experiment_id = str(answer.json()["run"]["info"]["experiment_id"])
    page = Link("the run", f"{_page(url, experiment_id)}/runs/{quote(run_id)}?{urlencode(TRAINING_VIEW)}")
    if f"{VIEW_TAG}{run_id}" not in _experiment_tags(url, experiment_id):
        return [page]
    of_runs = {"viewStateShareKey": run_id, **TRAINING_VIEW}
    charts = Link("its runs as charts", f"{_page(url, experiment_id)}/runs?{urlencode({**of_runs, 'compareRunsMode': 'CHART'})}")
    table = Link("its runs as a table", f"{_page(url, experiment_id)}/runs?{urlencode(of_runs)}")
    return [charts, table, page]


def _link_to_experiments(url: str) -> Link:
    """Return a link to the only experiment besides MLflow's default one, or to the list of all experiments."""
    found = _ask(url, "experiments/search", max_results="1000").json().get("experiments", [])
    own = [experiment for experiment in found if experiment["name"] != "Default"]
    if len(own) != 1:
        return Link("all experiments", f"{url}/#/experiments?{urlencode(TRAINING_VIEW)}")
    experiment_id = str(own[0]["experiment_id"])
    has_view = f"{VIEW_TAG}{EXPERIMENT_VIEW}" in _experiment_tags(url, experiment_id)
    view = {"viewStateShareKey": EXPERIMENT_VIEW} if has_view else {}
    return Link(f"the runs on {own[0]['name']}", f"{_page(url, experiment_id)}/runs?{urlencode({**view, **TRAINING_VIEW})}")


def _page(url: str, experiment_id: str) -> str:
    return f"{url}/#/experiments/{quote(experiment_id)}"


def _experiment_tags(url: str, experiment_id: str) -> set[str]:
    experiment = _ask(url, "experiments/get", experiment_id=experiment_id).json()["experiment"]
    return {tag["key"] for tag in experiment.get("tags", [])}


def _ask(url: str, what: str, **query: str) -> Any:
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    try:
        return httpx.get(
            f"{url}/api/2.0/mlflow/{what}",
            params=query,
            auth=(user, password) if user and password else None,
            headers={"Authorization": f"Bearer {token}"} if token else None,
            timeout=30,
        )
    except httpx.HTTPError as error:
        raise ServerFailed(f"{without_credentials(url)} does not answer: {error}") from None


def _refuse_taken_port(host: str, port: int) -> None:
    """Refuse a port on which another program listens.

    Raises:
        InvalidInput: the port is taken.
    """
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        raise InvalidInput(f"--port {port}: another program already listens on {host} port {port}; give another --port")


def is_healthy(url: str) -> bool:
    """Return whether an MLflow server responds at `url`."""
    try:
        return httpx.get(f"{url}/health", timeout=2).text == "OK"
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def _running(command: ServerCommand) -> Iterator[subprocess.Popen[bytes]]:
    """Run MLflow's server while the block runs; its output is shown only if it fails to start."""
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(command.arguments, env={**os.environ, **command.environment}, stdout=output, stderr=output)
        try:
            yield server
        except ServerFailed as error:
            output.seek(0)
            raise ServerFailed(f"{error}\n{output.read().decode(errors='replace').strip()}") from None
        finally:
            server.terminate()
            server.wait()


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_healthy(url):
        if server.poll() is not None:
            raise ServerFailed(f"MLflow's server ended with exit code {server.returncode}:")
        if time.monotonic() > deadline:
            raise ServerFailed(f"MLflow's server did not answer at {url} within {START_SECONDS:.0f} s")
        time.sleep(0.2)


def _has_browser() -> bool:
    """Return whether there is a graphical display. A text browser must not be opened, since it would occupy the terminal."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
