"""The base class of JSON bodies that FastAPI validates."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class RequestBody(BaseModel):
    """A JSON body. Unknown fields are errors, and no value is converted: neither `true` nor the text `"3"` is a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
