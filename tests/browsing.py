"""What tests of the page share: small photographs, and a tab of a browser that notes everything that goes wrong in it."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from serving import LiveServer

if TYPE_CHECKING:  # the service tests have no Playwright
    from playwright.sync_api import Page

ENVIRONMENT = {"FINETUNE_TRACKERS": "none", "OMP_NUM_THREADS": "1", "FINETUNE_THREADS": "1"}  # of the server and its worker
CLASSES = ("daisy", "rose", "tulip")


def photograph(label: int, number: int, side_px: int = 72) -> bytes:
    """A small JPEG: stripes of the label's colour and width, with noise."""
    generator = np.random.default_rng(1000 * label + number)
    pixels = generator.integers(0, 120, (side_px, side_px + 8, 3), dtype=np.uint8)
    pixels[:, :: label + 2, label % 3] += 100
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


@dataclass
class Visit:
    """A tab on a server, and everything that went wrong in it."""

    page: Page
    server: LiveServer
    elsewhere: list[str] = field(default_factory=list)  # requests that left the origin
    errors: list[str] = field(default_factory=list)  # exceptions, and what the console calls an error

    def go(self, place: str) -> None:
        """Open a place and wait until it is drawn; what was there before stays until then."""
        self.page.goto(f"{self.server.url}/#/{place}")
        self.page.wait_for_selector(f'main:not([aria-busy]) > [data-place="#/{place}"] h1')
