"""Pages of lists in the form of the public API: ``{object, data, has_more, first_id, last_id}``."""

from __future__ import annotations

from typing import Annotated, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel

After = Annotated[str | None, Query(max_length=100, pattern=r"^[!-~]*$", description="The `last_id` of the previous page.")]
Limit = Annotated[int, Query(ge=1, le=100)]


class ListItem(BaseModel):
    """An item of a list. Its id is the cursor for the next page."""

    id: str


T = TypeVar("T", bound=ListItem)


class Page(BaseModel, Generic[T]):
    """One page of a list."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, data: list[T], has_more: bool) -> Page[T]:
        """Return a page of these items."""
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, has_more=has_more, first_id=first, last_id=last)
