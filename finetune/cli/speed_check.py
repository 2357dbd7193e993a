"""``python -m finetune.cli.speed_check``: measure how fast this machine computes a backbone (`finetune.runs.speeds`).

Reads ``{"backbone": …, "input_size_px": …, "device": …, "threads": …, "networks": folder}`` as JSON from standard input and
writes ``{"speeds": …}``, or ``{"problem": sentence}`` where the backbone cannot be used. The server runs it in a child process,
because the server itself imports nothing that trains.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from finetune.errors import ExportError, InvalidInput

NICE = 10  # behind the requests and predictions of the server
CPU_SECONDS = 120
MEMORY_BYTES = 16 << 30  # of address space, of which torch reserves much and uses little


def main() -> None:
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    started = time.process_time()
    given = json.load(sys.stdin)
    from finetune.runs.speeds import measure_speeds
    from finetune.training.compute import Compute, resolve_device

    answer: dict[str, Any]
    try:
        compute = Compute(resolve_device(given["device"]), "auto", given["threads"])
        speeds = measure_speeds(given["backbone"], given["input_size_px"], compute, Path(given["networks"]), started)
    except (InvalidInput, ExportError) as error:
        answer = {"problem": error.message}
    else:
        answer = {"speeds": speeds.to_dict()}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
