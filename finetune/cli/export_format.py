"""``python -m finetune.cli.export_format``: write a bundle in the format of another tool, for the server.

Reads ``{"bundle": folder, "format": …, "out": folder, "runtime": folder or null}`` as JSON from standard input and writes
``{"use": sentence}``, or ``{"error": {code, message}}`` if the model cannot be written in this format. The server runs this
module in a child process, because the server itself must not import the training libraries.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError

NICE = 10  # the server's predictions have priority
CPU_SECONDS = 600
MEMORY_BYTES = 32 << 30  # of address space; torch reserves much more than it uses


def main() -> None:
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    given = json.load(sys.stdin)
    from finetune.export.formats import write_format
    from finetune.export.formats.bundle import Opened

    runtime = given["runtime"]
    answer: dict[str, Any]
    try:
        opened = Opened(Path(given["bundle"]), None if runtime is None else Path(runtime))
        answer = {"use": write_format(given["format"], opened, Path(given["out"]))}
    except FinetuneError as error:
        answer = {"error": {"code": error.code, "message": error.message}}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
