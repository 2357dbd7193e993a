"""The bundles that answer now: loaded from the registry, watched, and swapped between requests.

A request takes the `Live` bundle once and keeps it to its end, so a swap neither fails a request nor mixes two models in one
answer; the old bundle is freed with its last request. A new bundle that fails its checks is refused and the old one goes on.
Knows folders and predictors; does not know HTTP. Torch-free.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.bundle.manifest import read_manifest
from finetune.bundle.predictor import Predictor
from finetune.bundle.registry import ModelVersion, Registry
from finetune.errors import BundleError, NotFound, NotReady

log = logging.getLogger(__name__)

REFERENCE = r"[a-z0-9][a-z0-9._-]{0,62}(@[a-z0-9][a-z0-9._-]{0,62})?"  # checked before it becomes part of a path
MAKE_ONE = "Make one with `finetune train --data FOLDER --name NAME`; it is served without a restart"


@dataclass(frozen=True)
class Source:
    """A bundle folder as it was when looked at; written again, it is another source."""

    name: str
    version: str
    path: Path
    written_ns: int


@dataclass(frozen=True)
class Live:
    """A bundle in memory, both of its probes passed."""

    source: Source
    predictor: Predictor

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def version(self) -> str:
        return self.source.version


class LiveModels:
    """The default model and those asked for by name, kept up to date by a thread of its own.

    Args:
        default: what `default()` gives: ``name``, ``name@version``, a bundle folder, or None for the newest model.
        capacity: named models held in memory; the least recently used makes room.
        load: bundle folder → Predictor.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        default: str | None = None,
        capacity: int = 8,
        watch_seconds: float = 1.0,
        load: Callable[[Path], Predictor] = Predictor.load,
    ) -> None:
        self.registry = registry
        self.swaps = 0
        self._reference = default
        self._capacity = capacity
        self._watch_seconds = watch_seconds
        self._load = load
        self._default: Live | None = None
        self._reason = "The models have not been looked at yet"
        self._named: OrderedDict[str, Live] = OrderedDict()
        self._refused: dict[Source, str] = {}
        self._maps = threading.Lock()  # held for moments: the maps above
        self._loading = threading.Lock()  # held while a bundle loads: one at a time
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="models", daemon=True)

    def start(self) -> None:
        """Load the default model and watch for changes, in the background."""
        self._watcher.start()

    def stop(self) -> None:
        self._stopping.set()
        self._watcher.join()

    def default(self) -> Live:
        """Raises `NotReady`, with what to do about it, while there is none."""
        live = self._default
        if live is None:
            raise NotReady(self._reason)
        return live

    def named(self, reference: str) -> Live:
        """The live bundle of ``name`` or ``name@version``, loaded now if it is asked for the first time.

        Raises:
            NotFound: no such model or version.
            BundleError: it failed its checks, and no earlier version of it is live.
        """
        with self._maps:
            if reference in self._named:
                self._named.move_to_end(reference)
                return self._named[reference]
        with self._loading:
            source = _source(self.find(reference))
            live = self._follow(self._named.get(reference), source)
            if live is None:
                raise BundleError(f"{source.name}@{source.version} is not served: {self._refused[source]}")
            self._keep(reference, live)
            return live

    def check_ready(self) -> None:
        """Raises `NotReady` until the default model has passed its probes, and when nobody watches for changes any more."""
        self.default()
        if not self._watcher.is_alive():
            raise NotReady("The thread that watches the models folder has stopped. Restart the server; its log has the cause")

    def loaded(self) -> list[tuple[str, str]]:
        """(name, version) of everything in memory."""
        return [(live.name, live.version) for live in self._lives()]

    def refused(self) -> dict[tuple[str, str], str]:
        """(name, version) → why this bundle is not served although it was asked for."""
        with self._maps:
            return {(source.name, source.version): reason for source, reason in self._refused.items()}

    def refresh(self) -> None:
        """Look at the disk once and make every live bundle the one that its reference names now."""
        with self._loading:
            with self._maps:
                self._refused = {
                    source: why for source, why in self._refused.items() if source.written_ns == _written_ns(source.path)
                }
                named = list(self._named.items())
            self._refresh_default()
            for reference, live in named:
                try:
                    newer = self._follow(live, _source(self.find(reference)))
                except NotFound:
                    with self._maps:
                        self._named.pop(reference, None)
                else:
                    if newer is not None and newer is not live:
                        self._keep(reference, newer)

    def _refresh_default(self) -> None:
        try:
            source = self._default_source()
        except NotFound as error:
            self._default, self._reason = None, f"{error.message}. {MAKE_ONE}"
            return
        except BundleError as error:  # a folder that is no bundle, or not now: somebody may be writing it
            self._reason = f"{error.message}. {MAKE_ONE}"
            return
        live = self._follow(self._default, source)
        if live is None:
            self._reason = f"{source.name}@{source.version} is not served: {self._refused[source]}"
        self._default = live

    def _follow(self, live: Live | None, wanted: Source) -> Live | None:
        """What is live after looking at `wanted`: itself, or still `live` if it fails its checks (None if there was nothing)."""
        if live is not None and live.source == wanted:
            return live
        if wanted in self._refused:
            return live
        same = next((other for other in self._lives() if other.source == wanted), None)
        if same is not None:
            return same
        try:
            newer = Live(wanted, self._load(wanted.path))
        except BundleError as error:
            with self._maps:
                self._refused[wanted] = str(error).removeprefix(f"{wanted.path}: ")
            log.error("%s@%s refused: %s", wanted.name, wanted.version, error)
            return live
        self.swaps += live is not None
        log.info("%s@%s is live", wanted.name, wanted.version)
        return newer

    def _lives(self) -> list[Live]:
        with self._maps:
            return [*self._named.values(), *([self._default] if self._default else [])]

    def _keep(self, reference: str, live: Live) -> None:
        with self._maps:
            self._named[reference] = live
            self._named.move_to_end(reference)
            while len(self._named) > self._capacity:
                self._named.popitem(last=False)

    def _default_source(self) -> Source:
        if self._reference is None:
            if not self.registry.list():
                raise NotFound("No model is registered yet")
            return _source(self.registry.newest())
        if "/" in self._reference:
            return _folder_source(Path(self._reference))
        return _source(self.find(self._reference))

    def find(self, reference: str) -> ModelVersion:
        """The registered version that ``name``, ``name@version`` or ``name@alias`` means; raises `NotFound`."""
        if not re.fullmatch(REFERENCE, reference):
            raise NotFound(
                f"no model {reference[:100]!r}: a reference is a name, name@version or name@alias, as in 'flowers@champion'"
            )
        name, _, version = reference.partition("@")
        return self.registry.resolve(name, version or None)

    def _watch(self) -> None:
        trouble = ""
        while True:
            try:
                self.refresh()
                trouble = ""
            except (OSError, ValueError) as error:  # a folder that cannot be read, an aliases.json that is not JSON
                if str(error) != trouble:
                    log.exception("The models folder cannot be read; what is live stays live")
                trouble = str(error)
            if self._stopping.wait(self._watch_seconds):
                return


def _source(version: ModelVersion) -> Source:
    return Source(version.name, version.version, version.path, _written_ns(version.path))


def _folder_source(folder: Path) -> Source:
    """A bundle that is served from where it lies, under the name its manifest gives."""
    manifest = read_manifest(folder)
    return Source(manifest.name, manifest.version or "0", folder, _written_ns(folder))


def _written_ns(folder: Path) -> int:
    try:
        return (folder / "bundle.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0  # loading it will say what is missing
