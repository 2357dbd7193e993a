"""What all routes of one server share: models, the job database, queues and limits."""

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

from finetune.bundle.image import ImageLimits
from finetune.bundle.registry import Access, Registry
from finetune.errors import DiskFull, StoreError
from finetune.jobs.database import open_jobs
from finetune.jobs.files import FileStore
from finetune.jobs.keys import KeyStore
from finetune.jobs.sending import Reachable
from finetune.jobs.store import JobStore
from finetune.jobs.webhooks import WebhookStore
from finetune.runtime.tracing import Tracing
from finetune.storage.rundir import RunDir
from service.admission import WorkQueue
from service.drift import DriftWatch
from service.event_streams import EventStreams
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
    """The job database and the stores on it, opened when first asked for: importing the service opens nothing."""

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
    """Who may use which model, remembered for a second: predictions ask each time."""

    def __init__(self, registry: Registry, remember_seconds: float = 1.0) -> None:
        self._registry = registry
        self._remember_seconds = remember_seconds
        self._known: dict[str, tuple[float, Access]] = {}

    def forget(self, model: str) -> None:
        """Read the access of a model anew the next time."""
        self._known.pop(model, None)

    def of(self, model: str) -> Access:
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
    """What all routes of one server share; the app carries it as ``app.state.server``."""

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
    webhooks_reach: Reachable = field(default_factory=Reachable)
    tracing: Tracing | None = None
    data_roots: tuple[Path, ...] = ()
    hub_models: bool = False
    max_files_bytes: int = 20 << 30
    max_unfinished_jobs: int = 100

    def run_of(self, job_id: str) -> RunDir:
        return RunDir(self.home / "runs" / job_id)

    def stored_bytes(self, owner: str) -> int:
        """Return what an owner's uploads, finished jobs and models take on disk."""
        return self.database.files.stored_bytes(owner) + self.models.registry.owned_bytes(owner)

    def dataset_name(self, folder: Path) -> str:
        """Return what the client calls its dataset: the uploaded file's name without its ending, or the folder's."""
        if folder.parent == self.uploads.folder.resolve():
            return self.database.files.get(folder.name).filename.split(".")[0]
        return folder.name

    def without_home(self, text: str) -> str:
        """Return a text or a page without the path of the workspace on this machine."""
        home = f"{self.home}{os.sep}"
        return text.replace(home, "").replace(html.escape(home), "")

    def still_valid(self, caller: Caller) -> bool:
        """Return whether the key of a caller is still accepted; for answers that last long."""
        try:
            return caller.key_id is None or self.database.keys.is_usable(caller.key_id)
        except (StoreError, DiskFull):
            return True  # for a while nobody can say; the stream itself waits for the database too

    def may_use(self, caller: Caller, model: str) -> bool:
        """Return whether a model exists for a caller: it is shared, or their own."""
        return caller.is_admin or self.access.of(model).allows(caller.owner)

    def check_may_use(self, caller: Caller, model: str) -> None:
        """Raise `NotFound` for another owner's private model, as for one that does not exist."""
        if not self.may_use(caller, model):
            raise no_such_model(model)

    def may_use_default(self, caller: Caller, model: LoadedModel) -> bool:
        """Return whether a caller may be answered by the default model. A served bundle folder is everybody's."""
        return self.models.serves_a_folder or self.may_use(caller, model.name)

    def may_change(self, caller: Caller, model: str) -> bool:
        """Return whether a caller may promote, delete or add to a model. What no job made is the administrator's."""
        return caller.is_admin or self.models.registry.access(model).owner == caller.owner


async def _state(request: Request) -> ServerState:  # async: a plain function would run in a thread of its own
    state: ServerState = request.app.state.server
    return state


Server = Annotated[ServerState, Depends(_state)]
