"""Monitor the predictions of each model for drift, without delaying requests: they only append a few numbers to a queue.

A background thread reads the queue, compares with the reference, stores the windows in the workspace, and notifies webhooks when
drift begins.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import select

from finetune.bundle.manifest import MANIFEST, MODEL, read_manifest
from finetune.bundle.registry import ModelVersion, Registry
from finetune.errors import FinetuneError
from finetune.jobs.database import reading, writing
from finetune.jobs.outbox import DRIFTED
from finetune.jobs.schema import webhooks
from finetune.jobs.webhooks import WebhookStore
from finetune.monitoring.drift import MIN_WINDOW, Drift
from finetune.monitoring.monitored import MonitoredVersion, write_choice
from finetune.monitoring.statistics import PredictionStatistics, concatenated
from finetune.monitoring.window import WINDOW_IMAGES, Window
from service.models import LoadedModel
from service.promotions import tell_users

log = logging.getLogger(__name__)

LOOK_EVERY_IMAGES = 100  # between two tests of a version, since each test can raise a false alarm
KEEP_SECONDS = 60.0  # between two writes of the windows
_MAX_WAITING = 20_000  # predictions in the queue; beyond it the oldest are dropped


@dataclass(frozen=True)
class _QueuedPrediction:
    """Statistics of one prediction, with its bundle and time."""

    name: str
    version: str
    bundle: Path
    written_ns: int  # modification time of the bundle
    at: float
    statistics: PredictionStatistics


class DriftWatch:
    """The drift monitor of one server. `observe` can be called from any thread without waiting; other methods take a lock.

    Args:
        seconds: between two rounds of the background thread.
    """

    def __init__(self, registry: Registry, webhooks_store: Callable[[], WebhookStore], seconds: float = 10.0) -> None:
        self._registry = registry
        self._webhooks_store = webhooks_store
        self._seconds = seconds
        self._arrived: deque[_QueuedPrediction] = deque(maxlen=_MAX_WAITING)
        self._lock = threading.Lock()  # protects everything below
        self._watched: dict[Path, MonitoredVersion] = {}  # by bundle folder
        self._names: dict[Path, tuple[str, str]] = {}
        self._written_ns: dict[Path, int] = {}  # modification time of each bundle
        self._found: dict[Path, Drift] = {}  # result of the last test
        self._written_at = time.monotonic()  # of the last write of the windows
        self._cannot_write = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="drift", daemon=True)

    def start(self) -> None:
        """Start the background thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the background thread and write the windows."""
        self._stopping.set()
        self._thread.join()
        with self._lock:
            self._add_queued()
            self._write_windows()

    def observe(self, model: LoadedModel, answers: Sequence[PredictionStatistics]) -> None:
        """Queue the statistics of a model's predictions for the background thread."""
        if answers:
            at, bundle = time.time(), model.bundle
            self._arrived.extend(
                _QueuedPrediction(bundle.name, bundle.version, bundle.path, bundle.written_ns, at, one) for one in answers
            )

    def drift(self, version: ModelVersion) -> Drift:
        """Compare the recent predictions of a registered version with its reference.

        Raises:
            BundleError: the bundle is damaged.
        """
        with self._lock:
            self._add_queued()
            return self._monitored(version.name, version.version, version.path).drift()

    def choose_reference(self, version: ModelVersion, *, accept: bool) -> Drift:
        """Compare a version with its recent predictions from now on, or with the reference in its bundle again.

        Raises:
            Conflict: there are too few predictions to accept.
        """
        with self._lock:
            self._add_queued()
            watched = self._monitored(version.name, version.version, version.path)
            write_choice(self._registry, version, watched, accept=accept)
            self._compare(version.path, watched, with_another=True)
            return self._found[version.path]

    def last_found(self) -> list[tuple[str, str, Drift]]:
        """Return (name, version, drift) of the versions that were tested since the server started and still exist."""
        with self._lock:
            self._drop_deleted()
            return [(*self._names[path], drift) for path, drift in self._found.items()]

    def run_round(self) -> None:
        """Process the queue, test versions with enough new predictions, report new drift, and write the windows periodically."""
        with self._lock:
            self._drop_deleted()
            self._add_queued()
            for path, watched in self._watched.items():
                watched.collect()
                self._compare(path, watched, with_another=watched.follow_reference())
            if time.monotonic() - self._written_at >= KEEP_SECONDS:
                self._write_windows()

    def _watch(self) -> None:
        while not self._stopping.wait(self._seconds):
            try:
                self.run_round()
            except (OSError, FinetuneError):  # the database or the folder is unreachable: try again in the next round
                log.exception("drift could not be tested; the next attempt is in %g seconds", self._seconds)

    def _monitored(self, name: str, version: str, bundle: Path) -> MonitoredVersion:
        if bundle not in self._watched:
            registered = bundle == self._registry.root / name / version
            self._watched[bundle] = MonitoredVersion(bundle, self._registry.monitoring_of(name, version) if registered else None)
            self._names[bundle] = (name, version)
        return self._watched[bundle]

    def _add_queued(self) -> None:
        """Move the queued statistics into their windows."""
        waiting: dict[Path, list[_QueuedPrediction]] = defaultdict(list)
        while self._arrived:
            given = self._arrived.popleft()
            waiting[given.bundle].append(given)
        for bundle, several in waiting.items():
            try:
                self._drop_replaced(bundle, several[-1].written_ns)
                watched = self._monitored(several[0].name, several[0].version, bundle)
            except FinetuneError as error:  # the bundle was deleted or damaged since the prediction
                log.info("%s is not watched for drift: %s", bundle, error.message)
                continue
            fitting = [given.statistics for given in several if watched.fits(given.statistics)]
            if fitting:
                watched.window.add(concatenated(fitting), several[-1].at)

    def _drop_replaced(self, bundle: Path, written_ns: int) -> None:
        """Drop the window of a bundle folder if its model was replaced."""
        if self._written_ns.get(bundle) != written_ns:
            self._written_ns[bundle] = written_ns
            watched = self._watched.get(bundle)
            if watched is not None and read_manifest(bundle).files.get(MODEL, "") != watched.window.model_sha256:
                self._drop(bundle)

    def _compare(self, path: Path, watched: MonitoredVersion, *, with_another: bool = False) -> None:
        """Test a window if it has enough new predictions, or was never tested, or is compared `with_another` reference now."""
        window, alarm = watched.window, watched.window.alarm
        known, ready = self._found.get(path), watched.reference is not None and len(window) >= MIN_WINDOW
        enough_new = ready and (with_another or window.n_seen - alarm.looked_at >= LOOK_EVERY_IMAGES)
        if ready and not enough_new and known is not None and known.tests:
            return
        found = watched.drift()
        if enough_new:
            self._update_alarm(path, window, found)
            alarm.looked_at = window.n_seen
        self._found[path] = replace(found, drifted_since=alarm.since) if found.state == "drifted" else found

    def _update_alarm(self, path: Path, window: Window, found: Drift) -> None:
        """Record that drift has begun or ended. It has ended after a whole window of predictions without drift."""
        alarm = window.alarm
        name, version = self._names[path]
        if found.state == "drifted":
            alarm.last_seen = window.n_seen
            if alarm.since is None:
                since = time.time()
                self._notify(name, version, found, since)
                alarm.since = since
                self._written_at = -KEEP_SECONDS  # write at once, so that it is not reported again after a restart
                log.warning("%s@%s: %s", name, version, found.sentence)
        elif alarm.since is not None and window.n_seen - alarm.last_seen >= WINDOW_IMAGES:
            alarm.since = None
            log.info("%s@%s: %s", name, version, found.sentence)

    def _notify(self, name: str, version: str, found: Drift, since: float) -> None:
        engine = self._webhooks_store().engine
        with reading(engine) as connection:
            if connection.execute(select(webhooks.c.id).limit(1)).first() is None:
                return
        data = {
            "model": name,
            "version": version,
            "sentence": found.sentence,
            "n": found.n,
            "tests": [test.name for test in found.tests if test.drifted],
            "url": f"/v1/models/{name}/versions/{version}/drift",
        }
        with writing(engine) as connection:
            tell_users(connection, self._registry, DRIFTED, name, data, since, f"{name} {version} {since}")

    def _write_windows(self) -> None:
        """Write every changed window into its version's folder."""
        self._written_at = time.monotonic()
        for path, watched in self._watched.items():
            if not watched.has_changed:
                continue
            try:
                with self._registry.monitoring(*self._names[path]) as folder:
                    if folder is not None:
                        watched.write(folder)
            except (OSError, FinetuneError) as error:  # for example in a bento, whose models are read-only
                if not self._cannot_write:
                    log.warning("the windows of live answers are not kept over a restart: %s", error)
                self._cannot_write = True

    def _drop_deleted(self) -> None:
        for path in [path for path in self._watched if not (path / MANIFEST).exists()]:
            self._drop(path)

    def _drop(self, path: Path) -> None:
        del self._watched[path], self._names[path]
        self._found.pop(path, None)
        self._written_ns.pop(path, None)
