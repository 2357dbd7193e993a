"""One module for each kind of finding. Register a new one in `CHECKS`, where causes come before their consequences."""

from __future__ import annotations

from finetune.evaluation.diagnose.checks.collapsed_classes import CollapsedClasses
from finetune.evaluation.diagnose.checks.dead_units import DeadUnits
from finetune.evaluation.diagnose.checks.degradation import Degradation
from finetune.evaluation.diagnose.checks.exploding_gradients import ExplodingGradients
from finetune.evaluation.diagnose.checks.frozen_stage import FrozenStage
from finetune.evaluation.diagnose.checks.leakage import Leakage
from finetune.evaluation.diagnose.checks.learning_rate_high import LearningRateHigh
from finetune.evaluation.diagnose.checks.learning_rate_low import LearningRateLow
from finetune.evaluation.diagnose.checks.overconfidence import Overconfidence
from finetune.evaluation.diagnose.checks.overfitting import Overfitting
from finetune.evaluation.diagnose.checks.preprocessing import WrongPreprocessing
from finetune.evaluation.diagnose.checks.shuffled_labels import ShuffledLabels
from finetune.evaluation.diagnose.checks.underfitting import Underfitting
from finetune.evaluation.diagnose.checks.vanishing_gradients import VanishingGradients
from finetune.evaluation.diagnose.finding import Check

CHECKS: tuple[Check, ...] = (
    WrongPreprocessing(),
    ShuffledLabels(),
    Leakage(),
    FrozenStage(),
    LearningRateHigh(),
    LearningRateLow(),
    VanishingGradients(),
    ExplodingGradients(),
    DeadUnits(),
    CollapsedClasses(),
    Degradation(),
    Underfitting(),
    Overfitting(),
    Overconfidence(),
)

__all__ = ["CHECKS"]
