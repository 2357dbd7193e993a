"""The refit: a first run makes its choices on val, then a second run trains on train and val together with these choices.

The metrics on val are those of the first run, because they would be optimistic for a model that was trained on val. The metrics
on test are those of the second run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.runs.options import RunOptions
from finetune.runs.outcome import Outcome
from finetune.spec import JobSpec, parse_spec
from finetune.storage.files import read_json
from finetune.storage.rundir import RunDir, kept_run
from finetune.studies.study import Child

CHOOSE, REFIT = "choose", "refit"


@dataclass(frozen=True)
class Refit:
    """The study of a refit: the run that makes the choices, then the run that trains on train and val."""

    spec: JobSpec  # with `hyperparameters.refit` switched off
    run: RunDir

    kind = "refit"
    n_children = None

    def next_children(self, finished: Mapping[str, Outcome]) -> Sequence[Child]:
        if CHOOSE not in finished:
            options = RunOptions(goal="judged", judged=("val",))
            return [Child(CHOOSE, "choosing", self.spec, options)]
        if REFIT not in finished:
            chose = kept_run(self.run.child(CHOOSE))
            carried_out = parse_spec({**self.spec.model_dump(mode="json"), "method": read_json(chose.resolved)["spec"]["method"]})
            decided_by = os.path.relpath(chose.root, self.run.child(REFIT).root)
            options = RunOptions(goal="judged", decided_by=decided_by, judged=("test",))
            return [Child(REFIT, "refit", carried_out, options)]
        return []
