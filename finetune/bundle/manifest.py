"""The manifest of a bundle, ``bundle.json``: its fields, reading, writing and validation. Torch-free."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from finetune.bundle.preprocess import Preprocess, problems_of
from finetune.errors import BundleError, Problem
from finetune.storage.files import sha256_file, write_json
from finetune.tasks import task_named

SCHEMA_VERSION = 1

MANIFEST = "bundle.json"
MODEL = "model.onnx"
SELF_TEST = "probe.npz"
NOVELTY = "novelty.npz"  # the subspace of the embeddings of known images; not in every bundle
DRIFT = "drift.npz"  # predictions on held-out images, to compare live ones with (`finetune.monitoring`); not in every bundle
WEIGHTS = "weights.safetensors"  # for further training and other formats (`finetune.bundle.weights`); not in older bundles
THRESHOLDS = "thresholds"
"""The key in ``calibration`` of the probability thresholds of a multilabel model, in the order of the classes."""
CARD = "README.md"  # the model card; not in bundles of earlier versions

METADATA_PREFIX = "finetune."
_NOT_IN_MODEL = ("name", "version", "files", "abstain")  # set after model.onnx is written, by the registry or from its checksum

OutputName = Literal["probs", "logits", "cam", "embedding"]
_REQUIRED_OUTPUTS = ("probs", "logits", "embedding")

_Name = Annotated[str, Field(min_length=1)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]


@dataclass(frozen=True)
class Manifest:
    """The content of ``bundle.json``."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: _Name
    version: str | None  # set by the registry; None before
    created_at: float  # Unix seconds
    classes: Annotated[tuple[_Name, ...], Field(min_length=1)]  # in the order of the model's outputs
    preprocess: Preprocess
    backbone: dict[str, Any]  # name, weights {source, identifier, sha256, license}, n_parameters
    method: dict[str, Any]
    spec_digest: str
    outputs: tuple[OutputName, ...]  # in the order of the model's outputs
    cam: dict[str, Any]  # available, kind: linear | layernorm | None, reason
    metrics: dict[str, float] = field(default_factory=dict)  # val/top1 …
    calibration: dict[str, Any] = field(default_factory=dict)  # temperature, thresholds, held_out (`finetune.bundle.calibration`)
    parity: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, Any] = field(default_factory=dict)  # stages, digest_before, digest_after
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that the bundle was made with
    model: dict[str, Any] = field(default_factory=lambda: {"input_name": "images"})  # opset, exporter, input_name
    files: dict[_FileName, _Sha256] = field(default_factory=dict)
    abstain: dict[Literal["precision"], float] = field(default_factory=dict)  # set by the owner to switch abstention on
    task: str = "multiclass"  # older bundles do not contain it
    schema_version: int = SCHEMA_VERSION

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        """Check that the fields do not contradict each other."""
        twice = sorted({label for label in self.classes if self.classes.count(label) > 1})
        if twice:
            raise ValueError(f"classes {twice} are listed twice")
        missing = [output for output in _REQUIRED_OUTPUTS if output not in self.outputs]
        if missing or len(set(self.outputs)) != len(self.outputs):
            raise ValueError(
                f"outputs {list(self.outputs)} must contain each of {list(_REQUIRED_OUTPUTS)} once, and may contain cam"
            )
        if bool(self.cam.get("available")) != ("cam" in self.outputs):
            raise ValueError(f"cam.available is {self.cam.get('available')}, but outputs are {list(self.outputs)}")
        if "name" not in self.backbone:
            raise ValueError("backbone must have a name")
        thresholds = self.calibration.get(THRESHOLDS)
        if thresholds is not None and not (
            len(thresholds) == len(self.classes) and all(isinstance(one, int | float) and 0 <= one <= 1 for one in thresholds)
        ):
            raise ValueError(f"calibration.thresholds must be one probability for each of the {len(self.classes)} classes")
        if "input_name" not in self.model:
            raise ValueError("model must have an input_name")
        return self

    @property
    def reference(self) -> str:
        """``name@version``; only the name if the bundle is not registered."""
        return self.name if self.version is None else f"{self.name}@{self.version}"

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """The probability thresholds of the labels that were chosen on held-out images; None if there are none."""
        found = self.calibration.get(THRESHOLDS)
        return None if found is None else tuple(found)

    @property
    def label_thresholds(self) -> tuple[float, ...] | None:
        """The probability from which on each label is given: `thresholds`, else the task's; None if the task decides without."""
        return self.thresholds or task_named(self.task).default_thresholds(len(self.classes))

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as JSON values."""
        loaded: dict[str, Any] = json.loads(self.to_json())
        return loaded

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Return the manifest in a JSON document.

        Raises:
            BundleError: the text is not JSON, has another schema version, or has invalid fields; the problems name them.
        """
        given = _parsed(text)
        version = given.get("schema_version")
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            hint = "It was written by a newer finetune: upgrade this one" if newer else "Export the bundle again"
            raise BundleError(f"{MANIFEST} has schema_version {version!r}, this finetune reads {SCHEMA_VERSION}. {hint}")
        try:
            return _ADAPTER.validate_json(text, strict=True)
        except ValidationError as error:
            raise BundleError(f"{MANIFEST} is not valid. Export the bundle again", problems_of(error)) from None

    def model_metadata(self) -> dict[str, str]:
        """Return the ``metadata_props`` of the ONNX file, which describe it even without the bundle: each field as JSON."""
        return {
            METADATA_PREFIX + key: json.dumps(value, ensure_ascii=False, sort_keys=True)
            for key, value in self.to_dict().items()
            if key not in _NOT_IN_MODEL
        }


