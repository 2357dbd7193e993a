"""How long a person waits for the first model: photographs dropped on the page, one click, and the result on the screen.

    python benchmarks/first_model.py --data photos --out first_model.json

Draws 150 photographs of 4 classes from a folder of class folders, starts a server with an empty workspace and no cache of any
kind, opens its page in Chromium, gives it the folder and presses Train, with nothing but defaults. The clock runs from the moment
at which the folder is given to the moment at which the accuracy is on the screen; the model answers at `/predict` by then, which
is checked. Needs the packages of the tests (`make install`) and Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import httpx
from playwright.sync_api import Browser, sync_playwright
from serving import live_server

WAIT_MS = 600_000
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
COUNT_CLICKS = "window.clicks = 0; addEventListener('pointerdown', (event) => { clicks += event.isTrusted; }, true)"


def draw(data: Path, folder: Path, n_images: int, n_classes: int) -> None:
    """Copy images of the largest classes into `folder`, as many of each class."""
    classes = sorted((one for one in data.iterdir() if one.is_dir()), key=lambda one: -len(list(one.iterdir())))[:n_classes]
    for position, one in enumerate(classes):
        count = n_images // n_classes + (position < n_images % n_classes)
        files = sorted(one.iterdir())
        (folder / one.name).mkdir(parents=True)
        for file in random.Random(0).sample(files, min(count, len(files))):
            shutil.copy(file, folder / one.name / file.name)


def first_model(browser: Browser, folder: Path, patience_seconds: float) -> dict[str, float]:
    """Return the seconds and the clicks of one run in an empty workspace."""
    with tempfile.TemporaryDirectory() as home:
        environment = {"FINETUNE_CACHE": f"{home}/cache-of-user"}
        with live_server(Path(home), worker=True, ready=False, environment=environment) as server:
            page = browser.new_page()
            page.set_default_timeout(WAIT_MS)
            page.add_init_script(COUNT_CLICKS)
            page.goto(server.url)
            page.wait_for_selector("main:not([aria-busy]) h1")
            time.sleep(patience_seconds)
            with page.expect_file_chooser() as chooser:
                page.get_by_text("Choose a folder", exact=True).click()
            started = time.perf_counter()
            chooser.value.set_files(folder)
            page.get_by_role("button", name="Train", exact=True).click()
            clicked = time.perf_counter()
            page.wait_for_url("**/#/runs/*")
            sent = time.perf_counter()
            page.wait_for_selector(".accuracy")
            done = time.perf_counter()
            clicks = page.evaluate("clicks")
            picture = next(folder.rglob("*.jpg")).read_bytes()
            httpx.post(f"{server.url}/predict", content=picture, timeout=60).raise_for_status()
            page.close()
    return {"seconds": done - started, "until_train": clicked - started, "until_sent": sent - started, "clicks": clicks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of class folders")
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patience", type=float, default=0.0, help="seconds between the opened page and the folder")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("needs Chromium: apt-get install chromium")
    runs = []
    with tempfile.TemporaryDirectory() as drawn, sync_playwright() as playwright:
        folder = Path(drawn) / "photos"
        draw(given.data, folder, given.images, given.classes)
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        for _ in range(given.repeats):
            runs.append({**first_model(browser, folder, given.patience), "load": os.getloadavg()[0]})
            print({key: round(value, 1) for key, value in runs[-1].items()}, flush=True)
        browser.close()
    median = statistics.median(run["seconds"] for run in runs)
    print(f"{median:.1f} s and {runs[0]['clicks']} clicks to the first model, median of {len(runs)}")
    if given.out:
        given.out.write_text(json.dumps({"median_seconds": median, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
