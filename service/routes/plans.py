"""``POST /v1/fine_tuning/plans``: what methods would train, with estimated durations, before anything is uploaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from finetune.errors import Problem, SpecError
from finetune.runs.forecast import Images, Speeds, forecast, stages_of
from finetune.runtime.cores import available_cores
from finetune.spec import JobSpec, is_own_model, is_registered_model, parse_spec
from service.creation import Submission
from service.disconnects import while_connected
from service.job_request import parse_body, server_problems, summary
from service.middleware.auth import Submitting
from service.problems import RESPONSES
from service.schemas.plans import PlanDocument, PlannedMethod, PlanRequest, PlanSeconds, PlanStage
from service.spec_check import Unchecked
from service.state import Server

plans_router = APIRouter(prefix="/v1/fine_tuning/plans", tags=["fine-tuning jobs"], responses=RESPONSES)

NOT_PLANNED = "is neither a timm name nor a registered model such as flowers@3; the duration of others is not estimated"
NO_FILE = "none"  # placeholder for the training file, which a plan does not need


@plans_router.post("")
async def plan_methods(request: Request, asked: PlanRequest, caller: Submitting, server: Server) -> PlanDocument:
    """Return which stages each method would train, and an estimate of a job's duration. Nothing is trained or stored.

    The first request for a backbone measures its speed on this machine, which takes about ten seconds. It stops if all clients
    that wait for it have left.
    """
    submission = Submission(server, caller, None)
    try:
        specs, backbone = await run_in_threadpool(_read, asked, submission)
    except Unchecked as unchecked:
        answers = await while_connected(request, server.spec_checker.check(unchecked.specs, caller.owner))
        specs, backbone = await run_in_threadpool(_read, asked, replace(submission, answers=answers))
    compute, size = specs[0].compute, specs[0].model.input_size_px
    question = {
        "backbone": backbone,
        "input_size_px": None if size == "auto" else size,
        "device": compute.device,
        "threads": available_cores() if compute.threads == "auto" else compute.threads,
    }
    speeds = await while_connected(request, server.planner.speeds(question, caller.owner))
    return _document(asked, specs, speeds)


def _read(asked: PlanRequest, submission: Submission) -> tuple[list[JobSpec], str]:
    """Return the job spec of each method, and the timm name of their backbone.

    Raises:
        SpecError: the request is invalid; it has one problem per invalid field.
        Unchecked: whether there is such a backbone is not known yet.
    """
    shared = asked.model_dump(include={"model", "data", "hyperparameters", "compute"}, exclude_none=True)
    specs: list[JobSpec] = []
    problems: list[Problem] = []
    for position, method in enumerate(asked.methods):
        body = {**shared, "training_file": NO_FILE, "method": method}
        try:
            specs.append(parse_body(body, parse_spec, lambda spec: spec.model_dump(mode="json")))
        except SpecError as error:
            problems += [_of_method(one, position) for one in error.problems]
    backbone = ""
    if specs and not problems:
        problems = server_problems(
            specs[0], submission.server.data_roots, submission.find_model, hub_models=submission.server.hub_models
        )
        backbone = specs[0].model.backbone
    if not problems and is_registered_model(backbone):
        backbone = submission.find_model(backbone).architecture
    elif not problems and is_own_model(backbone):
        problems = [Problem("model.backbone", f"{backbone[:200]!r} {NOT_PLANNED}")]
    elif not problems:
        problems = list(submission.check_names(specs[:1])[0])
    if problems:
        problems = list(dict.fromkeys(problems))
        raise SpecError(summary(problems), problems)
    return specs, backbone


def _of_method(problem: Problem, position: int) -> Problem:
    inside = problem.where == "method" or problem.where.startswith("method.")
    return replace(problem, where=f"methods[{position}]{problem.where.removeprefix('method')}") if inside else problem


def _document(asked: PlanRequest, specs: Sequence[JobSpec], speeds: Speeds) -> PlanDocument:
    methods: list[PlannedMethod] = []
    problems: list[Problem] = []
    for position, spec in enumerate(specs):
        try:
            methods.append(_planned(asked, spec, speeds))
        except SpecError as error:
            problems += [_of_method(one, position) for one in error.problems or [Problem("method", error.message)]]
    if problems:
        raise SpecError(summary(problems), problems)
    return PlanDocument(
        backbone=speeds.backbone,
        parameters=speeds.n_parameters,
        input_size_px=list(speeds.input_size_px),
        stages=[PlanStage(index=stage.index, name=stage.name, parameters=stage.n_parameters) for stage in speeds.stages],
        methods=methods,
    )


def _planned(asked: PlanRequest, spec: JobSpec, speeds: Speeds) -> PlannedMethod:
    trains, may_train = stages_of(spec.method, speeds)
    seconds = None
    if asked.images is not None:
        mean_bytes = None if asked.bytes is None else asked.bytes / asked.images
        seconds = PlanSeconds.of(forecast(spec, speeds, Images(asked.images, asked.classes, mean_bytes)))
    method: dict[str, Any] = spec.method.model_dump(mode="json", exclude_defaults=True)
    return PlannedMethod(
        method={"type": spec.method.type, **method}, trains=list(trains), may_train=list(may_train), seconds=seconds
    )
