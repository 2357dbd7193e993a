"""Record an untrained network, so that later runs can solve a head on it and export it without torch. Torch-free.

A run that exports a solved head, and finds that the export agrees with torch, writes two files into the store of networks that
all workspaces of a user share: a template, which is the exported graph without its head (`finetune.export.template`), and a
record of the backbone's facts, its digests and the state of its weights file. Their key is a digest of everything that determines
what the network computes: the model section of the request, the task, the versions of the libraries, and the source code in this
package that builds and traces networks. The images and the number of classes are not part of it.

The embeddings that torch computed for the compared images are cached with the features of the workspace, under an engine name of
their own. The export of a later run is compared with them if it is compared on the same images, and else with the features that
its head was solved on, which the recorded graph has computed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.manifest import MANIFEST
from finetune.bundle.predictor import Outputs
from finetune.bundle.preprocess import Preprocess
from finetune.bundle.weights import open_origin
from finetune.data.dataset import Sample
from finetune.errors import DiskFull
from finetune.events import EventCallback
from finetune.export.agreement import Reference
from finetune.export.template import Head, with_head
from finetune.features.engine import Engine, OnnxEngine, Prefix, only_embedding, onnx_engine_name
from finetune.features.rows import FeatureContext, Views, find_rows, pooled_features, store_rows
from finetune.features.solve import head_logits
from finetune.messages import plural
from finetune.model.facts import BackboneFacts
from finetune.model.packages import package_of
from finetune.model.tensors import Tensors, backbone_tensors, read_tensors
from finetune.runtime.device import Device
from finetune.runtime.session import open_session
from finetune.spec import LOCAL_FOLDER, JobSpec, is_own_model, is_registered_model
from finetune.storage.files import read_json, write_atomic, write_json
from finetune.storage.store import Store, mark_used
from finetune.tasks import task_named

SCHEMA_VERSION = 3

_LIBRARIES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime")
_PACKAGE = Path(__file__).resolve().parent.parent
_CODE = ("model/*.py", "training/objectives/*.py", "features/prefix.py", "export/graph.py", "export/template.py")


@dataclass(frozen=True)
class Record:
    """The facts of a recorded network; its graph is in the template."""

    task: str
    facts: BackboneFacts
    embedding_digest: str  # `Prefix.digest` of the whole backbone with pooling
    frozen_digest: str
    exporter: str
    torch: str  # version
    n_compared: int  # images on which an export was compared with torch before the network was recorded
    weights_file: Mapping[str, Any] | None  # from `file_state`; None if the weights are not in a file
    seed: int  # that a backbone without pretrained weights was initialised with

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "facts": self.facts.to_dict()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Record:
        """Return the inverse of `to_dict`, also for values from JSON, in which tuples are lists."""
        return cls(**{**given, "facts": BackboneFacts.from_dict(given["facts"])})


@dataclass(frozen=True)
class KnownNetwork:
    """A `Network` that an earlier run recorded."""

    record: Record
    template: bytes
    store: Store  # of the features

    @property
    def facts(self) -> BackboneFacts:
        return self.record.facts

    @property
    def exporter(self) -> str:
        return self.record.exporter

    @property
    def prefix(self) -> Prefix:
        return _KnownPrefix(self)

    @property
    def seed(self) -> int:
        return self.record.seed

    def try_export(self) -> None:
        """Do nothing: the network was exported when it was recorded."""

    def frozen_digest(self) -> str:
        """Return the digest that torch computed when the network was recorded; `find_known` verifies the template."""
        return self.record.frozen_digest

    def with_head(self, head: Head, temperature: float) -> bytes:
        return with_head(self.template, head, temperature)

    def tensors(self) -> Tensors:
        """Return the tensors in the bundle of the user's model that the network starts from; none if it starts from another."""
        if self.facts.weights["source"] != "model":
            return {}
        assert self.record.weights_file is not None, "the weights of one's own model are in a file"
        return backbone_tensors(read_tensors(open_origin(Path(self.record.weights_file["path"]).parent)))

    def begin_reference(self, samples: Sequence[Sample], preprocess: Preprocess) -> None:
        """Do nothing: the embeddings are in the cache."""

    def reference(
        self, head: Head, temperature: float, samples: Sequence[Sample], images: NDArray[np.uint8], preprocess: Preprocess
    ) -> Reference:
        """Apply the head to the embeddings that torch computed in an earlier run; for other images, to the features."""
        torch = self.record.torch
        stored = find_rows(self.prefix, samples, preprocess, reference_engine(torch), self.store)
        if len(stored.missing):
            embedding = pooled_features(self.prefix, samples, Views(preprocess), FeatureContext(self.store))
            computed_by = (
                "the features that the head was solved on, from a graph that was compared with torch "
                f"{torch} on {plural(self.record.n_compared, 'image')} in an earlier run"
            )
        else:
            embedding = stored.take(np.arange(len(samples)))
            computed_by = f"embeddings by torch {torch} in an earlier process, with this head"
        logits = head_logits(embedding, head.weight, head.bias)
        probs = task_named(self.record.task).probabilities(logits, temperature).astype(np.float32)
        return Reference(Outputs(probs, logits, embedding, cam=None), head.bias, computed_by)


