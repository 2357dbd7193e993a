"""``/v1/runs``: runs and comparisons that were made on the command line, which belong to no job. For the operator."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse

from finetune.errors import NotFound
from finetune.jobs.kinds import KINDS
from service.local_runs import LocalRun, local_runs
from service.middleware.auth import Administering
from service.problems import RESPONSES
from service.results import report_answer
from service.schemas.comparisons import VerdictDocument
from service.schemas.lists import Limit
from service.schemas.runs import LocalRunDocument, LocalRunList
from service.state import Server, ServerState

runs_router = APIRouter(prefix="/v1/runs", tags=["runs"], responses=RESPONSES)
After = Annotated[str | None, Query(max_length=255, description="The `last_id` of the previous page.")]


@runs_router.get("")
def list_runs(_: Administering, server: Server, after: After = None, limit: Limit = 100) -> LocalRunList:
    """List the finished runs and comparisons that the command line made in this workspace, newest first."""
    runs = local_runs(server.home / "runs")
    if after is not None:
        names = [run.name for run in runs]
        if after not in names:
            raise NotFound(f"no run {after[:100]!r} in this list")
        runs = runs[names.index(after) + 1 :]
    return LocalRunList.of([_document(server, run) for run in runs[:limit]], len(runs) > limit)


@runs_router.get("/{name}/report", response_class=HTMLResponse)
def get_run_report(_: Administering, server: Server, name: str) -> HTMLResponse:
    """Return the report of a run or comparison as one self-contained page."""
    found = next((run for run in local_runs(server.home / "runs") if run.name == name), None)
    if found is None:
        raise NotFound(f"the command line has made no run {name[:100]!r} here; GET /v1/runs lists those that there are")
    return report_answer(found.folder, server.without_home)


def _document(server: ServerState, run: LocalRun) -> LocalRunDocument:
    result = run.result
    metrics = dict(result.get("metrics") or {}) if run.kind == "training" else {}
    verdict = result.get("verdict") if run.kind == "comparison" else None
    model, _, version = (KINDS[run.kind].registered(result) or "").partition("@")
    return LocalRunDocument(
        id=run.name,
        kind=run.kind,
        finished_at=run.finished_at,
        method=result.get("carried_out") if run.kind == "training" else None,
        metrics={key: value for key, value in metrics.items() if not key.startswith("cost/")},
        verdict=None if verdict is None else VerdictDocument.model_validate(verdict),
        model=model or None,
        version=version or None,
        links={"report": f"/v1/runs/{run.name}/report" if run.folder.report.exists() else None},
    )
