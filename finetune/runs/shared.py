"""What the runs of one process share, because it depends on none of them. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune.data.dataset import Dataset
from finetune.executors.places import Places
from finetune.runs.network import Network
from finetune.storage.store import Store
from finetune.storage.workspace import Workspace


@dataclass
class Shared:
    """Workspace and store, checked data and untrained networks."""

    workspace: Workspace
    store: Store
    datasets: dict[str, Dataset] = field(default_factory=dict)
    networks: dict[str, Network] = field(default_factory=dict)
    places: Places | None = None  # where a study's runs go on side by side; None: one after another, in this process

    @classmethod
    def of(cls, workspace: Workspace, places: Places | None = None) -> Shared:
        return cls(workspace, Store(workspace.cache), places=places)
