"""What turns up while data is listed: problems that refuse it, oddities that become warnings, and how it was understood."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.dataset import BadImage
from finetune.errors import Problem
from finetune.messages import natural_list, plural, printable


@dataclass
class Notes:
    """Everything worth telling that turns up while a source is listed.

    Problems refuse the data; bad images and odd things become warnings; `understood` says how the data was read.
    """

    problems: list[Problem] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)
    not_images: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    understood: list[str] = field(default_factory=list)

    def problem(self, where: Path | str, message: str) -> None:
        """Note a problem once: a folder may be listed more than once on the way."""
        problem = Problem(printable(where), message)
        if problem not in self.problems:
            self.problems.append(problem)

    def say(self, sentence: str) -> None:
        """Note how the data was understood, once."""
        if sentence not in self.understood:
            self.understood.append(sentence)

    def many(self, where: str, places: Iterable[str], what: str) -> None:
        """Note one problem of many places of one location, the first of them by name."""
        names = list(places)
        if names:
            self.problem(where, f"{what}: {natural_list(names)}")

    def warnings(self) -> tuple[str, ...]:
        """Return what is worth telling and keeps nobody from training."""
        if not self.not_images:
            return tuple(self.left_out)
        names = natural_list(printable(name) for name in self.not_images)
        return (f"{plural(len(self.not_images), 'file')} not named like an image, left out: {names}", *self.left_out)
