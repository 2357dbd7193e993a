"""The labels study: measure how accuracy grows with the number of labelled images, and predict the gain from more of them."""

from finetune.studies.labels.study import LabelsStudy, study_labels, write_page

__all__ = ["LabelsStudy", "study_labels", "write_page"]
