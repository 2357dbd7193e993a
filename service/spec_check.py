"""Check backbones and transforms in a child process with the training libraries, before a job is accepted."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.backbone_names import problem_of_name
from finetune.errors import DiskFull, Overloaded, Problem
from finetune.jobs.kinds import can_train
from finetune.spec import DEFAULT_BACKBONE, JobSpec, is_own_model
from finetune.storage.files import read_json, write_json
from service.admission import WorkQueue
from service.child import ChildProgram

COMMAND = (sys.executable, "-m", "finetune.cli.spec_check")
SECONDS = 60.0
MAX_WAITING = 8  # waiting requests of one owner, besides the one that is being checked
MAX_REMEMBERED = 10_000

Answers = Mapping[str, Sequence[Problem]]  # by `key_of` a spec


class Unchecked(Exception):
    """Specs have names that are not known yet. Call `SpecChecker.check`, then parse the request again."""

    def __init__(self, specs: Sequence[JobSpec]) -> None:
        super().__init__(f"{len(specs)} specs have names that are not known yet")
        self.specs = specs


class SpecChecker:
    """Checks the names in specs. timm's names are cached, in the workspace too, so that most jobs need no child process.

    The child processes have their own threads, so that a request with known names never waits for one. Each owner has at most
    one child process at a time.
    """

    def __init__(self, catalogues: Path) -> None:
        self._catalogues = catalogues
        self._names: Sequence[str] = ()  # of all backbones of this release of timm; empty if they are not known yet
        self._known_backbones = {DEFAULT_BACKBONE}
        self._queue = WorkQueue(2, max_wait_seconds=SECONDS)
        self._turns: dict[str, asyncio.Lock] = {}
        self._waiting: dict[str, int] = {}
        self._running: set[ChildProgram] = set()

    def stop(self) -> None:
        """Cancel waiting checks and kill the child processes."""
        self._queue.stop()
        for program in tuple(self._running):
            program.stop()

    def problems(self, specs: Sequence[JobSpec], answers: Answers) -> Sequence[Sequence[Problem]]:
        """Return the problems of each spec; none if the training libraries are not installed here.

        Args:
            answers: what `check` returned for specs that were `Unchecked`.

        Raises:
            Unchecked: neither `answers` nor the cache has what some specs need.
        """
        if not can_train():
            return [() for _ in specs]
        found = [answers.get(key_of(spec), self._known_problems(spec)) for spec in specs]
        if unchecked := [spec for spec, problems in zip(specs, found, strict=True) if problems is None]:
            raise Unchecked(unchecked)
        return [problems for problems in found if problems is not None]

    async def check(self, specs: Sequence[JobSpec], owner: str) -> Answers:
        """Check specs in a child process; return their problems by `key_of`.

        Raises:
            Overloaded: too many requests wait, or the child process failed.
        """
        if self._waiting.get(owner, 0) > MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} other requests of yours wait until their names are checked. Try again in a moment")
        self._waiting[owner] = self._waiting.get(owner, 0) + 1
        try:
            async with self._turns.setdefault(owner, asyncio.Lock()):
                return await self._queue.run(self._check, specs)
        finally:
            self._waiting[owner] -= 1
            if not self._waiting[owner]:
                del self._waiting[owner], self._turns[owner]

    def _known_problems(self, spec: JobSpec) -> Sequence[Problem] | None:
        """Return the problems of a spec if the cache tells them; None if a child process has to."""
        backbone = spec.model.backbone
        if not (is_own_model(backbone) or backbone in self._known_backbones):
            if not (names := self._catalogue()):
                return None
            if why := problem_of_name(backbone, names):
                return [Problem("model.backbone", why)]
        return None if spec.augmentation.transforms is not None else ()

    def _catalogue(self) -> Sequence[str]:
        """Return all names of backbones, from the workspace's cache if need be; empty if they are not known yet."""
        if not self._names:
            with contextlib.suppress(OSError, ValueError):  # never written, or damaged
                found = read_json(self._catalogue_file())
                if isinstance(found, list) and all(isinstance(name, str) for name in found):
                    self._names = found
        return self._names

    def _catalogue_file(self) -> Path:
        release = hashlib.sha256(repr([__version__, version("timm")]).encode()).hexdigest()[:16]
        return self._catalogues / f"backbones-{release}.json"

    def _check(self, specs: Sequence[JobSpec]) -> Answers:
        answered = self._run_child({"specs": [spec.model_dump(mode="json") for spec in specs]})
        answers = {
            key_of(spec): [Problem(**problem) for problem in problems]
            for spec, problems in zip(specs, answered["problems"], strict=True)
        }
        if len(self._known_backbones) > MAX_REMEMBERED:
            self._known_backbones = {DEFAULT_BACKBONE}
        self._known_backbones |= {spec.model.backbone for spec in specs if not answers[key_of(spec)]}
        if answered["catalogue"] != list(self._names):
            self._names = answered["catalogue"]
            with contextlib.suppress(OSError, DiskFull):  # a cache, which the next child process can fill
                write_json(self._catalogue_file(), self._names)
        return answers

    def _run_child(self, given: Mapping[str, Any]) -> dict[str, Any]:
        program = ChildProgram(COMMAND, seconds=SECONDS)
        self._running.add(program)
        try:
            return program.run(given, "checking model.backbone and augmentation.transforms")
        except Overloaded as error:
            hint = "Try again in a moment; if this persists, give another backbone or other transforms"
            raise Overloaded(f"{error.message}. {hint}") from None
        finally:
            self._running.discard(program)


def key_of(spec: JobSpec) -> str:
    """Return a key that is equal for specs with equal names to check."""
    return json.dumps([spec.model.backbone, spec.augmentation.transforms])
