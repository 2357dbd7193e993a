"""The workspace: the folder of runs, models, uploads, databases and the cache, as one value.

It is created once, at an entry point (command line, server, Python API), and passed down as an argument; only entry points read
the environment variables that name it.
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
    """The absolute paths of a workspace. `networks`, for traced and recorded networks, may be shared by all of a user."""

    root: Path
    networks: Path

    @classmethod
    def at(cls, root: Path, networks: Path | None = None) -> Workspace:
        """Return the workspace in the folder `root`; traced networks are stored in its cache unless `networks` is given."""
        root = root.absolute()
        return cls(root, (networks or root / "cache" / "networks").absolute())

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Workspace:
        """Return the workspace that ``FINETUNE_HOME`` names, by default ``.finetune`` in the current folder.

        Traced networks are stored in ``FINETUNE_CACHE``, by default in the user's cache folder (``~/.cache/finetune``).
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
        """The folder of dataset manifests, named by their digests."""
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
