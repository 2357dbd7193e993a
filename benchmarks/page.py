"""How heavy the page is: bytes of its files, time to the first paint, and long tasks while 10,000 thumbnails are scrolled.

    python benchmarks/page.py --out page.json

Starts a server with an empty workspace and opens its page in Chromium. The first paint is what the browser reports, with an empty
cache each time. For the thumbnails it uploads an archive of small JPEG files and scrolls through all of them in steps of half a
window; a task of more than 50 ms is long. Needs the packages of the tests (`make install`) and Chromium.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import httpx
from archives import zip_of
from browsing import photograph
from playwright.sync_api import Browser, sync_playwright
from serving import live_server

from service.web import STATIC

WAIT_MS = 600_000
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
COUNT_LONG_TASKS = """
window.longTasks = [];
const observer = new PerformanceObserver((list) => longTasks.push(...list.getEntries().map(({ duration }) => duration)));
observer.observe({ type: "longtask" });
"""
SCROLL = """
async () => {
  let most = 0;
  for (let top = 0; top < document.documentElement.scrollHeight; top += innerHeight / 2) {
    scrollTo(0, top);
    await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 20)));
    most = Math.max(most, document.querySelectorAll(".cell").length);
  }
  return most;
}
"""


def size_of_files() -> dict[str, int]:
    """Return the number of the page's files and their bytes, as they are and each compressed."""
    files = [file.read_bytes() for file in STATIC.rglob("*") if file.is_file()]
    return {"files": len(files), "bytes": sum(map(len, files)), "gzip_bytes": sum(len(gzip.compress(file)) for file in files)}


def first_paints(browser: Browser, url: str, repeats: int) -> list[float]:
    """Return the milliseconds to the first paint of visits with an empty cache."""
    found = []
    for _ in range(repeats):
        page = browser.new_context().new_page()
        page.goto(url)
        page.wait_for_selector("main:not([aria-busy]) h1", timeout=WAIT_MS)
        found.append(float(page.evaluate(FIRST_PAINT)))
        page.context.close()
    return found


def scrolled(browser: Browser, url: str, n_images: int) -> dict[str, Any]:
    """Upload images, scroll through their thumbnails, and return the long tasks and the most thumbnails at one time."""
    picture = photograph(0, 0, 64)
    archive = zip_of({f"{name}/{number:05d}.jpg": picture for name in ("a", "b") for number in range(n_images // 2)})
    sent = {"file": ("many.zip", archive)}
    file = httpx.post(f"{url}/v1/files", files=sent, data={"purpose": "fine-tune"}, timeout=600).raise_for_status().json()
    page = browser.new_page(viewport={"width": 1280, "height": 850})
    page.add_init_script(COUNT_LONG_TASKS)
    page.goto(f"{url}/#/data/{file['id']}")
    page.wait_for_selector(".cell img[src]", timeout=WAIT_MS)
    page.evaluate("longTasks.length = 0")
    browser.start_tracing(page=page, categories=["toplevel", "disabled-by-default-devtools.timeline"])
    most = page.evaluate(SCROLL)
    page.wait_for_selector(f'[aria-posinset="{n_images}"] img[src]', timeout=WAIT_MS)
    cpu_ms = longest_cpu_ms(json.loads(browser.stop_tracing()))
    tasks = page.evaluate("longTasks")
    page.close()
    times = {"long_tasks": len(tasks), "longest_ms": max(tasks, default=0.0), "longest_cpu_ms": cpu_ms}
    return {"images": n_images, **times, "most_thumbnails": most}


def longest_cpu_ms(trace: Mapping[str, Any]) -> float:
    """Return the CPU time of the longest task of a page's main thread, which other programs do not lengthen."""
    events = trace["traceEvents"]
    main = {(one["pid"], one["tid"]) for one in events if one.get("args", {}).get("name") == "CrRendererMain"}
    tasks = [one["tdur"] for one in events if (one["pid"], one["tid"]) in main and "RunTask" in one["name"] and "tdur" in one]
    assert tasks, "the browser has traced no task of the page"
    return max(tasks) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("needs Chromium: apt-get install chromium")
    found: dict[str, Any] = {"files": size_of_files()}
    with tempfile.TemporaryDirectory() as home, live_server(Path(home), ready=False) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        paints = first_paints(browser, server.url, given.repeats)
        found["first_paint_ms"] = {"median": statistics.median(paints), "most": max(paints), "load": os.getloadavg()[0]}
        print(json.dumps(found), flush=True)
        found["thumbnails"] = {**scrolled(browser, server.url, given.images), "load": os.getloadavg()[0]}
        print(json.dumps(found["thumbnails"]), flush=True)
        browser.close()
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
