"""The workspace: the folder that holds runs, models, uploads, databases and the cache, as one value.

It is made once, at a door (command line, server, Python), and passed down; nothing below a door reads the environment for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HOME_VARIABLE = "FINETUNE_HOME"
CACHE_VARIABLE = "FINETUNE_CACHE"


@dataclass(frozen=True)
class Workspace:
    """Absolute paths. `networks` belongs to the user, not to the workspace: traced networks are the same in all of them."""

    root: Path
    networks: Path

    @classmethod
    def at(cls, root: Path, networks: Path | None = None) -> Workspace:
        """Return the workspace in the folder `root`; traced networks are kept in it unless `networks` is given."""
        root = root.absolute()
        return cls(root, (networks or root / "cache" / "networks").absolute())

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Workspace:
        """Return the workspace that ``FINETUNE_HOME`` names, by default ``.finetune`` in the current folder.

        Traced networks are kept in ``FINETUNE_CACHE``, by default in the user's cache folder (``~/.cache/finetune``).
        """
        cache = environment.get(CACHE_VARIABLE) or Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"
        return cls.at(Path(environment.get(HOME_VARIABLE) or ".finetune"), Path(cache) / "networks")

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def datasets(self) -> Path:
        """Manifests of the data that was read, by their digests."""
        return self.root / "datasets"

    @property
    def files(self) -> Path:
        return self.root / "files"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def jobs_database(self) -> Path:
        return self.root / "jobs.db"

    @property
    def mlflow_database(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.root / "mlartifacts"
