"""What a study asks of one of its runs beyond the job spec. It is written into the run folder, where a resumed run reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from finetune.storage.files import read_json, write_json
from finetune.storage.rundir import RunDir

Goal = Literal["judged", "exported", "registered"]
GOALS: tuple[Goal, ...] = ("judged", "exported", "registered")  # each includes those before it


@dataclass(frozen=True)
class RunOptions:
    """How far a run goes, and which choices it takes over from another run.

    Args:
        goal: ``judged``: train and evaluate. ``exported``: also write the bundle. ``registered``: also register it as a model
            version.
        decided_by: path, relative to the run folder, of a finished run of the same request whose choices are used. Then nothing
            is chosen on validation images, and the model is trained on them too.
        judged: the splits to evaluate the model on, if the data has them.
        sample_size: number of training images that are predicted at some steps for the diagnosis; None: as many as cost little.
    """

    goal: Goal = "registered"
    decided_by: str | None = None
    judged: tuple[str, ...] = ("val", "test")
    sample_size: int | None = None

    def reaches(self, goal: Goal) -> bool:
        """Return whether a run with these options goes as far as `goal`."""
        return GOALS.index(self.goal) >= GOALS.index(goal)

    def write(self, run: RunDir) -> None:
        """Write the options into a run folder."""
        write_json(run.options, asdict(self))

    @classmethod
    def read(cls, run: RunDir) -> RunOptions:
        """Return the options in a run folder; the defaults if it has none."""
        if not run.options.exists():
            return cls()
        given = read_json(run.options)
        return cls(**{**given, "judged": tuple(given["judged"])})
