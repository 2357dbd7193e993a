"""Images of uploads with their corrections, and predictions of runs, for display on the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from finetune.errors import InvalidInput, NotFound
from finetune.evaluation.predictions import read
from finetune.jobs.kinds import COMPARISON, TRAINING, Kind
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from service.creation import IdempotencyKey
from service.middleware.auth import Caller, Submitting
from service.pictures import MEDIA_TYPES, Answer, Pictures, answers_of
from service.problems import RESPONSES
from service.revisions import Corrections, why_not_correctable, write_corrected
from service.routes.files import FileDocument, file_document, record_upload
from service.schemas.lists import ListItem, Page
from service.state import Server, ServerState

MAX_SIDE_PX = 1024
LONG_PAGE = 1000
ONE_YEAR = "private, max-age=31536000, immutable"  # of an upload: its contents never change
BYTES = {"schema": {"type": "string", "format": "binary"}}
PICTURE: dict[int | str, dict[str, Any]] = {  # client generators do not know image/* and use the first media type that they know
    200: {
        "description": "The image file, with its own media type.",
        "content": dict.fromkeys(("application/octet-stream", *MEDIA_TYPES), BYTES),
    }
}

D = TypeVar("D", bound=ListItem)
SidePx = Annotated[
    int | None,
    Query(ge=16, le=MAX_SIDE_PX, description="Return a JPEG of at most this width and height. Default: the original file."),
]
MAX_ID_CHARACTERS = 4096
ImageId = Annotated[
    str, Query(alias="id", max_length=MAX_ID_CHARACTERS, description="The id in the lists of images and predictions.")
]
AfterImage = Annotated[str | None, Query(max_length=MAX_ID_CHARACTERS, description="The `last_id` of the previous page.")]
Split = Literal["val", "test", "cv"]
SplitName = Annotated[Split, Query(description="The split of the images.")]
Label = Annotated[str | None, Query(max_length=500, description="Only images of this class.")]
Given = Annotated[str | None, Query(max_length=500, description="Only images that were predicted as this class.", alias="answer")]
Wrong = Annotated[bool | None, Query(description="Only wrong predictions (true), or only correct ones (false).")]
PageLength = Annotated[int, Query(ge=1, le=LONG_PAGE)]


class ImageDocument(ListItem):
    """One image of an upload."""

    object: Literal["file.image"] = "file.image"
    labels: list[str]
    split: Literal["train", "val", "test"] | None = Field(description="Null if the upload has no splits.")
    correctable: bool = Field(description="Whether a revision may change its label or leave it out.")


class AnswerDocument(ListItem):
    """A run's prediction for one image."""

    object: Literal["fine_tuning.answer"] = "fine_tuning.answer"
    label: str = Field(description="The label of the image; if it may have several, all of them, separated by commas.")
    answer: str
    labels: list[str] = Field(description="The true labels of the image.")
    given: list[str] = Field(description="The predicted labels.")
    probability: float = Field(
        description="Probability of the prediction, before calibration; for a multi-label model that of the most "
        "confident wrong decision, else of the least confident one."
    )
    label_probability: float = Field(description="Probability of the true label, before calibration.")


class MetricsRow(BaseModel):
    """The metrics of a run at one step."""

    step: int
    epoch: float | None
    values: dict[str, float | None] = Field(description="By `split/name`.")


class MetricsHistory(BaseModel):
    """The metrics of a run by step, oldest first."""

    object: Literal["list"] = "list"
    data: list[MetricsRow]


ImageList = Page[ImageDocument]
AnswerList = Page[AnswerDocument]

pictures_router = APIRouter(prefix="/v1", tags=["pictures"], responses=RESPONSES)


@pictures_router.get("/files/{file_id}/images")
def list_file_images(
    caller: Submitting,
    server: Server,
    file_id: str,
    label: Label = None,
    image_id: Annotated[str | None, Query(alias="id", max_length=MAX_ID_CHARACTERS, description="Only this image.")] = None,
    after: AfterImage = None,
    limit: PageLength = 100,
) -> ImageList:
    """List the images of an upload, or those of one class, in the order of the dataset."""
    dataset = _of_upload(server, caller, file_id).dataset
    correctable = why_not_correctable(dataset) is None
    documents = [
        ImageDocument(id=sample.id, labels=list(names), split=sample.split, correctable=correctable)  # type: ignore[arg-type]
        for sample in dataset.samples
        if label in (None, *(names := dataset.label_names(sample))) and image_id in (None, sample.id)
    ]
    return ImageList.of(*_page(documents, after, limit))


@pictures_router.post("/files/{file_id}/revisions", status_code=201)
def correct_file(
    caller: Submitting,
    server: Server,
    response: Response,
    file_id: str,
    wanted: Corrections,
    idempotency_key: IdempotencyKey = None,
) -> FileDocument:
    """Make a corrected copy of an upload: change labels, leave out images, rename classes. The copy is a new upload."""
    file = server.database.files.get(file_id, caller.sees)
    pictures = server.pictures.of(server.uploads.place_of(file.id).resolve())
    with server.uploads.arriving(0, caller.owner) as arrival:
        received = write_corrected(pictures, file, wanted, arrival.folder / "contents")
        made, _ = record_upload(server, caller.owner, received, idempotency_key)
    response.headers["Location"] = f"/v1/files/{made.id}"
    return file_document(made)


