"""Ask a child process about backbones and transforms, which only the training libraries know, before a job is accepted."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
from collections.abc import Sequence

from finetune.errors import Overloaded, Problem
from finetune.spec import DEFAULT_BACKBONE, JobSpec, is_own_model
from service.worker import can_train

log = logging.getLogger(__name__)

SECONDS = 60
MEMORY_BYTES = 8 << 30  # of address space, of which torch reserves much and uses little


class SpecChecker:
    """Checks the names in specs. Names that were found good once are remembered, so most jobs need no child process."""

    def __init__(self) -> None:
        self._known_backbones = {DEFAULT_BACKBONE}

    def problems(self, specs: Sequence[JobSpec]) -> Sequence[Sequence[Problem]]:
        """Return what is wrong with each spec; nothing where this installation cannot train and so cannot know."""
        asked = [] if not can_train() else [spec for spec in specs if not self._is_known(spec)]
        found = dict(zip(map(id, asked), self._ask(asked), strict=True)) if asked else {}
        self._known_backbones |= {spec.model.backbone for spec in asked if not found[id(spec)]}
        return [found.get(id(spec), ()) for spec in specs]

    def _is_known(self, spec: JobSpec) -> bool:
        known = is_own_model(spec.model.backbone) or spec.model.backbone in self._known_backbones
        return known and spec.augmentation.transforms is None

    def _ask(self, specs: Sequence[JobSpec]) -> list[list[Problem]]:
        given = json.dumps([spec.model_dump(mode="json") for spec in specs])
        try:
            ran = subprocess.run(
                [sys.executable, "-m", "finetune.cli.spec_check"],
                input=given, capture_output=True, text=True, check=False, timeout=SECONDS, preexec_fn=_limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Overloaded(f"checking the job took more than {SECONDS} s. Try again in a moment") from None
        if ran.returncode != 0:
            log.error("the check of a job's spec failed:\n%s", ran.stderr[-2000:])
            cannot = Problem("augmentation.transforms", "cannot be built with these parameters")
            return [[cannot] if spec.augmentation.transforms else [] for spec in specs]
        return [[Problem(**problem) for problem in problems] for problems in json.loads(ran.stdout)]


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
