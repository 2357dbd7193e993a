"""Collect messages while data is listed: problems that refuse it, warnings, and how it was interpreted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.dataset import BadImage
from finetune.errors import Problem
from finetune.messages import natural_list, plural, printable


@dataclass
class Notes:
    """The messages about a source.

    Problems refuse the data; bad images and oddities become warnings; `understood` has sentences on how the data was interpreted.
    """

    problems: list[Problem] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)
    not_images: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    understood: list[str] = field(default_factory=list)
    _noted: set[Problem | str] = field(default_factory=set, repr=False)  # problems and sentences that are in the lists above

    def problem(self, where: Path | str, message: str) -> None:
        """Note a problem, once even if a folder is listed several times."""
        problem = Problem(printable(where), message)
        if problem not in self._noted:
            self._noted.add(problem)
            self.problems.append(problem)

    def say(self, sentence: str) -> None:
        """Note how the data was interpreted, once."""
        if sentence not in self._noted:
            self._noted.add(sentence)
            self.understood.append(sentence)

    def many(self, where: str, places: Iterable[str], what: str) -> None:
        """Note one problem that many places in one location have, with the first names."""
        names = list(places)
        if names:
            self.problem(where, f"{what}: {natural_list(names)}")

    def warnings(self) -> tuple[str, ...]:
        """Return the warnings, which do not prevent training."""
        if not self.not_images:
            return tuple(self.left_out)
        names = natural_list(printable(name) for name in self.not_images)
        return (f"{plural(len(self.not_images), 'file')} not named like an image, left out: {names}", *self.left_out)
