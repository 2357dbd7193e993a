"""``python -m finetune.cli.speed_check``: measure the speed of a backbone on this machine (`finetune.runs.speeds`).

Reads ``{"backbone": …, "input_size_px": …, "device": …, "threads": …, "networks": folder}`` as JSON from standard input and
writes ``{"speeds": …}``, or ``{"problem": sentence}`` if the backbone cannot be used. The server runs this module in a child
process, because the server itself must not import the training libraries.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from finetune.errors import ExportError, InvalidInput, OutOfMemory
from finetune.messages import byte_size
from finetune.runtime.memory import available_memory, limit_memory, memory_errors_named

NICE = 10  # the server's predictions have priority
CPU_SECONDS = 120
MEMORY_SHARE = 0.5  # of this machine's memory, at most
MEMORY_BYTES = 16 << 30


def main() -> None:
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    memory_bytes = min(MEMORY_BYTES, int(MEMORY_SHARE * available_memory()))
    limit_memory(memory_bytes)
    started = time.process_time()
    given = json.load(sys.stdin)
    from finetune.runs.speeds import measure_speeds
    from finetune.training.compute import Compute, resolve_device

    answer: dict[str, Any]
    no_memory = f"{given['backbone']} takes more memory to measure than the {byte_size(memory_bytes)} that a plan may use here"
    try:
        with memory_errors_named(no_memory):
            compute = Compute(resolve_device(given["device"]), "auto", given["threads"])
            speeds = measure_speeds(given["backbone"], given["input_size_px"], compute, Path(given["networks"]), started)
    except (InvalidInput, ExportError, OutOfMemory) as error:
        answer = {"problem": error.message}
    else:
        answer = {"speeds": speeds.to_dict()}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
