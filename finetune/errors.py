"""The tree of all errors that finetune raises on purpose.

    FinetuneError                    code               exit  HTTP
    ├── InvalidInput                 invalid_input         2   422   the user gave something that cannot work
    │   ├── SpecError                invalid_spec          2   422   the job request: carries every problem with its field path
    │   ├── DataError                invalid_data          2   422   a dataset that cannot be trained on
    │   │   └── DataChangedError     data_changed          2   422   data that has changed since the run began
    │   ├── ImageError               invalid_image         2   422   one image that cannot be decoded under the limits
    │   │   ├── ImageTooLarge        image_too_large       2   413   more bytes or pixels than allowed
    │   │   └── UnsupportedImage     unsupported_image     2   415   not one of the image formats that are read
    │   ├── UnknownBackbone          unknown_backbone      2   422   no such timm architecture
    │   └── WeightsError             weights_unavailable   2   422   pretrained weights that cannot be obtained or do not fit
    ├── NotFound                     not_found             2   404   a run, bundle, model, file or job that does not exist
    ├── Conflict                     conflict              1   409   an action that the present state does not allow
    ├── BundleError                  invalid_bundle        1   409   a bundle that fails its checksums or its self-test
    ├── ExportError                  export_failed         1   500   a model that ONNX cannot express or that differs there
    ├── TrainingError                training_failed       1   500   training that cannot continue (diverged)
    │   ├── OutOfMemory              out_of_memory         1   500   training that needs more memory than there is
    │   └── NoBetterThanChance       no_better_than_chance 1   500   a model that is not registered, because it learnt nothing
    ├── CheckpointError              checkpoint_invalid    1   500   a checkpoint that does not belong to this run
    ├── StoreError                   store_unusable        1   503   a job database that is damaged, newer, or out of reach
    ├── ExecutorError                executor_unavailable  1   503   an executor (a Ray cluster) that does not respond or refuses
    ├── DiskFull                     disk_full             1   503   no space left where a result must be written
    ├── DamagedFile                  file_damaged          1   500   a file of a run or workspace that is not what finetune wrote
    └── MissingExtra                 missing_extra         2   501   a command whose optional dependencies are not installed

A message says what was given, where, what is allowed and what to try next. ``code`` is stable: clients branch on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar


@dataclass(frozen=True)
class Problem:
    """One mistake and its place: a field path (``method.stages``), a file, or a row."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class FinetuneError(Exception):
    """The base class of all errors; never raised itself."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, problems: Iterable[Problem] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.problems: tuple[Problem, ...] = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {problem}" for problem in self.problems)])


class InvalidInput(FinetuneError):
    code, exit_code, http_status = "invalid_input", 2, 422


class SpecError(InvalidInput):
    code = "invalid_spec"


class DataError(InvalidInput):
    code = "invalid_data"


class DataChangedError(DataError):
    code = "data_changed"


class ImageError(InvalidInput):
    code = "invalid_image"


class ImageTooLarge(ImageError):
    code, http_status = "image_too_large", 413


class UnsupportedImage(ImageError):
    code, http_status = "unsupported_image", 415


class UnknownBackbone(InvalidInput):
    code = "unknown_backbone"


class WeightsError(InvalidInput):
    code = "weights_unavailable"


class NotFound(FinetuneError):
    code, exit_code, http_status = "not_found", 2, 404


class Conflict(FinetuneError):
    code, http_status = "conflict", 409


class BundleError(FinetuneError):
    code, http_status = "invalid_bundle", 409


class ExportError(FinetuneError):
    code = "export_failed"


class TrainingError(FinetuneError):
    code = "training_failed"


class NoBetterThanChance(TrainingError):
    code = "no_better_than_chance"


class OutOfMemory(TrainingError):
    code = "out_of_memory"


class CheckpointError(FinetuneError):
    code = "checkpoint_invalid"


class StoreError(FinetuneError):
    code, http_status = "store_unusable", 503


class ExecutorError(FinetuneError):
    code, http_status = "executor_unavailable", 503


class DiskFull(FinetuneError):
    code, http_status = "disk_full", 503


class DamagedFile(FinetuneError, ValueError):
    """Also a `ValueError`, because readers of caches and journals treat any undecodable content alike."""

    code = "file_damaged"


class NotReady(FinetuneError):
    code, http_status = "not_ready", 503


class Overloaded(FinetuneError):
    code, http_status = "overloaded", 503


class MissingExtra(FinetuneError):
    code, exit_code, http_status = "missing_extra", 2, 501


def error_of(record: Mapping[str, Any]) -> FinetuneError:
    """Return the error that another process recorded in ``error.json``."""
    problems = [Problem(**problem) for problem in record.get("problems", ())]
    kinds: list[type[FinetuneError]] = [FinetuneError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    found = next((kind for kind in kinds if kind.code == record["code"]), FinetuneError)
    return found(str(record["message"]), problems)


def did_you_mean(given: str, allowed: Sequence[str]) -> str:
    """Return `` Did you mean 'resnet18'?`` for a similar allowed name, or an empty string."""
    near = get_close_matches(given, allowed, n=3, cutoff=0.6)
    if not near:
        return ""
    return " Did you mean " + " or ".join(repr(name) for name in near) + "?"
