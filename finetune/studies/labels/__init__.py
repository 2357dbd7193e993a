"""The labels study: how accuracy grows with the number of labelled images, and what more of them would bring."""

from finetune.studies.labels.study import LabelsStudy, study_labels, write_page

__all__ = ["LabelsStudy", "study_labels", "write_page"]