_ADAPTER = TypeAdapter(Manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read ``bundle.json`` of a bundle folder.

    Raises:
        BundleError: there is no manifest, or it is not valid; the message names the folder.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(f"{folder}: not a bundle, {MANIFEST} cannot be read ({error.strerror})") from None
    try:
        return Manifest.from_json(text)
    except BundleError as error:
        raise BundleError(f"{folder}: {error.message}", error.problems) from None


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Add the sha256 of each file in `folder` to the manifest, validate it and write it, which makes the folder a bundle.

    Raises:
        BundleError: a file is missing, or the manifest is not valid.
    """
    missing = [name for name in (MODEL, SELF_TEST) if not (folder / name).is_file()]
    if missing:
        raise BundleError(f"{folder}: cannot become a bundle without {' and '.join(missing)}")
    present = [name for name in (MODEL, SELF_TEST, NOVELTY, DRIFT, WEIGHTS, CARD) if (folder / name).is_file()]
    hashed = dataclasses.replace(manifest, files={name: sha256_file(folder / name) for name in present})
    checked = Manifest.from_json(hashed.to_json())
    write_json(folder / MANIFEST, checked.to_dict())
    return checked


def metadata_problems(manifest: Manifest, metadata: Mapping[str, str]) -> list[Problem]:
    """Return a problem for each field that differs between the metadata of the model file and the manifest.

    Fields that the model file does not contain are not compared.
    """
    expected = manifest.to_dict()
    problems = []
    for key, text in metadata.items():
        name = key.removeprefix(METADATA_PREFIX)
        if key.startswith(METADATA_PREFIX) and name in expected and _parsed_value(text) != expected[name]:
            problems.append(
                Problem(name, f"{MANIFEST} says {_short(expected[name])}, {MODEL} says {_short(_parsed_value(text))}")
            )
    return problems


def _parsed(text: str | bytes) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{MANIFEST} is not JSON: {error}") from None
    except RecursionError:
        raise BundleError(f"{MANIFEST} is nested too deeply to be a manifest") from None
    if not isinstance(given, dict):
        raise BundleError(f"{MANIFEST} must be a JSON object, found {type(given).__name__}")
    return given


def _parsed_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"
