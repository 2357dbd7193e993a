"""Who may use a registered model. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

SHARED = "shared"
Visibility = Literal["private", "shared"]


@dataclass(frozen=True)
class Access:
    """Who may use a model.

    Args:
        owner: of the model; None for a model that no job made, which only administrators may change.
        visibility: ``shared``: everyone who may use the server may use the model. ``private``: only its owner and administrators.
    """

    owner: str | None = None
    visibility: Visibility = "shared"

    def allows(self, owner: str) -> bool:
        """Return whether this owner may see the model."""
        return self.visibility == SHARED or self.owner == owner


ACCESS_ADAPTER = TypeAdapter(Access)