@pictures_router.get("/files/{file_id}/image", response_class=Response, responses=PICTURE)
def get_file_image(caller: Submitting, server: Server, file_id: str, image_id: ImageId = "", side_px: SidePx = None) -> Response:
    """Return one image of an upload, as the original file or as a thumbnail."""
    return _picture(server, _of_upload(server, caller, file_id), image_id, side_px)


@pictures_router.get("/fine_tuning/jobs/{job_id}/metrics")
def job_metrics(caller: Submitting, server: Server, job_id: str) -> MetricsHistory:
    """Return the metrics of a job so far, oldest first."""
    return _metrics(server.run_of(server.database.jobs.get(job_id, caller.sees, TRAINING).id))


@pictures_router.get("/fine_tuning/jobs/{job_id}/answers")
def job_answers(
    caller: Submitting,
    server: Server,
    job_id: str,
    split: SplitName = "test",
    label: Label = None,
    answer: Given = None,
    wrong: Wrong = None,
    after: AfterImage = None,
    limit: PageLength = 100,
) -> AnswerList:
    """List the predictions of a job's run for the images of a split, most confident first."""
    job = server.database.jobs.get(job_id, caller.sees, TRAINING)
    return _answers(server.run_of(job.id), split, _wanted(label, answer, wrong), after, limit)


@pictures_router.get("/fine_tuning/jobs/{job_id}/image", response_class=Response, responses=PICTURE)
def get_job_image(caller: Submitting, server: Server, job_id: str, image_id: ImageId = "", side_px: SidePx = None) -> Response:
    """Return one image of a job's data, as the original file or as a thumbnail."""
    return _picture(server, _of_job(server, caller, TRAINING, job_id), image_id, side_px)


@pictures_router.get("/fine_tuning/comparisons/{comparison_id}/runs/{run_name}/answers")
def comparison_run_answers(
    caller: Submitting,
    server: Server,
    comparison_id: str,
    run_name: str,
    split: SplitName = "test",
    label: Label = None,
    answer: Given = None,
    wrong: Wrong = None,
    after: AfterImage = None,
    limit: PageLength = 100,
) -> AnswerList:
    """List the predictions of one run of a comparison for the images of a split, most confident first."""
    study = server.run_of(server.database.jobs.get(comparison_id, caller.sees, COMPARISON).id)
    if run_name not in {child.name for child in (study.root / "runs").glob("*")}:
        raise NotFound(f"{comparison_id} has no run {run_name[:100]!r}")
    return _answers(study.child(run_name), split, _wanted(label, answer, wrong), after, limit)


@pictures_router.get("/fine_tuning/comparisons/{comparison_id}/image", response_class=Response, responses=PICTURE)
def get_comparison_image(
    caller: Submitting, server: Server, comparison_id: str, image_id: ImageId = "", side_px: SidePx = None
) -> Response:
    """Return one image of a comparison's data, as the original file or as a thumbnail."""
    return _picture(server, _of_job(server, caller, COMPARISON, comparison_id), image_id, side_px)


def _of_upload(server: ServerState, caller: Caller, file_id: str) -> Pictures:
    file = server.database.files.get(file_id, caller.sees)
    return server.pictures.of(server.uploads.place_of(file.id).resolve())


def _of_job(server: ServerState, caller: Caller, kind: Kind, job_id: str) -> Pictures:
    spec = server.database.jobs.get(job_id, caller.sees, kind).spec
    paths = [None if spec.get(name) is None else Path(spec[name]) for name in ("training_file", "validation_file", "test_file")]
    training, validation, test = paths
    if training is None:
        raise NotFound(f"{job_id} compares jobs that exist; the images are theirs")
    return server.pictures.of(training, validation, test, spec.get("data"))


def _picture(server: ServerState, pictures: Pictures, image_id: str, side_px: int | None) -> Response:
    data, media_type = server.pictures.encoded(pictures.sample(image_id), side_px)
    return Response(data, media_type=media_type, headers={"Cache-Control": ONE_YEAR})


def _metrics(run: RunDir) -> MetricsHistory:
    rows = [MetricsRow(step=row["step"], epoch=row.get("epoch"), values=row["values"]) for row in read_lines(run.metrics)]
    return MetricsHistory(data=rows)


def _wanted(label: str | None, given: str | None, wrong: bool | None) -> Callable[[Answer], bool]:
    def wanted(one: Answer) -> bool:
        return (
            (label is None or label in one.labels)
            and (given is None or given in one.given)
            and (wrong is None or wrong == (one.given != one.labels))
        )

    return wanted


def _answers(run: RunDir, split: str, wanted: Callable[[Answer], bool], after: str | None, limit: int) -> AnswerList:
    try:
        table = read(run.predictions_of(split))
    except InvalidInput:
        raise NotFound(f"{run.name} has no answers to {split} images") from None
    documents = [AnswerDocument(**vars(one)) for one in answers_of(table, wanted)]
    return AnswerList.of(*_page(documents, after, limit))


def _page(documents: list[D], after: str | None, limit: int) -> tuple[list[D], bool]:
    """Return at most `limit` documents after the id `after`, and whether there are more."""
    start = 0
    if after is not None:
        ids = [one.id for one in documents]
        if after not in ids:
            raise NotFound(f"no entry {after[:200]!r} in this list")
        start = ids.index(after) + 1
    return documents[start : start + limit], len(documents) > start + limit
