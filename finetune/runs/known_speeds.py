"""Find the measured speed of a backbone on this machine in the workspace, or measure it in a child process. Torch-free.

`finetune check` and the server's plans use the same measurements, so both give the same forecast for the same images.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.runs.forecast import Speeds
from finetune.runtime.cores import available_cores
from finetune.spec import JobSpec
from finetune.storage.files import read_json, write_json
from finetune.storage.workspace import Workspace

CHILD = (sys.executable, "-m", "finetune.cli.speed_check")
SECONDS = 600  # the child limits its own CPU time

Question = Mapping[str, Any]  # backbone, input_size_px, device, threads


def measurement_request(spec: JobSpec, backbone: str) -> dict[str, Any]:
    """Return what has to be measured for a request.

    Args:
        backbone: the timm name of its network.
    """
    size, compute = spec.model.input_size_px, spec.compute
    return {
        "backbone": backbone,
        "input_size_px": None if size == "auto" else size,
        "device": compute.device,
        "threads": available_cores() if compute.threads == "auto" else compute.threads,
    }


def speeds_key(question: Question) -> str:
    """Return the key under which a measurement by this release is kept."""
    text = json.dumps([__version__, dict(question)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def speeds_file(workspace: Workspace, question: Question) -> Path:
    """Return where a measurement is kept in a workspace."""
    return workspace.cache / "notes" / f"speeds-{speeds_key(question)}.json"


def find_speeds(workspace: Workspace, question: Question) -> Speeds | None:
    """Return the measurement that is kept in a workspace, or None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing, or of another release
        return Speeds.from_dict(read_json(speeds_file(workspace, question)))
    return None


def measured_speeds(workspace: Workspace, question: Question) -> Speeds | None:
    """Return the measurement of a backbone, which takes about ten seconds the first time; None if it cannot be measured."""
    known = find_speeds(workspace, question)
    answer = None if known else measure_in_child({**question, "networks": str(workspace.networks)})
    if answer is None or "speeds" not in answer:
        return known
    write_json(speeds_file(workspace, question), answer["speeds"])
    return Speeds.from_dict(answer["speeds"])


def measure_in_child(given: Question) -> dict[str, Any] | None:
    """Run the child process and return its answer; None if it failed, or took longer than it may."""
    try:
        done = subprocess.run(CHILD, input=json.dumps(given), capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    answer: dict[str, Any] | None = json.loads(done.stdout) if done.returncode == 0 else None
    return answer
