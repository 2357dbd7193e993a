"""One monitored model version: its reference, its window, and the files that preserve the window over a restart.

The folder `Registry.monitoring_of` of a version contains ``window.npz`` and, in ``arriving/``, files with the statistics of
predictions by other processes (batch predictions), which a server adds to the window and deletes.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from finetune.bundle.calibration import NOVEL, Calibration
from finetune.bundle.manifest import DRIFT, MODEL, Manifest, read_manifest
from finetune.bundle.registry import ModelVersion, Registry
from finetune.monitoring.answers import AnswerStatistics, read_statistics, write_statistics
from finetune.monitoring.drift import Drift, drift_of
from finetune.monitoring.reference import read_reference
from finetune.monitoring.window import WINDOW_IMAGES, Window
from finetune.tasks import task_named

WINDOW = "window.npz"
ARRIVING = "arriving"
MAX_ARRIVING_FILES = 50  # per version, while no server reads them; the oldest are deleted


class Watched:
    """A version's reference and window. Not thread-safe.

    Args:
        bundle: the folder of the bundle.
        monitoring: the folder of the window's file; None for a bundle outside the registry, whose window is not stored.
    """

    def __init__(self, bundle: Path, monitoring: Path | None) -> None:
        self.manifest = read_manifest(bundle)
        self.reference = read_reference(bundle) if DRIFT in self.manifest.files else None
        self.window = _empty_window(self.manifest)
        self._monitoring = monitoring
        if monitoring is not None:
            self.window.read(monitoring / WINDOW)
        self._written = self.window.n_seen

    def drift(self) -> Drift:
        """Test the predictions in the window against the reference."""
        return drift_of(self.reference, self.window)

    def fits(self, answers: AnswerStatistics) -> bool:
        """Return whether the statistics fit the task and the number of classes of this version."""
        n_classes, given = len(self.manifest.classes), answers.given
        if task_named(self.manifest.task).exclusive:
            return given is None and (not len(answers) or int(answers.label.max()) < n_classes)
        return given is not None and given.shape[1] == n_classes

    def take_in(self) -> int:
        """Add the statistics in ``arriving/`` to the window and delete the files; return the number of predictions."""
        before = self.window.n_seen
        for path in _arrived(self._monitoring):
            with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # damaged, or already read
                answers, arrays = read_statistics(path.read_bytes())
                if self.fits(answers) and arrays["model_sha256"].tobytes().decode() == self.window.model_sha256:
                    self.window.add(answers, float(arrays["at"]))
            path.unlink(missing_ok=True)
        return self.window.n_seen - before

    @property
    def has_changed(self) -> bool:
        """Whether the window has predictions that are not in its file yet."""
        return self._monitoring is not None and self.window.n_seen != self._written

    def write(self, folder: Path) -> None:
        """Write the window into the version's folder."""
        self.window.write(folder / WINDOW)
        self._written = self.window.n_seen


def drift_as_stored(registry: Registry, reference: str) -> dict[str, Any]:
    """Return the document of a version's drift from the workspace's files; a running server may have newer predictions."""
    version = registry.lookup(reference)
    return drift_document(version, Watched(version.path, registry.monitoring_of(version.name, version.version)).drift())


def drift_document(version: ModelVersion, found: Drift) -> dict[str, Any]:
    """Return the JSON document of a version's drift, for HTTP and the command line."""
    since = None if found.drifted_since is None else int(found.drifted_since)
    reference = None if found.reference_split is None else {"split": found.reference_split, "n": found.reference_n}
    said = {key: value for key, value in found.to_dict().items() if key not in ("reference_split", "reference_n")}
    named = {"object": "model.drift", "model": version.name, "version": version.version}
    return {**named, **said, "drifted_since": since, "reference": reference}


def leave_for_server(
    registry: Registry, version: ModelVersion, name: str, answers: AnswerStatistics, model_sha256: str, at: float
) -> None:
    """Write statistics to ``arriving/`` for a server to add to the window; a file with the same name is replaced.

    Args:
        model_sha256: of the model that made the predictions.
        at: time of the predictions, Unix seconds.
    """
    with registry.monitoring(version.name, version.version) as folder:
        if folder is None:
            return
        arriving = folder / ARRIVING
        sha256 = np.frombuffer(model_sha256.encode(), np.uint8)
        write_statistics(arriving / f"{name}.npz", answers.last(WINDOW_IMAGES), at=np.array(at), model_sha256=sha256)
        for old in sorted(arriving.glob("*.npz"), key=lambda path: path.stat().st_mtime)[:-MAX_ARRIVING_FILES]:
            old.unlink(missing_ok=True)


def _arrived(monitoring: Path | None) -> list[Path]:
    """Return what other processes have left, in the order of its names; nothing where the version is being deleted."""
    try:
        names = [] if monitoring is None else sorted(os.listdir(monitoring / ARRIVING))
    except FileNotFoundError:
        return []
    return [monitoring / ARRIVING / name for name in names if monitoring is not None and name.endswith(".npz")]


def _empty_window(manifest: Manifest) -> Window:
    calibration = Calibration.of(manifest.calibration)
    place = round(100 * NOVEL) - 1
    known = calibration is not None and len(calibration.novelty) > place
    return Window(
        manifest.files.get(MODEL, ""),
        len(manifest.classes),
        several=not task_named(manifest.task).exclusive,
        unlike_beyond=calibration.novelty[place] if calibration is not None and known else None,
    )
