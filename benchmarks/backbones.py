"""Try one small member of every family of timm: ``python benchmarks/backbones.py`` writes finetune/model/tried_backbones.csv.

Each member is tried in a process of its own, which a family that takes too much memory or time cannot outlive. Families whose row
is there already are left out unless ``--again`` is given; ``--only NAME`` tries the families that contain a text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import timm
import torch

from finetune.export.trial import NO_MEMORY, try_backbone
from finetune.model.tried import TABLE, Trial, read_trials, write_trials
from finetune.runtime.memory import limit_memory, says_out_of_memory

MEMORY_BYTES = 8 << 30
SECONDS = 1800
OWN = {"depth"}  # networks of this project, registered with timm


def smallest_member(family: str) -> str:
    """Return the member with the fewest parameters, without timm's own toys where there is another."""
    names = timm.list_models(module=family)
    names = [name for name in names if not name.startswith("test_")] or names
    return min(names, key=n_parameters)


def n_parameters(name: str) -> int:
    with torch.device("meta"):
        try:
            return sum(parameter.numel() for parameter in timm.create_model(name, pretrained=False, num_classes=0).parameters())
        except (RuntimeError, NotImplementedError, TypeError):  # cannot be built without memory
            return sys.maxsize


def in_a_process(name: str) -> Trial:
    """Try a backbone in a child process."""
    command = [sys.executable, __file__, "--child", name]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Trial(name, works=False, reason=f"not done within {SECONDS} s")
    lines = ran.stdout.strip().splitlines()
    if ran.returncode == -signal.SIGKILL or (ran.returncode != 0 and says_out_of_memory(ran.stderr)):
        return Trial(name, works=False, reason=NO_MEMORY)
    if ran.returncode != 0 or not lines:
        last = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
        return Trial(name, works=False, reason=last)
    return Trial(**json.loads(lines[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--only", default="", help="families whose name contains this")
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        limit_memory(MEMORY_BYTES)
        print(json.dumps(dataclasses.asdict(try_backbone(given.child))))
        return
    rows = read_trials(given.out)
    families = [family for family in timm.list_modules() if family not in OWN and timm.list_models(module=family)]
    for family in [family for family in families if given.only in family and (given.again or family not in rows)]:
        found = rows[family] = in_a_process(rows[family].backbone if family in rows else smallest_member(family))
        print(f"{family:<24} {found.backbone:<36} {'works' if found.works else found.reason}", flush=True)
        write_trials(rows, given.out)


if __name__ == "__main__":
    main()
