"""The state that all routes of one server share: models, the job database, queues and limits."""

from __future__ import annotations

import html
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy import Engine

from finetune.bundle.access import Access
from finetune.bundle.image_limits import ImageLimits
from finetune.bundle.registry import Registry
from finetune.errors import DiskFull, StoreError
from finetune.jobs.database import open_jobs
from finetune.jobs.files import FileStore
from finetune.jobs.keys import KeyStore
from finetune.jobs.sending import Reachable
from finetune.jobs.store import JobStore
from finetune.jobs.webhooks import WebhookStore
from finetune.runtime.tracing import Tracing
from finetune.storage.rundir import RunDir
from service.acknowledgements import Acknowledgements
from service.admission import WorkQueue
from service.drift import DriftWatch
from service.event_streams import EventStreams
from service.exports import Exporter
from service.metrics import Metrics
from service.middleware.auth import Caller
from service.models import LoadedModel, LoadedModels, no_such_model
from service.part_uploads import PartUploads
from service.pictures import PictureIndex
from service.plans import Planner
from service.samples import InputSampler
from service.shadows import Shadows
from service.spec_check import SpecChecker
from service.uploads import Uploads

_MAX_REMEMBERED = 10_000


class Database:
    """The job database and its stores, opened on first use, so that importing the service opens nothing."""

    def __init__(self, home: Path) -> None:
        self.home = home

    @cached_property
    def engine(self) -> Engine:
        return open_jobs(self.home)

    @cached_property
    def jobs(self) -> JobStore:
        return JobStore(self.engine)

    @cached_property
    def files(self) -> FileStore:
        return FileStore(self.engine)

    @cached_property
    def keys(self) -> KeyStore:
        return KeyStore(self.engine)

    @cached_property
    def webhooks(self) -> WebhookStore:
        return WebhookStore(self.engine)


class ModelAccess:
    """The access rights of models, cached for a second, since every prediction needs them."""

    def __init__(self, registry: Registry, remember_seconds: float = 1.0) -> None:
        self._registry = registry
        self._remember_seconds = remember_seconds
        self._known: dict[str, tuple[float, Access]] = {}

    def forget(self, model: str) -> None:
        """Remove the access rights of a model from the cache."""
        self._known.pop(model, None)

    def of(self, model: str) -> Access:
        """Return the access rights of a model."""
        now = time.monotonic()
        until, access = self._known.get(model, (0.0, Access()))
        if now >= until:
            access = self._registry.access(model)
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            self._known[model] = (now + self._remember_seconds, access)
        return access


@dataclass(frozen=True)
class ServerState:
    """The shared state of one server's routes, available as ``app.state.server``."""

    home: Path
    models: LoadedModels
    access: ModelAccess
    metrics: Metrics
    queue: WorkQueue
    shadows: Shadows
    drift: DriftWatch
    samples: InputSampler
    image_limits: ImageLimits
    database: Database
    event_streams: EventStreams
    uploads: Uploads
    part_uploads: PartUploads
    checks: WorkQueue
    spec_checker: SpecChecker
    pictures: PictureIndex
    planner: Planner
    exporter: Exporter
    webhooks_reach: Reachable = field(default_factory=Reachable)
    tracing: Tracing | None = None
    data_roots: tuple[Path, ...] = ()
    hub_models: bool = False
    max_files_bytes: int = 20 << 30
    max_unfinished_jobs: int = 100

    @property
    def acknowledgements(self) -> Acknowledgements:
        return Acknowledgements(self.home / "acknowledged")

    def run_of(self, job_id: str) -> RunDir:
        """Return the run folder of a job."""
        return RunDir(self.home / "runs" / job_id)

    def stored_bytes(self, owner: str) -> int:
        """Return the disk space of an owner's uploads, finished jobs and models."""
        return self.database.files.stored_bytes(owner) + self.models.registry.owned_bytes(owner)

    def dataset_name(self, folder: Path) -> str:
        """Return the display name of a dataset: the uploaded file's name without suffix, or the folder's name."""
        if folder.parent == self.uploads.folder.resolve():
            return self.database.files.get(folder.name).filename.split(".")[0]
        return folder.name

    def without_home(self, text: str) -> str:
        """Return a text or page with the local path of the workspace removed."""
        home = f"{self.home}{os.sep}"
        return text.replace(home, "").replace(html.escape(home), "")

    def still_valid(self, caller: Caller) -> bool:
        """Return whether the key of a caller is still accepted; for long-lived responses."""
        try:
            return caller.key_id is None or self.database.keys.is_usable(caller.key_id)
        except (StoreError, DiskFull):
            return True  # unknown during a failure of the database, for which the stream itself waits too

    def may_use(self, caller: Caller, model: str) -> bool:
        """Return whether a caller may use a model: it is shared or their own, or they are an administrator."""
        return caller.is_admin or self.access.of(model).allows(caller.owner)

    def check_may_use(self, caller: Caller, model: str) -> None:
        """Raise `NotFound` if the caller may not use the model, the same error as for a missing model."""
        if not self.may_use(caller, model):
            raise no_such_model(model)

    def may_use_default(self, caller: Caller, model: LoadedModel) -> bool:
        """Return whether a caller may use the default model. A bundle outside the registry is available to everyone."""
        return self.models.serves_a_folder or self.may_use(caller, model.name)

    def may_change(self, caller: Caller, model: str) -> bool:
        """Return whether a caller may promote, delete or add to a model. Models that no job made belong to administrators."""
        return caller.is_admin or self.models.registry.access(model).owner == caller.owner


async def _state(request: Request) -> ServerState:  # async: a plain function would run in a thread of its own
    state: ServerState = request.app.state.server
    return state


Server = Annotated[ServerState, Depends(_state)]