@dataclass(frozen=True)
class _KnownPrefix:
    """A prefix that computes embeddings with the recorded template, which was compared with torch when it was recorded."""

    network: KnownNetwork

    @property
    def backbone(self) -> str:
        return self.network.facts.name

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (self.network.facts.n_features,)

    @property
    def digest(self) -> str:
        return self.network.record.embedding_digest

    def expected_engine(self, device: Device, folder: Path) -> str:
        return onnx_engine_name()

    def open_engine(self, images: NDArray[np.uint8], device: Device, folder: Path, event: EventCallback) -> Engine:
        any_head = Head(np.zeros((1, *self.row_shape), np.float32), np.zeros(1, np.float32))
        return OnnxEngine(open_session(only_embedding(self.network.with_head(any_head, 1.0))))


def network_key(spec: JobSpec, task: str, models: Path) -> str:
    """Return the key of the network that a request starts from: a digest of everything that determines what it computes.

    Args:
        models: the folder of the workspace's models, one of which the request may name.
    """
    package = package_of(spec.model.backbone)
    parts = (
        SCHEMA_VERSION,
        spec.model.model_dump_json(),
        str(Path(spec.model.weights).absolute()),  # a relative path names different files in different working directories
        _state_of_folder(spec.model.backbone),
        str(models) if is_registered_model(spec.model.backbone) else None,
        task,
        spec.seed if spec.model.weights == "none" else None,  # initialises a backbone that is not pretrained
        package.version() if package else None,
        *(importlib.metadata.version(name) for name in _LIBRARIES),
        _code_digest(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _state_of_folder(backbone: str) -> list[dict[str, Any] | None]:
    """Return the state of the files that describe a backbone in a local folder; empty if its name alone identifies it."""
    if backbone.startswith(LOCAL_FOLDER):
        return [file_state(str(Path(backbone.removeprefix(LOCAL_FOLDER)).absolute() / "config.json"))]
    if is_own_model(backbone) and not is_registered_model(backbone):
        return [file_state(str(Path(backbone).absolute() / name / MANIFEST)) for name in (".", "bundle")]
    return []


def find_known(key: str, networks: Store, store: Store) -> KnownNetwork | None:
    """Return the network recorded under `key`; None if there is none, or if its template or weights file has changed since.

    Args:
        networks: where networks are recorded.
        store: where its features will be cached.
    """
    folder = _folder(key, networks)
    try:
        document = read_json(folder / "network.json")
        template = (folder / "template.onnx").read_bytes()
    except FileNotFoundError:  # never recorded, or deleted to make room
        return None
    if document["template_sha256"] != hashlib.sha256(template).hexdigest():
        return None
    record = Record.from_dict(document["record"])
    if record.weights_file != file_state(record.weights_file["path"] if record.weights_file else None):
        return None
    with contextlib.suppress(FileNotFoundError):
        mark_used(folder / "network.json")
        mark_used(folder / "template.onnx")
    return KnownNetwork(record, template, store)


def record_network(
    key: str,
    record: Record,
    template: bytes,
    prefix: Prefix,
    embedding: NDArray[np.float32],
    samples: Sequence[Sample],
    preprocess: Preprocess,
    networks: Store,
    store: Store,
) -> None:
    """Record a network for later runs, and cache torch's embeddings (N, D) of N samples, as far as the stores have room.

    Args:
        networks: for the network.
        store: for the embeddings.
    """
    folder = _folder(key, networks)
    document = {"template_sha256": hashlib.sha256(template).hexdigest(), "record": record.to_dict()}
    # On a full disk nothing is recorded, and the next run builds the network in torch.
    with contextlib.suppress(DiskFull):
        store_rows(embedding, prefix, samples, preprocess, reference_engine(record.torch), store)
        if networks.reserve(len(template)):
            write_atomic(folder / "template.onnx", lambda stream: stream.write(template))
            write_json(folder / "network.json", document)


def file_state(path: str | None) -> dict[str, Any] | None:
    """Return path, size and modification time of a file, to notice later that it has changed; None if there is no such file."""
    if path is None or not Path(path).is_file():
        return None
    status = Path(path).stat()
    return {"path": path, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def reference_engine(torch_version: str) -> str:
    """Return the engine name of the embeddings that exports are compared with. Heads are never solved on these embeddings."""
    return f"torch {torch_version} cpu float32, as the reference of exports"


def _folder(key: str, networks: Store) -> Path:
    return networks.folder("engines") / f"network-{key}"


@functools.cache
def _code_digest() -> str:
    """Return the sha256 of the source code that determines what a network computes and how it is traced."""
    digest = hashlib.sha256()
    for pattern in _CODE:
        paths = sorted(_PACKAGE.glob(pattern))
        assert paths, f"{pattern} is the code of no network: it was moved"
        for path in paths:
            digest.update(path.read_bytes())
    return digest.hexdigest()
