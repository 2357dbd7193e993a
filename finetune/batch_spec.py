"""BatchSpec: the validated request for a batch prediction, from the command line, HTTP or Python. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError

from finetune.errors import SpecError
from finetune.spec import Section, merged_mapping, problems_of


class BatchSpec(Section):
    """The images of a batch prediction, and the model."""

    HINT: ClassVar[str] = (
        ". The answers contain the probabilities of all classes; top_k, coverage and abstain are options of /predict"
    )

    input_file: Annotated[
        str, Field(min_length=1, max_length=4096, description="A folder of images; on a server the id of an upload, file-….")
    ]
    model: Annotated[
        str | None,
        Field(min_length=1, max_length=127, description="name, name@version or name@alias. null: the default model."),
    ] = None
    embedding: Annotated[bool, Field(description="Also store the embedding of each image, in the .npz answers.")] = False
    metadata: Annotated[
        dict[str, str], Field(max_length=64, description="Your own keys and values, kept with the batch prediction.")
    ] = Field(default_factory=dict)


def parse_batch(given: Mapping[str, Any]) -> BatchSpec:
    """Validate a mapping as a batch request.

    Raises:
        SpecError: the request is invalid; it has one `Problem` per mistake, with its field path.
    """
    try:
        return BatchSpec.model_validate(dict(given))
    except ValidationError as error:
        problems = problems_of(error, given, BatchSpec, {})
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise SpecError(f"the batch prediction has {count}", problems) from None


def load_batch(path: Path) -> BatchSpec:
    """Read a batch request from a YAML file."""
    return parse_batch(merged_mapping(path))
