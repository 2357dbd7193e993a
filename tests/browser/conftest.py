"""A real Chromium on a real server with a worker. Run with `make test-browser`; the default tests leave these out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browsing import CLASSES, ENVIRONMENT, Visit, photograph
from serving import LiveServer, live_server

if TYPE_CHECKING:  # the service tests have no Playwright
    from playwright.sync_api import Browser, ConsoleMessage, Error, Request

WAIT_MS = 240_000  # for a condition to come true: jobs may share one core with other work
CHROMIUM_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
)  # fmt: skip


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders, some of whose pictures lie in the wrong one, so that a model makes mistakes."""
    folder = tmp_path_factory.mktemp("flowers")
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for number in range(24):
            shown = (label + 1) % len(CLASSES) if number % 8 == 0 else label
            (folder / name / f"{number:02d}.jpg").write_bytes(photograph(shown, number))
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        (pytest.fail if "FINETUNE_BROWSER_REQUIRED" in os.environ else pytest.skip)("needs Chromium: apt-get install chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What servers have measured of this machine, which each of them would measure anew."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "notes"  # one for all processes
    folder.mkdir(exist_ok=True)
    return folder


def _home(folder: Path, measured: Path) -> Path:
    """Return the folder of a workspace that has the measurements of others and nothing else."""
    home = folder / "home"
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "notes").symlink_to(measured)
    return home


@pytest.fixture
def server(tmp_path: Path, measured: Path) -> Iterator[LiveServer]:
    """A server with a worker and nothing in it."""
    with live_server(_home(tmp_path, measured), worker=True, ready=False, environment=ENVIRONMENT) as server:
        yield server


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory, measured: Path) -> Iterator[LiveServer]:
    """A server with a worker, and in it what other tests have left."""
    home = _home(tmp_path_factory.mktemp("shared"), measured)
    with live_server(home, worker=True, ready=False, environment=ENVIRONMENT) as server:
        yield server


@pytest.fixture
def visit(browser: Browser, server: LiveServer, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A tab on a server of its own, of the width, theme and language that the test asks for with
    `@pytest.mark.parametrize("visit", [...], indirect=True)`."""
    yield from _tab(browser, server, getattr(request, "param", {}))


@pytest.fixture
def shared_visit(browser: Browser, shared_server: LiveServer) -> Iterator[Visit]:
    """A tab on the server that tests share, for those that bring what they look at."""
    yield from _tab(browser, shared_server, {})


def _tab(browser: Browser, server: LiveServer, options: Mapping[str, Any]) -> Iterator[Visit]:
    context = browser.new_context(
        viewport={"width": options.get("width", 1280), "height": 850},
        color_scheme=options.get("theme", "light"),
        locale=options.get("language", "en"),
        timezone_id="Europe/Berlin",
        reduced_motion="reduce",
    )
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    visit = Visit(page, server)

    def requested(asked: Request) -> None:
        if not asked.url.startswith((server.url, "blob:", "data:")):
            visit.elsewhere.append(asked.url)

    def printed(message: ConsoleMessage) -> None:
        if message.type == "error":
            visit.errors.append(message.text)

    def raised(error: Error) -> None:
        visit.errors.append(str(error))

    page.on("request", requested)
    page.on("console", printed)
    page.on("pageerror", raised)
    yield visit
    context.close()
    assert visit.elsewhere == []
