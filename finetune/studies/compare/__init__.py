"""Comparisons: arms trained on the same split, judged on the same test images, with a verdict."""

from finetune.studies.compare.existing import compare_runs
from finetune.studies.compare.study import compare, finished_before

__all__ = ["compare", "compare_runs", "finished_before"]
