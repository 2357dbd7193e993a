"""``python -m finetune.cli.spec_check``: check the parts of job specs that need the training libraries.

Reads a JSON object with a list ``specs`` from standard input and writes a JSON object: ``problems``, a list of each spec's
problems, and ``catalogue``, all names of timm models, which the caller can cache. The server runs this module in a child process
before it accepts a job, because the server itself must not import the training libraries.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from finetune.errors import Problem, UnknownBackbone, WeightsError
from finetune.spec import JobSpec, is_own_model, parse_spec

CPU_SECONDS = 60
MEMORY_BYTES = 8 << 30  # of address space; torch reserves much more than it uses


def problems_of(spec: JobSpec) -> list[Problem]:
    """Return the problems of the backbone's name and of explicit transforms."""
    problems: list[Problem] = []
    try:
        if not is_own_model(spec.model.backbone):  # own models were checked by the server
            from finetune.model.weights import find_cfg

            find_cfg(spec.model.backbone)
    except (UnknownBackbone, WeightsError) as error:
        problems.append(Problem("model.backbone", error.message.removeprefix("model.backbone: ")))
    if spec.augmentation.transforms is not None:
        from finetune.data.transforms import build_all

        try:
            build_all(spec.augmentation.transforms, "augmentation.transforms", problems)
        except MemoryError:
            problems.append(Problem("augmentation.transforms", "needs more memory than this machine has"))
    return problems


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    given: list[dict[str, Any]] = json.load(sys.stdin)["specs"]
    found = [[{"where": one.where, "message": one.message} for one in problems_of(parse_spec(spec))] for spec in given]
    from finetune.model.catalog import all_names

    sys.stdout.write(json.dumps({"problems": found, "catalogue": all_names()}))


if __name__ == "__main__":
    main()
