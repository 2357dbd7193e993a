"""The depth study: train plain and residual networks of increasing depth on the user's images, to show degradation."""

from finetune.studies.depth.request import DepthRequest
from finetune.studies.depth.study import study_depth

__all__ = ["DepthRequest", "study_depth"]
