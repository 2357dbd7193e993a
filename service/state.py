"""What all routes of one server share: models, the job database, queues and limits."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy import Engine

from finetune.bundle.image import ImageLimits
from finetune.errors import NotFound
from finetune.jobs.database import open_jobs
from finetune.jobs.files import FileStore
from finetune.jobs.history import model_owner
from finetune.jobs.keys import KeyStore
from finetune.jobs.store import JobStore
from finetune.storage.rundir import RunDir
from service.admission import PredictionQueue
from service.event_streams import EventStreams
from service.metrics import Metrics
from service.middleware.auth import Caller
from service.models import LiveModels
from service.uploads import Uploads

_OWNER_SECONDS = 1.0  # how long it is remembered whose a model is: predictions ask each time


class Database:
    """The job database and the stores on it, opened when first asked for: importing the service opens nothing."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._owners: dict[str, tuple[float, str | None]] = {}

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

    def model_owner(self, name: str) -> str | None:
        """Whose job made this model; None for models that no job made, which are everybody's to use."""
        now = time.monotonic()
        until, owner = self._owners.get(name, (0.0, None))
        if now >= until:
            owner = model_owner(self.engine, name)
            if owner is not None:  # a model that is nobody's may become somebody's this very moment
                self._owners[name] = (now + _OWNER_SECONDS, owner)
        return owner


@dataclass(frozen=True)
class ServerState:
    """What all routes of one server share; the app carries it as ``app.state.server``."""

    home: Path
    models: LiveModels
    metrics: Metrics
    queue: PredictionQueue
    image_limits: ImageLimits
    database: Database
    event_streams: EventStreams
    uploads: Uploads
    data_roots: tuple[Path, ...] = ()
    max_files_bytes: int = 20 << 30
    max_unfinished_jobs: int = 100
    default_is_chosen: bool = False  # the operator named the model that /predict answers with, so it is everybody's

    def run_of(self, job_id: str) -> RunDir:
        return RunDir(self.home / "runs" / job_id)

    def without_home(self, text: str) -> str:
        """Return `text` without the path of the workspace on this machine."""
        return text.replace(f"{self.home}{os.sep}", "")

    def may_use(self, caller: Caller, model: str) -> bool:
        """Whether a caller may know of a model: their own, and what no job made."""
        return caller.is_admin or self.database.model_owner(model) in (None, caller.owner)

    def check_may_use(self, caller: Caller, model: str) -> None:
        """Raises `NotFound`: another owner's model does not exist."""
        if not self.may_use(caller, model):
            raise NotFound(f"no model {model[:100]!r}; GET /v1/models lists what there is for you")

    def may_change(self, caller: Caller, model: str) -> bool:
        """Whether a caller may move, delete or add to a model: their own; what no job made is the administrator's."""
        return caller.is_admin or self.database.model_owner(model) == caller.owner


async def _state(request: Request) -> ServerState:  # async: a plain function would run in a thread of its own
    state: ServerState = request.app.state.server
    return state


Server = Annotated[ServerState, Depends(_state)]
