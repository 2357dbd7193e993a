"""Compare methods or models (arms) that are trained on the same split and evaluated on the same test images."""

from finetune.studies.compare.existing import compare_runs
from finetune.studies.compare.study import compare, finished_before

__all__ = ["compare", "compare_runs", "finished_before"]
