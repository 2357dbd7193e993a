"""Documents of runs and comparisons that were made on the command line."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.schemas.comparisons import VerdictDocument
from service.schemas.lists import ListItem, Page


class LocalRunDocument(ListItem):
    """A finished run or comparison that was made on the command line. Its id is the name of its folder."""

    object: Literal["run"] = "run"
    kind: Literal["training", "comparison"]
    finished_at: int = Field(description="Unix seconds.")
    method: str | None = Field(description="The method that the model was trained with; null for a comparison.")
    metrics: dict[str, float | None] = Field(description="By `split/name`; empty for a comparison.")
    verdict: VerdictDocument | None = Field(description="Of a comparison.")
    model: str | None = Field(description="The registered version; null if none was registered.")
    version: str | None
    links: dict[str, str | None] = Field(description="Path on this server of the report; null if there is none.")


LocalRunList = Page[LocalRunDocument]
