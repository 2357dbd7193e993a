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

RECORDED_NETWORKS_BYTES = 4 * 1024**3  # a ResNet-50 takes 90 MiB, a ViT-B 330 MiB


@dataclass
class Shared:
    """The workspace and its store, and the checked datasets and untrained networks of this process, each by its key.

    Args:
        recorded: the store of recorded networks (`finetune.runs.known`).
    """

    workspace: Workspace
    store: Store
    recorded: Store
    datasets: dict[str, Dataset] = field(default_factory=dict)
    networks: dict[str, Network] = field(default_factory=dict)
    slots: Slots | None = None  # in which the runs of a study are carried out in parallel; None: in this process, one by one

    @classmethod
    def of(cls, workspace: Workspace, slots: Slots | None = None) -> Shared:
        """Return a `Shared` for a workspace, with no datasets and networks yet."""
        store = Store(workspace.cache)
        of_user = workspace.networks.parent  # the workspace's own cache if the workspace shares no networks with others
        recorded = store if of_user == workspace.cache else Store(of_user, at_most_bytes=RECORDED_NETWORKS_BYTES)
        return cls(workspace, store, recorded, slots=slots)
