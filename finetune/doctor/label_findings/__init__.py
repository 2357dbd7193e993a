"""The examination of the labels of each task, by the task's name. One module for each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from finetune.doctor.examined_data import ExaminedData
from finetune.doctor.finding import Finding
from finetune.doctor.label_findings.multiclass import multiclass_findings
from finetune.doctor.label_findings.multilabel import multilabel_findings
from finetune.doctor.looks import Look


class LabelFindings(Protocol):
    """Examines what the labels say of the images; see `finetune.doctor.examine`."""

    def __call__(self, data: ExaminedData, looks: Mapping[str, Look], /) -> Iterator[Finding]:
        """Yield the findings, and record in `data` the confidence of the labels and the time that was taken.

        Args:
            looks: facts about the images by the sha256 of their bytes.
        """
        ...


LABEL_FINDINGS: Mapping[str, LabelFindings] = {"multiclass": multiclass_findings, "multilabel": multilabel_findings}


def label_findings(task: str) -> LabelFindings:
    """Return the examination of the task with this name; every task in `finetune.tasks` has one."""
    return LABEL_FINDINGS[task]


__all__ = ["LABEL_FINDINGS", "LabelFindings", "label_findings"]
