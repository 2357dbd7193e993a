"""A real Chromium on a real server with a worker. Run with `make test-browser`; the default tests leave these out."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request, sync_playwright
from serving import LiveServer, live_server

CLASSES = ("daisy", "rose", "tulip")
CHROMIUM_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
)  # fmt: skip


def photograph(label: int, number: int, side_px: int = 72) -> bytes:
    """A small JPEG: stripes of the label's colour and width, with noise."""
    generator = np.random.default_rng(1000 * label + number)
    pixels = generator.integers(0, 120, (side_px, side_px + 8, 3), dtype=np.uint8)
    pixels[:, :: label + 2, label % 3] += 100
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


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
        pytest.fail("these tests need Chromium: .ci/install_chromium installs Debian's")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    """A server with a worker and nothing in it."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {"FINETUNE_TRACKERS": "none", "OMP_NUM_THREADS": "1", "FINETUNE_THREADS": "1"}
    with live_server(home, worker=True, ready=False, environment=environment) as server:
        yield server


@dataclass
class Visit:
    """A tab on a server, and everything that went wrong in it."""

    page: Page
    server: LiveServer
    elsewhere: list[str] = field(default_factory=list)  # requests that left the origin
    errors: list[str] = field(default_factory=list)  # exceptions, and what the console calls an error

    def go(self, place: str) -> None:
        self.page.goto(f"{self.server.url}/#/{place}")
        self.page.wait_for_selector("main:not([aria-busy]) h1")


@pytest.fixture
def visit(browser: Browser, server: LiveServer, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A tab of the width and theme that the test asks for by `@pytest.mark.parametrize("visit", [...], indirect=True)`."""
    options = getattr(request, "param", {})
    context = browser.new_context(
        viewport={"width": options.get("width", 1280), "height": 850},
        color_scheme=options.get("theme", "light"),
        locale=options.get("language", "en"),
        reduced_motion="reduce",
    )
    context.set_default_timeout(120_000)  # of waiting for a condition; jobs share two cores with other tests
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
