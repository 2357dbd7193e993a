"""One monitored model version: its reference, its window, and the files that preserve the window over a restart.

The folder `Registry.monitoring_of` of a version contains ``window.npz``, ``accepted.npz`` if an operator has accepted predictions
in production as the reference, and in ``arriving/`` the statistics of predictions of other processes (batch predictions), each a
file that a server reads and deletes.
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
from finetune.errors import Conflict, NotFound
from finetune.monitoring.drift import MIN_WINDOW, Drift, drift_of
from finetune.monitoring.reference import Reference, read_reference, write_reference
from finetune.monitoring.statistics import PredictionStatistics, read_statistics, write_statistics
from finetune.monitoring.window import WINDOW_IMAGES, Window

WINDOW = "window.npz"
ACCEPTED = "accepted.npz"
ACCEPTED_SPLIT = "accepted"
ARRIVING = "arriving"
MAX_ARRIVING_FILES = 50  # per version, while no server reads them; the oldest are deleted


class MonitoredVersion:
    """A version's reference and window. Not thread-safe.

    Args:
        bundle: the folder of the bundle.
        monitoring: the folder of the window's file; None for a bundle outside the registry, whose window is not stored.
    """

    def __init__(self, bundle: Path, monitoring: Path | None) -> None:
        self.manifest = read_manifest(bundle)
        self._exported = read_reference(bundle / DRIFT) if DRIFT in self.manifest.files else None
        self.window = _empty_window(self.manifest)
        self._monitoring = monitoring
        if monitoring is not None:
            self.window.read(monitoring / WINDOW)
        self._written = self.window.n_seen
        self._accepted_ns: int | None = None
        self.reference = self._exported
        self.follow_reference()

    def drift(self) -> Drift:
        """Test the predictions in the window against the reference."""
        return drift_of(self.reference, self.window)

    def follow_reference(self) -> bool:
        """Use the accepted reference if there is one, else the bundle's; return whether it changed, which ends the alarm."""
        path = None if self._monitoring is None else self._monitoring / ACCEPTED
        try:
            written_ns = None if path is None else path.stat().st_mtime_ns
        except FileNotFoundError:
            written_ns = None
        if written_ns == self._accepted_ns:
            return False
        self._accepted_ns, self.reference = written_ns, self._exported
        if path is not None and written_ns is not None:
            self.reference = read_reference(path) or self._exported
        self.window.alarm.since = None
        return True

    def accept(self, folder: Path) -> None:
        """Write the predictions in the window as the version's reference for later tests.

        Raises:
            Conflict: there are fewer than `MIN_WINDOW` predictions.
        """
        if len(self.window) < MIN_WINDOW:
            raise Conflict(f"{len(self.window)} live images are too few to compare others with; {MIN_WINDOW} are needed")
        write_reference(folder / ACCEPTED, Reference(ACCEPTED_SPLIT, self.window.statistics()))
        self.follow_reference()

    def restore_reference(self, folder: Path) -> None:
        """Delete the accepted reference from the version's folder, so that the bundle's is used again."""
        (folder / ACCEPTED).unlink(missing_ok=True)
        self.follow_reference()

    def fits(self, statistics: PredictionStatistics) -> bool:
        """Return whether the statistics fit the classes of this version, and whether these have thresholds."""
        n_classes, given = len(self.manifest.classes), statistics.given
        n_labels = None if given is None else given.shape[1]
        if n_labels != (None if self.manifest.label_thresholds is None else n_classes):
            return False
        return not len(statistics) or int(statistics.label.max()) < n_classes

    def collect(self) -> int:
        """Add the statistics in ``arriving/`` to the window and delete the files; return the number of predictions."""
        before = self.window.n_seen
        for path in _arrived(self._monitoring):
            with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # damaged, or already read
                statistics, arrays = read_statistics(path.read_bytes())
                if self.fits(statistics) and arrays["model_sha256"].tobytes().decode() == self.window.model_sha256:
                    self.window.add(statistics, float(arrays["at"]))
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
    return drift_document(version, MonitoredVersion(version.path, registry.monitoring_of(version.name, version.version)).drift())


def choose_reference(registry: Registry, reference: str, *, accept: bool) -> dict[str, Any]:
    """Accept a version's stored predictions in production as its reference, or restore the bundle's; return the drift document.

    Raises:
        Conflict: there are too few predictions to accept.
        NotFound: the version was deleted in the meantime.
    """
    version = registry.lookup(reference)
    watched = MonitoredVersion(version.path, registry.monitoring_of(version.name, version.version))
    write_choice(registry, version, watched, accept=accept)
    return drift_document(version, watched.drift())


def write_choice(registry: Registry, version: ModelVersion, watched: MonitoredVersion, *, accept: bool) -> None:
    """Accept the window as the version's reference, or restore the bundle's. Raises NotFound if the version was deleted."""
    with registry.monitoring(version.name, version.version) as folder:
        if folder is None:
            raise NotFound(f"{version.name}@{version.version} was deleted")
        watched.accept(folder) if accept else watched.restore_reference(folder)


def drift_document(version: ModelVersion, found: Drift) -> dict[str, Any]:
    """Return the JSON document of a version's drift, for HTTP and the command line."""
    since = None if found.drifted_since is None else int(found.drifted_since)
    reference = None if found.reference_split is None else {"split": found.reference_split, "n": found.reference_n}
    said = {key: value for key, value in found.to_dict().items() if key not in ("reference_split", "reference_n")}
    named = {"object": "model.drift", "model": version.name, "version": version.version}
    return {**named, **said, "drifted_since": since, "reference": reference}


def submit_statistics(
    registry: Registry, version: ModelVersion, name: str, statistics: PredictionStatistics, model_sha256: str, at: float
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
        write_statistics(arriving / f"{name}.npz", statistics.last(WINDOW_IMAGES), at=np.array(at), model_sha256=sha256)
        for old in sorted(arriving.glob("*.npz"), key=lambda path: path.stat().st_mtime)[:-MAX_ARRIVING_FILES]:
            old.unlink(missing_ok=True)


def _arrived(monitoring: Path | None) -> list[Path]:
    """Return the files in ``arriving/``, sorted by name; empty if the version is being deleted."""
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
        several=manifest.label_thresholds is not None,
        unlike_beyond=calibration.novelty[place] if calibration is not None and known else None,
    )
