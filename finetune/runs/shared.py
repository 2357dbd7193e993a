"""Objects that all runs of one process share. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune.data.dataset import Dataset
from finetune.executors.slots import Slots
from finetune.runs.network import Network
from finetune.storage.store import Store
from finetune.storage.workspace import Workspace


@dataclass
class Shared:
    """The workspace and its store, and the checked datasets and untrained networks of this process, each by its key."""

    workspace: Workspace
    store: Store
    datasets: dict[str, Dataset] = field(default_factory=dict)
    networks: dict[str, Network] = field(default_factory=dict)
    places: Slots | None = None  # that a study's runs are carried out on in parallel; None: in this process, one by one

    @classmethod
    def of(cls, workspace: Workspace, places: Slots | None = None) -> Shared:
        """Return a `Shared` for a workspace, with no datasets and networks yet."""
        return cls(workspace, Store(workspace.cache), places=places)
