"""Ask a child process about backbones and transforms, which only the training libraries know, before a job is accepted."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
from collections.abc import Sequence

from finetune.errors import Overloaded, Problem
from finetune.spec import DEFAULT_BACKBONE, JobSpec
from service.worker import can_train

log = logging.getLogger(__name__)

SECONDS = 60
MEMORY_BYTES = 8 << 30  # of address space, of which torch reserves much and uses little


class SpecChecker:
    """Checks the names in specs. Names that were found good once are remembered, so most jobs need no child process."""

    def __init__(self) -> None:
        self._known_backbones = {DEFAULT_BACKBONE}

    def problems(self, spec: JobSpec) -> Sequence[Problem]:
        """Return what is wrong; nothing where this installation cannot train and so cannot know."""
        if not can_train() or (spec.model.backbone in self._known_backbones and spec.augmentation.transforms is None):
            return ()
        found = self._ask(spec)
        if not found:
            self._known_backbones.add(spec.model.backbone)
        return found

    def _ask(self, spec: JobSpec) -> list[Problem]:
        given = json.dumps(spec.model_dump(mode="json"))
        try:
            ran = subprocess.run(
                [sys.executable, "-m", "finetune.cli.spec_check"],
                input=given, capture_output=True, text=True, check=False, timeout=SECONDS, preexec_fn=_limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Overloaded(f"checking the job took more than {SECONDS} s. Try again in a moment") from None
        if ran.returncode != 0:
            log.error("the check of a job's spec failed:\n%s", ran.stderr[-2000:])
            return (
                [Problem("augmentation.transforms", "cannot be built with these parameters")]
                if spec.augmentation.transforms
                else []
            )
        return [Problem(**problem) for problem in json.loads(ran.stdout)]


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
