"""Queue a client's request: check names and permissions, choose the model's name, and create the job exactly once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import Header, Request, Response
from starlette.exceptions import HTTPException

from finetune.bundle.weights import Origin, open_origin
from finetune.errors import Problem
from finetune.jobs.creation import NameTaken, digest_of
from finetune.jobs.job import Job
from finetune.jobs.kinds import TRAINING, Kind
from finetune.naming import as_model_name
from finetune.spec import JobSpec
from finetune.storage.rundir import RunDir
from service.middleware.auth import Caller
from service.spec_check import Answers, Unchecked
from service.state import ServerState

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[!-~]+$",
        description="A key that you choose: the same key and body, sent again within a day, return the object of the "
        "first request.",
    ),
]
REPLAYED = "Idempotent-Replayed"


@dataclass(frozen=True)
class Submission:
    """One request to create a job, by one caller."""

    server: ServerState
    caller: Caller
    idempotency_key: str | None
    answers: Answers = field(default_factory=dict)  # from the child process with the training libraries
    located: set[str] = field(default_factory=set)  # ids of the uploads that the request names

    def check_names(self, specs: Sequence[JobSpec]) -> Sequence[Sequence[Problem]]:
        """Return the problems of the specs' backbones and transforms. Raises `Unchecked` for names that are not known yet."""
        return self.server.spec_checker.problems(specs, self.answers)

    def locate(self, file_id: str) -> Path:
        """Return the folder of an upload's contents. Raises `NotFound` if the caller has no such file."""
        found = self.server.database.files.get(file_id, self.caller.sees).id
        self.located.add(found)
        return self.server.uploads.place_of(found).resolve()

    def find_model(self, reference: str) -> Origin:
        """Return a registered version to start from.

        Raises:
            NotFound: there is no such model, or it is another owner's private one; the message is the same.
            WeightsError: it was made by an earlier release, which stored no weights.
        """
        self.server.check_may_use(self.caller, reference.partition("@")[0])
        return open_origin(self.server.models.find(reference).path)

    def find_run(self, job_id: str) -> tuple[Job, RunDir]:
        """Return a fine-tuning job and its run. Raises `NotFound` if the caller has no such job."""
        job = self.server.database.jobs.get(job_id, self.caller.sees, TRAINING)
        return job, self.server.run_of(job.id)

    def create(self, kind: Kind, spec: Mapping[str, Any], body: Mapping[str, Any], digest: str) -> tuple[Job, bool]:
        """Queue a job that registers no model; return it and whether it is new."""
        return self._create(kind, spec, body, digest, None)

    def create_named(
        self,
        kind: Kind,
        spec_called: Callable[[str], Mapping[str, Any]],
        body: Mapping[str, Any],
        digest: str,
        *,
        suffix: str | None,
        training_file: str,
    ) -> tuple[Job, bool]:
        """Queue a job whose model is named `suffix`, or after its data if that is None.

        Args:
            spec_called: returns the spec for a model name.

        Raises:
            NameTaken: the name belongs to another owner's model, or to one of the server's default deployment that was deleted.
        """
        if suffix is not None:
            return self._create(kind, spec_called(suffix), body, digest, suffix)
        name = as_model_name(self.server.dataset_name(Path(training_file)))
        try:
            return self._create(kind, spec_called(name), body, digest, name)
        except NameTaken:
            name = f"{name[:50]}-{digest[:8]}"
            return self._create(kind, spec_called(name), body, digest, name)

    def _may_name(self, name: str) -> bool:
        """Return whether a model of the caller may have this name.

        Whoever had the name of a deleted model that the default deployment still names would answer everybody.
        """
        if self.server.models.registry.has(name):
            return self.server.may_change(self.caller, name)
        deployed = {one.reference.partition("@")[0] for one in self.server.models.deployed()}
        return self.caller.is_admin or name not in deployed

    def _create(
        self, kind: Kind, spec: Mapping[str, Any], body: Mapping[str, Any], digest: str, name: str | None
    ) -> tuple[Job, bool]:
        server, caller = self.server, self.caller
        if name is not None and not self._may_name(name):
            raise NameTaken(name)
        return server.database.jobs.create(
            caller.owner,
            spec,
            kind=kind,
            spec_digest=digest_of(spec),
            request=body,
            suffix=name,
            idempotency_key=self.idempotency_key,
            body_sha256=digest,
            max_queued=server.max_unfinished_jobs,
            any_suffix=caller.is_admin,
            reads=frozenset(self.located),
            models_bytes=server.models.registry.owned_bytes(caller.owner),
            max_owner_bytes=server.max_files_bytes,
        )


async def create_checked(submission: Submission, create: Callable[[Submission], tuple[Job, bool]]) -> tuple[Job, bool]:
    """Return the job that `create` queues, and whether it is new; check names that are not known yet in a child process.

    Args:
        create: parses the request and queues the job. If it raises `Unchecked`, it is called again after the check.
    """
    checks = submission.server.checks
    try:
        return await checks.run(create, submission)
    except Unchecked as unchecked:
        answers = await submission.server.spec_checker.check(unchecked.specs, submission.caller.owner)
    return await checks.run(create, replace(submission, answers=answers))


async def json_body(request: Request, what: str) -> bytes:
    """Return the body of a request that must be JSON, else raise 415; `what` names the expected body in the message."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"A body of type {media_type[:100]!r} is not a {what}; send application/json")
    return await request.body()


def announce(response: Response, job: Job, *, new: bool) -> None:
    """Set the headers for a created job: its location, and whether the request was a repetition."""
    response.headers["Location"] = f"{job.kind.path}/{job.id}"
    if not new:
        response.headers[REPLAYED] = "true"
