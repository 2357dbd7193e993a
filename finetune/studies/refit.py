"""The refit: one run chooses on val, then another trains on train and val together, with what was chosen.

Val figures are the choosing run's (of images that a model was trained on they could only flatter it), test figures the refitted
model's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.runs.options import RunOptions
from finetune.runs.outcome import Outcome
from finetune.spec import JobSpec, parse_spec
from finetune.storage.files import read_json
from finetune.storage.rundir import RunDir
from finetune.studies.study import Child, kept_run

CHOOSE, REFIT = "choose", "refit"


@dataclass(frozen=True)
class Refit:
    """First the run that chooses, then the run on everything."""

    spec: JobSpec  # without the wish to refit
    run: RunDir

    kind = "refit"
    n_children = None

    def following(self, finished: Mapping[str, Outcome]) -> Sequence[Child]:
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
