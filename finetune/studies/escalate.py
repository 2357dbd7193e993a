"""Method ``auto``: start with the solved head, train more stages as long as that improves the metric, keep the best candidate.

Each candidate starts from the pretrained weights and is evaluated on the same validation images, so the difference between two
candidates is a paired one. The next candidate is tried only if the last one's gain over the best before it exceeds its standard
error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.evaluation.paired import Gain, paired_gain
from finetune.evaluation.predictions import read
from finetune.runs.options import RunOptions
from finetune.runs.outcome import Outcome
from finetune.spec import Full, JobSpec, LinearProbe, Method, Partial
from finetune.storage.rundir import RunDir
from finetune.studies.study import Child


@dataclass(frozen=True)
class Escalation:
    """The study of method ``auto``: candidates in order of increasing cost, each compared with the best one before it."""

    candidates: tuple[Child, ...]
    run: RunDir

    kind = "auto"
    n_children = None

    def next_children(self, finished: Mapping[str, Outcome]) -> Sequence[Child]:
        n_done = sum(child.name in finished for child in self.candidates)
        gains = self.gains(n_done)
        stopped = bool(gains) and not gains[-1][1].pays
        return [] if stopped or n_done == len(self.candidates) else [self.candidates[n_done]]

    def gains(self, n_done: int) -> list[tuple[str, Gain]]:
        """Return for each of the first `n_done` candidates but the first its name and its gain over the best one before it."""
        best, found = 0, []
        for index in range(1, n_done):
            tables = [read(self.run.child(self.candidates[i].name).predictions_of("val")) for i in (index, best)]
            gain = paired_gain(*tables)
            found.append((self.candidates[index].name, gain))
            best = index if gain.gain > 0 else best
        return found

    def kept(self, n_done: int) -> str:
        """Return the name of the best of the first `n_done` candidates."""
        better = [name for name, gain in self.gains(n_done) if gain.gain > 0]
        return better[-1] if better else self.candidates[0].name

    def reasons(self, n_done: int) -> list[str]:
        """Return one phrase for each comparison, such as "partial gained +1.2 ± 0.8 points of val top1"."""
        gains = self.gains(n_done)
        phrases = [f"{name} gained {gain}" for name, gain in gains]
        if gains and not gains[-1][1].pays:
            phrases[-1] += ", so no more stages are trained"
        return phrases


def escalation(spec: JobSpec, n_stages: int, options: RunOptions, run: RunDir) -> Escalation:
    """Return the study of method ``auto`` for a backbone with `n_stages` stages: linear probe, partial, full.

    Args:
        options: of the study; its splits to evaluate on are passed to the candidates.
        run: the study's folder.
    """
    methods: list[Method] = [LinearProbe(), *([Partial(stages=1)] if n_stages > 1 else []), Full()]
    return Escalation(
        tuple(
            Child(
                name=method.type,
                title=method.type,
                spec=spec.model_copy(update={"method": method}),
                options=RunOptions(goal="judged", judged=options.judged),
            )
            for method in methods
        ),
        run,
    )
