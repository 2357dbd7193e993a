"""Objects that all runs of one process share. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finetune.data.dataset import Dataset
from finetune.runs.network import Network
from finetune.storage.store import Store
from finetune.storage.workspace import Workspace

if TYPE_CHECKING:
    from finetune.executors.slots import Slots


@dataclass
class Shared:
    """The workspace and its store, and the checked datasets and untrained networks of this process, each by its key."""

    workspace: Workspace
    store: Store
    datasets: dict[str, Dataset] = field(default_factory=dict)
    networks: dict[str, Network] = field(default_factory=dict)
    slots: Slots | None = None  # in which the runs of a study are carried out in parallel; None: in this process, one by one

    @classmethod
    def of(cls, workspace: Workspace, slots: Slots | None = None) -> Shared:
        """Return a `Shared` for a workspace, with no datasets and networks yet."""
        return cls(workspace, Store(workspace.cache), slots=slots)
