"""Registered models in the formats of other tools, written on request by a child process (see `finetune.export.formats`)."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import shutil
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from finetune.bundle.registry import ModelVersion
from finetune.errors import Conflict, Overloaded, error_of
from finetune.jobs.kinds import can_train
from finetune.storage.files import modified_ns
from service.child import ChildProgram

CHILD = (sys.executable, "-m", "finetune.cli.export_format")
SECONDS = 900  # the child limits its own CPU time
MAX_WAITING = 8
MAX_OF_OWNER = 2
ABANDONED_SECONDS = 3600.0
CHUNK_BYTES = 1 << 20

Format = Literal["web", "timm", "safetensors", "onnx", "openvino"]
FORMATS: tuple[Format, ...] = get_args(Format)
PAGE = "index.html"  # the file of `web` that is sent, alone: it holds the model
UNAVAILABLE: Mapping[Format, str] = {
    "web": "This server has no ONNX Runtime Web for the page. The operator can add it: npm install onnxruntime-web in the "
    "folder in which the server is started, or FINETUNE_ONNXRUNTIME_WEB names the folder of the package",
    "timm": "This server has no training libraries, which are needed to write weights for timm",
    "safetensors": "This server has no training libraries, which are needed to write all weights into one file",
    "openvino": "This server has no OpenVINO, which is needed to write its format. The operator can add it: pip install openvino",
}


@dataclass(frozen=True)
class Exported:
    """A written model: an open file that is deleted from the disk already, its size, and its name for the client."""

    stream: BinaryIO
    size_bytes: int
    filename: str

    def chunks(self) -> Iterator[bytes]:
        """Yield the contents, and close the file at the end."""
        with self.stream:
            while piece := self.stream.read(CHUNK_BYTES):
                yield piece


class Exporter:
    """Writes one model at a time. Nothing is stored: each file is deleted from the disk before its download begins.

    Args:
        folder: for what is being written.
        runtime: the folder of the npm package onnxruntime-web, which may be missing.
    """

    def __init__(self, folder: Path, runtime: Path) -> None:
        self._folder = folder
        self._runtime = runtime
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._child = ChildProgram(CHILD, seconds=SECONDS)
        self._waiting: Counter[str] = Counter()  # by owner

    def stop(self) -> None:
        """Kill the child process, if there is one."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._child.stop()

    def sweep(self) -> None:
        """Delete what servers that were killed have left behind."""
        for leftover in self._folder.glob("*"):
            changed_ns = modified_ns(leftover)
            if changed_ns is not None and time.time() - changed_ns / 1e9 > ABANDONED_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)

    def available(self) -> list[Format]:
        """Return the formats that this installation can write."""
        has = {
            "web": self._runtime.is_dir(),
            "timm": can_train(),
            "safetensors": can_train(),
            "onnx": True,
            "openvino": importlib.util.find_spec("openvino") is not None,
        }
        return [name for name in FORMATS if has[name]]

    def check_available(self, name: Format) -> None:
        """Raise `Conflict` if this installation cannot write the format."""
        if name not in self.available():
            raise Conflict(f"{UNAVAILABLE[name]}. Available here: {', '.join(self.available())}")

    async def write(self, version: ModelVersion, name: Format, owner: str) -> Exported:
        """Write a version of a model in a format.

        Args:
            owner: who asks. At most `MAX_OF_OWNER` exports of an owner wait or are written, so that nobody fills the queue.

        Raises:
            Conflict: this installation cannot write the format.
            Overloaded: too many exports wait, of this owner or in all, or the child process failed.
            FinetuneError: the model cannot be written in this format.
        """
        self.check_available(name)
        if self._waiting[owner] >= MAX_OF_OWNER:
            raise Overloaded(f"{MAX_OF_OWNER} other models are being written for you. Try again in a moment")
        if self._waiting.total() >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} other models wait to be written. Try again in a moment")
        self._waiting[owner] += 1
        writing = asyncio.get_running_loop().run_in_executor(self._executor, self._write, version, name)
        writing.add_done_callback(lambda done: self._written(owner, done))
        return await asyncio.shield(writing)

    def _written(self, owner: str, done: asyncio.Future[Exported]) -> None:
        self._waiting[owner] -= 1
        with contextlib.suppress(asyncio.CancelledError):
            done.exception()  # retrieved, so that asyncio does not report an error that no client waits for

    def _write(self, version: ModelVersion, name: Format) -> Exported:
        self._folder.mkdir(parents=True, exist_ok=True)
        filename = download_name(version, name)
        base = filename.rpartition(".")[0]
        with tempfile.TemporaryDirectory(dir=self._folder) as work:
            out = Path(work) / base
            runtime = str(self._runtime) if name == "web" else None
            given = {"bundle": str(version.path), "format": name, "out": str(out), "runtime": runtime}
            answer = self._child.run(given, f"writing {version.name}@{version.version} as {name}")
            if "error" in answer:
                raise error_of(answer["error"])
            if name == "web":
                return _opened(out / PAGE, filename)
            archive = Path(work) / filename
            with zipfile.ZipFile(archive, "w") as packed:  # uncompressed: weights can hardly be compressed
                for file in sorted(out.rglob("*")):
                    packed.write(file, f"{base}/{file.relative_to(out)}")
            return _opened(archive, archive.name)


def download_name(version: ModelVersion, name: Format) -> str:
    """Return the file name of a version in a format."""
    return f"{version.name}-{version.version}-{name}.{'html' if name == 'web' else 'zip'}"


def _opened(path: Path, filename: str) -> Exported:
    return Exported(open(path, "rb"), path.stat().st_size, filename)
