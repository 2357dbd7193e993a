"""The request for a fine-tuning job: one validated, immutable value for the command line, HTTP and Python. Torch-free.

A YAML file, CLI flags with ``--set key.path=value``, Python keywords and an HTTP body all become a mapping. `parse_spec` converts
a mapping to a `JobSpec`, or reports all problems at once. ``auto`` values stay ``auto`` here; `finetune.training.recipe` resolves
them from facts about the data, the backbone and the machine.
"""

from finetune.spec.backbones import DEFAULT_BACKBONE, LOCAL_FOLDER, ON_HUB, absolute_backbone, is_own_model, is_registered_model
from finetune.spec.job import METHOD_SECTIONS, JobSpec, fields_called, parse_spec
from finetune.spec.problems import problems_of
from finetune.spec.reading import load_spec, merged_mapping, with_settings
from finetune.spec.sections import (
    METHODS,
    SUFFIX_PATTERN,
    AutoMethod,
    DataSpec,
    ExportSpec,
    Full,
    Gradual,
    Hyperparameters,
    LinearProbe,
    Method,
    MethodName,
    Partial,
    Section,
)
from finetune.spec.tasks import LOSSES

__all__ = [
    "DEFAULT_BACKBONE",
    "LOCAL_FOLDER",
    "LOSSES",
    "METHODS",
    "METHOD_SECTIONS",
    "ON_HUB",
    "SUFFIX_PATTERN",
    "AutoMethod",
    "DataSpec",
    "ExportSpec",
    "Full",
    "Gradual",
    "Hyperparameters",
    "JobSpec",
    "LinearProbe",
    "Method",
    "MethodName",
    "Partial",
    "Section",
    "absolute_backbone",
    "fields_called",
    "is_own_model",
    "is_registered_model",
    "load_spec",
    "merged_mapping",
    "parse_spec",
    "problems_of",
    "with_settings",
]
