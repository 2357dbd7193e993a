"""Serving beside an in-process loop and a plain server, in one run on the same cores and with the same model and files.

    python benchmarks/serving/run.py --bundle .finetune/models/flowers/1 --out serving.json

Measured: images per second of an in-process loop of the same decoding and inference (what a server could reach at most), then of
each server at saturation for 640×480 and 12-megapixel JPEGs, the latency of one client at a time, what becomes of accepted
answers under ten times as many connections, and how long start-up takes and how much memory it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.bundle.predictor import Predictor
from finetune.runtime.cores import available_cores

HERE = Path(__file__).parent
SIZES = {"640x480": (640, 480), "12MP": (4000, 3000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=2, help="every figure is the best of so many rounds in turn")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = measure(options.bundle.absolute(), options.seconds, options.rounds)
    print(table(found))
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


def measure(bundle: Path, seconds: float, rounds: int) -> dict[str, Any]:
    files = {name: photograph(*size) for name, size in SIZES.items()}
    cores = available_cores()
    found: dict[str, Any] = {
        "cores": cores,
        "processor": processor(),
        "files_bytes": {name: len(data) for name, data in files.items()},
    }
    for name, data in files.items():
        rows: dict[str, list[Any]] = {
            "loop": [],
            "ours": [],
            "plain": [],
            "ours one at a time": [],
            "plain one at a time": [],
            "ours overloaded": [],
        }
        for _ in range(rounds):
            rows["loop"].append(in_process(bundle, data, cores, seconds))
            alone = round(1000 / in_process(bundle, data, 1, seconds / 2), 2)
            found[f"{name} alone"] = min(alone, found.get(f"{name} alone", alone))
            for server, serving in (("ours", ours), ("plain", plain)):
                with serving(bundle) as (url, facts):
                    found.setdefault(f"{server} start", []).append(facts)
                    rows[server].append(load(url, data, 4 * cores, seconds))
                    rows[f"{server} one at a time"].append(load(url, data, 1, seconds / 2))
                    if server == "ours" and name == "640x480":
                        rows["ours overloaded"].append(load(url, data, 100, seconds))
                        found.setdefault("ours after overload", []).append(load(url, data, 4 * cores, seconds / 2))
        found[name] = {row: best(values) for row, values in rows.items() if values}
    return found


def best(values: list[Any]) -> Any:
    return max(values, key=lambda value: value if isinstance(value, float) else value["answers_per_second"])


def photograph(width: int, height: int) -> bytes:
    """A JPEG that compresses like a photograph: structure at every scale."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3), np.float32)
    for side, strength in ((8, 50), (32, 40), (128, 20), (512, 6)):
        noise = rng.normal(0, strength, (side * height // width + 1, side, 3)).astype(np.float32)
        planes = [Image.fromarray(noise[..., channel]).resize((width, height), Image.Resampling.BICUBIC) for channel in range(3)]
        pixels += np.stack([np.asarray(plane) for plane in planes], axis=-1)
    stream = io.BytesIO()
    Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=88)
    return stream.getvalue()


def in_process(bundle: Path, data: bytes, threads: int, seconds: float) -> float:
    """Images per second of `threads` threads that decode and predict without pause."""
    predictor = Predictor.load(bundle)
    done, end = [0] * threads, time.perf_counter() + seconds

    def work(number: int) -> None:
        while time.perf_counter() < end:
            predictor.predict(data)
            done[number] += 1

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return round(sum(done) / seconds, 1)


def load(url: str, data: bytes, connections: int, seconds: float) -> dict[str, Any]:
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"serving-benchmark-{os.getpid()}.jpg"
    file.write_bytes(data)
    try:
        command = [sys.executable, str(HERE / "load.py"), f"{url}/predict", str(file), str(connections), str(seconds)]
        result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    finally:
        file.unlink()
    return result


@contextlib.contextmanager
def ours(bundle: Path) -> Iterator[tuple[str, dict[str, float]]]:
    home = Path(os.environ.get("TMPDIR", "/tmp")) / f"serving-benchmark-home-{os.getpid()}"
    command = [sys.executable, "-m", "service", "--no-worker", "--model", str(bundle)]
    with server(command, {"FINETUNE_HOME": str(home)}) as found:
        yield found


@contextlib.contextmanager
def plain(bundle: Path) -> Iterator[tuple[str, dict[str, float]]]:
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "plain_server:app",
        "--app-dir",
        str(HERE),
        "--no-access-log",
        "--log-level",
        "warning",
    ]
    with server(command, {"MODEL": str(bundle / "model.onnx")}) as found:
        yield found


@contextlib.contextmanager
def server(command: list[str], environment: dict[str, str]) -> Iterator[tuple[str, dict[str, float]]]:
    """A server on a free port; yields its address, and how long it took to be ready and how much memory it holds then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, began = f"http://127.0.0.1:{port}", time.perf_counter()
    process = subprocess.Popen([*command, "--port", str(port)], env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    try:
        while not answers(f"{url}/readyz"):
            assert process.poll() is None, "the server ended before it was ready"
            time.sleep(0.01)
        ready = time.perf_counter() - began
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        yield url, {"ready_seconds": round(ready, 2), "resident_mib": round(int(status["VmRSS"].split()[0]) / 1024, 1)}
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def table(found: dict[str, Any]) -> str:
    lines = [f"{found['cores']} cores, {found['processor']}"]
    for name in SIZES:
        rows = found[name]
        loop, own, other = rows["loop"], rows["ours"]["answers_per_second"], rows["plain"]["answers_per_second"]
        alone, other_alone = rows["ours one at a time"]["p50_ms"], rows["plain one at a time"]["p50_ms"]
        lines += [
            f"{name}: in-process loop {loop}/s, ours {own}/s, plain {other}/s",
            f"  at saturation {own / loop:.2f} of the loop, {own / other:.2f} times the plain server",
            f"  one at a time: ours p50 {alone} ms, plain {other_alone} ms, a loop of one thread {found[f'{name} alone']} ms",
        ]
        if "ours overloaded" in rows:
            over = rows["ours overloaded"]
            share, after = over["answers_per_second"] / own, found["ours after overload"][-1]["answers_per_second"]
            lines.append(
                f"  100 connections: {over['answers_per_second']} accepted/s ({share:.2f} of saturation), "
                f"p99 {over['p99_ms']} ms, "
                f"{over['refused_per_second']} refused/s; right after it {after}/s"
            )
    lines.append(f"start: ours {found['ours start'][-1]}, plain {found['plain start'][-1]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
