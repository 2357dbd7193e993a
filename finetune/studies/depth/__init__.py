"""The depth study: what becomes of plain and of residual networks as they get deeper, on the user's own images."""

from finetune.studies.depth.request import DepthRequest
from finetune.studies.depth.study import study_depth

__all__ = ["DepthRequest", "study_depth"]
