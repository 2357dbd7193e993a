"""The loaded models: loaded from the registry on first use, watched for changes, and replaced between requests.

A request uses one `LoadedModel` until its end, so that a replacement neither makes a request fail nor mixes two models in one
response; the old model is freed with its last request. A bundle that fails its checks is refused and the old one stays in use.
Bundles are loaded one at a time in a separate thread, so that loading blocks neither the event loop nor other routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.bundle.deployment import Deployment, Share, default_reference, read_deployment
from finetune.bundle.manifest import read_manifest
from finetune.bundle.predictor import Predictor
from finetune.bundle.registry import REFERENCE, ModelVersion, Registry
from finetune.errors import BundleError, FinetuneError, NotFound, NotReady, Overloaded
from finetune.storage.addresses import is_uri

log = logging.getLogger(__name__)

MAKE_ONE = "Make one with `finetune train --data FOLDER --name NAME`; it is served without a restart"
MAX_PENDING_LOADS = 16


@dataclass(frozen=True)
class WrittenBundle:
    """A bundle folder with its time of writing; a rewritten bundle is a different one."""

    name: str
    version: str
    path: Path
    written_ns: int


@dataclass(frozen=True)
class LoadedModel:
    """A bundle in memory that has passed its self-test."""

    bundle: WrittenBundle
    predictor: Predictor

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def version(self) -> str:
        return self.bundle.version

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


Role = Literal["pinned", "default", "canary", "shadow"]
"""What a model is for requests without a model name. A pinned one was named when the server started; a shadow does not answer."""


@dataclass(frozen=True)
class DeployedModel:
    """A model that requests without a model name go to."""

    role: Role
    reference: str


@dataclass(frozen=True)
class Choice:
    """The model that answers one request without a model name, its role, and the shadow that repeats the request."""

    model: LoadedModel
    role: Literal["default", "canary"]
    shadow: LoadedModel | None


class LoadedModels:
    """The default model and models requested by name, kept up to date by a background thread.

    Args:
        default: a ``name``, ``name@version``, ``name@alias``, bundle folder or URI of the default model; None for the deployment
            in the registry (see `finetune.bundle.deployment`).
        capacity: number of models by name in memory; the least recently used one is evicted.
        max_bytes: limit on the total size of their ``model.onnx`` files; the model used last is never evicted.
        load: loads a bundle folder.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        default: str | None = None,
        capacity: int = 8,
        max_bytes: int = 2 << 30,
        watch_seconds: float = 1.0,
        load: Callable[[Path], Predictor] = Predictor.load,
    ) -> None:
        self.registry = registry
        self.swaps = 0
        self.pinned = default
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._watch_seconds = watch_seconds
        self._load = load
        self._deployment: Deployment | None = None
        self._default: LoadedModel | None = None
        self._fetched: Path | None = None  # local copy of the bundle at a pinned URI
        self._fetch_trouble = ""
        self._canary_and_shadow: dict[str, LoadedModel] = {}  # canary and shadow, by reference
        self._reason = "The models folder has not been read yet"
        self._named: OrderedDict[str, LoadedModel] = OrderedDict()
        self._refused: dict[WrittenBundle, str] = {}
        self._lock = threading.Lock()  # protects the dictionaries above
        self._loading = threading.Lock()  # held while a bundle loads: one at a time
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model-loading")
        self._pending: dict[str, Future[LoadedModel]] = {}
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="models", daemon=True)

    def start(self) -> None:
        """Load the default model and watch for changes, in the background."""
        self._watcher.start()

    def stop(self) -> None:
        """Stop the background thread and the loader."""
        self._stopping.set()
        self._watcher.join()
        self._loader.shutdown(cancel_futures=True)

    def default(self) -> LoadedModel:
        """Return the default model. Raises `NotReady`, with the reason and what to do, while there is none."""
        default = self._default
        if default is None:
            raise NotReady(self._reason)
        return default

    @property
    def serves_a_folder(self) -> bool:
        """Whether the default is a bundle outside the registry: in a folder or at a URI."""
        return self.pinned is not None and "/" in self.pinned

    def deployment(self) -> Deployment | None:
        """Return the deployment of the default as last read; None if there is none."""
        return self._deployment

    def deployed(self) -> Sequence[DeployedModel]:
        """Return the registered models that requests without a model name go to."""
        if self.pinned is not None:
            return () if self.serves_a_folder else (DeployedModel("pinned", self.pinned),)
        if self._deployment is None:
            return ()
        found = [DeployedModel("default", self._deployment.reference)]
        if self._deployment.canary is not None:
            found.append(DeployedModel("canary", self._deployment.canary.reference))
        if self._deployment.shadow is not None:
            found.append(DeployedModel("shadow", self._deployment.shadow.reference))
        return found

    def choose(self, may_use: Callable[[LoadedModel], bool] = lambda _: True) -> Choice:
        """Choose the model for the next request to the default, and its shadow, at random by their percentages.

        Args:
            may_use: whether the caller may use a canary; if not, the default answers.

        Raises:
            NotReady: there is no default model.
        """
        model = self.default()
        deployed = self._deployment
        if deployed is None:
            return Choice(model, "default", None)
        shadow = self._drawn(deployed.shadow)
        canary = self._drawn(deployed.canary)
        if canary is None or not may_use(canary):
            return Choice(model, "default", shadow)
        return Choice(canary, "canary", shadow)

    def _drawn(self, share: Share | None) -> LoadedModel | None:
        if share is None or random.random() * 100.0 >= share.percent:
            return None
        return self._canary_and_shadow.get(share.reference)

    async def get(self, reference: str) -> LoadedModel:
        """Return the model of ``name``, ``name@version`` or ``name@alias``; on first use, load it in the loader's thread.

        Raises:
            NotFound: there is no such model or version.
            BundleError: it failed its checks, and no earlier version is loaded for this reference.
            Overloaded: too many models are waiting to be loaded.
        """
        loaded = self._loaded_as(reference)
        if loaded is not None:
            return loaded
        if not re.fullmatch(REFERENCE, reference):
            self.find(reference)
        pending = self._pending.get(reference)
        if pending is None:
            if len(self._pending) >= MAX_PENDING_LOADS:
                raise Overloaded(f"{len(self._pending)} other models are waiting to be loaded into memory. Try again in a moment")
            pending = self._pending[reference] = self._loader.submit(self.named, reference)
            loop = asyncio.get_running_loop()
            pending.add_done_callback(lambda _: loop.call_soon_threadsafe(self._pending.pop, reference, None))
        return await asyncio.shield(asyncio.wrap_future(pending))

    def named(self, reference: str) -> LoadedModel:
        """Return the same model as `get`, but load it in the calling thread if necessary."""
        loaded = self._loaded_as(reference)
        if loaded is not None:
            return loaded
        with self._loading:
            bundle = _registered_bundle(self.find(reference))
            loaded = self._up_to_date(self._named.get(reference), bundle)
            if loaded is None:
                raise BundleError(f"{bundle.name}@{bundle.version} is not served: {self._refused[bundle]}")
            self._keep(reference, loaded)
            return loaded

    def find(self, reference: str) -> ModelVersion:
        """Return the registered version of a reference. Raises `NotFound` without naming other models."""
        try:
            return self.registry.lookup(reference)
        except NotFound:
            name = reference.partition("@")[0]
            if self.registry.has(name):
                raise
            raise no_such_model(name) from None

    def check_ready(self) -> None:
        """Raise `NotReady` until the default model has passed its self-test, or if the background thread has died."""
        self.default()
        if not self._watcher.is_alive():
            raise NotReady("The thread that watches the models folder has stopped. Restart the server; its log has the cause")

    def loaded(self) -> list[tuple[str, str]]:
        """Return (name, version) of all models in memory."""
        return [(model.name, model.version) for model in self._all()]

    def exists(self, name: str, version: str | None) -> bool:
        """Return whether a model, or one version of it, is in memory or registered."""
        if any(name == one and version in (None, its) for one, its in self.loaded()):
            return True
        return any(version in (None, found.version) for found in self.registry.versions(name))

    def refused(self) -> dict[tuple[str, str], str]:
        """Map (name, version) of each requested bundle that is not served to the reason."""
        with self._lock:
            return {(bundle.name, bundle.version): reason for bundle, reason in self._refused.items()}

    def refresh(self) -> None:
        """Check the registry once and load the present version of each reference."""
        with self._loading:
            with self._lock:
                self._refused = {
                    bundle: why for bundle, why in self._refused.items() if bundle.written_ns == _written_ns(bundle.path)
                }
                named = list(self._named.items())
            self._refresh_default()
            for reference, loaded in named:
                try:
                    newer = self._up_to_date(loaded, _registered_bundle(self.registry.lookup(reference)))
                except NotFound:
                    with self._lock:
                        self._named.pop(reference, None)
                else:
                    if newer is not None and newer is not loaded:
                        self._keep(reference, newer)

    def _loaded_as(self, reference: str) -> LoadedModel | None:
        with self._lock:
            if reference not in self._named:
                return None
            self._named.move_to_end(reference)
            return self._named[reference]

    def _refresh_default(self) -> None:
        try:
            bundle = self._default_bundle()
        except NotFound:
            self._default, self._reason = None, self._why_there_is_none()
            return
        except NotReady as error:
            self._reason = error.message
            return
        except BundleError as error:  # not a bundle, or one that is being written
            self._reason = f"{error.message}. {MAKE_ONE}"
            return
        finally:
            self._refresh_canary_and_shadow()
        loaded = self._up_to_date(self._default, bundle)
        if loaded is None:
            self._reason = f"{bundle.name}@{bundle.version} is not served: {self._refused[bundle]}"
        self._default = loaded

    def _refresh_canary_and_shadow(self) -> None:
        """Load the canary and the shadow of the present deployment; one that cannot be loaded gets no requests."""
        beside = {}
        deployed = self._deployment
        for share in (deployed.canary, deployed.shadow) if deployed is not None else ():
            if share is not None:
                with contextlib.suppress(NotFound):
                    loaded = self._up_to_date(
                        self._canary_and_shadow.get(share.reference), _registered_bundle(self.registry.lookup(share.reference))
                    )
                    if loaded is not None:
                        beside[share.reference] = loaded
        self._canary_and_shadow = beside

    def _why_there_is_none(self) -> str:
        """Return why there is no default model. The message is public, so it contains no model names."""
        if not self.registry.names():
            return f"No model is registered yet. {MAKE_ONE}"
        if self.pinned is not None or self._deployment is not None:
            return "The model that this server answers with is not registered any more. An administrator must promote another one"
        return "No default model is chosen. An administrator chooses one: finetune models promote NAME --default"

    def _up_to_date(self, present: LoadedModel | None, wanted: WrittenBundle) -> LoadedModel | None:
        """Return the model of `wanted`, loaded unless it is `present`; return `present` if the new one fails its checks."""
        if present is not None and present.bundle == wanted:
            return present
        if wanted in self._refused:
            return present
        same = next((other for other in self._all() if other.bundle == wanted), None)
        if same is not None:
            return same
        try:
            newer = LoadedModel(wanted, self._load(wanted.path))
        except BundleError as error:
            with self._lock:
                self._refused[wanted] = str(error).removeprefix(f"{wanted.path}: ")
            log.error("%s@%s refused: %s", wanted.name, wanted.version, error)
            return present
        self.swaps += present is not None
        log.info("%s is loaded", newer)
        return newer

    def _all(self) -> list[LoadedModel]:
        with self._lock:
            return [*self._named.values(), *self._canary_and_shadow.values(), *([self._default] if self._default else [])]

    def _keep(self, reference: str, model: LoadedModel) -> None:
        with self._lock:
            self._named[reference] = model
            self._named.move_to_end(reference)
            while len(self._named) > 1 and (len(self._named) > self._capacity or self._named_bytes() > self._max_bytes):
                self._named.popitem(last=False)

    def _named_bytes(self) -> int:
        sizes = {model.bundle: model.predictor.model_bytes for model in self._named.values()}
        return sum(sizes.values())

    def _default_bundle(self) -> WrittenBundle:
        if self.pinned is None:
            self._deployment = read_deployment(self.registry)
            return _registered_bundle(self.registry.lookup(default_reference(self.registry)))
        if is_uri(self.pinned):
            return _bundle_in(self._fetched_once(self.pinned))
        if self.serves_a_folder:
            return _bundle_in(Path(self.pinned))
        return _registered_bundle(self.registry.lookup(self.pinned))

    def _fetched_once(self, address: str) -> Path:
        """Return the local copy of the bundle at the pinned URI; download it once. Later changes at the URI are ignored.

        Raises:
            NotReady: it cannot be downloaded now. The reason is only logged, since it may contain confidential names.
        """
        if self._fetched is None:
            try:
                self._fetched = self.registry.locate(address)
            except FinetuneError as error:
                if error.message != self._fetch_trouble:
                    log.error("%s", error.message)
                self._fetch_trouble = error.message
                raise NotReady("The model cannot be fetched from its address yet; the server's log has the reason") from None
        return self._fetched

    def _watch(self) -> None:
        trouble = ""
        while True:
            try:
                self.refresh()
                trouble = ""
            except Exception as error:  # the folder may be repaired by the next round
                if str(error) != trouble:
                    log.exception("The models folder cannot be read; the loaded models stay in use")
                trouble = str(error)
            if self._stopping.wait(self._watch_seconds):
                return


def no_such_model(name: str) -> NotFound:
    """Return the error for a missing model, which is the same for another owner's private model; it names no other model."""
    return NotFound(f"no model {name[:100]!r}; GET /v1/models lists those that you may use")


def _registered_bundle(version: ModelVersion) -> WrittenBundle:
    return WrittenBundle(version.name, version.version, version.path, _written_ns(version.path))


def _bundle_in(folder: Path) -> WrittenBundle:
    """Return a bundle outside the registry, named by its manifest."""
    manifest = read_manifest(folder)
    return WrittenBundle(manifest.name, manifest.version or "0", folder, _written_ns(folder))


def _written_ns(folder: Path) -> int:
    try:
        return (folder / "bundle.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0  # loading it will report the missing file
