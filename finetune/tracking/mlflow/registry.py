"""Synchronise the versions and aliases of the models folder and of MLflow's model registry, in both directions.

A version is identified by the digest of its bundle's files, and has the same number in both registries wherever MLflow allows it.
The state at the last synchronisation is recorded beside the model (``mlflow.json``). The registry that differs from it is the one
that was changed, even if MLflow could not be reached for a while. If an alias was moved in both, the one in the models folder
wins, since it is what the server uses. An alias that was moved in MLflow counts as a promotion and passes the same checks.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.bundle.access import Access
from finetune.bundle.aliases import LATEST
from finetune.bundle.manifest import Manifest, read_manifest
from finetune.bundle.registry import ModelVersion, Registry
from finetune.errors import InvalidInput, NotFound
from finetune.promotion import PromotionRefused, promote
from finetune.spec import SUFFIX_PATTERN
from finetune.storage.files import file_lock, read_json, write_json
from finetune.storage.workspace import Workspace
from finetune.tracking.mlflow.connection import Destination
from finetune.tracking.mlflow.model import BUNDLE_TAG, bundle_digest, link_version, log_model, stored_model
from finetune.tracking.view import ModelView

STATE = "mlflow.json"
NUMBER_TAG = "finetune.version"  # the version's number in the models folder
MODEL_NOTE = "Made by finetune, whose models folder has the same versions and aliases."
MOST_PLACEHOLDERS = 100
_MLFLOW_ALIAS = re.compile(r"[\w-]+")
_RESERVED_ALIAS = re.compile(r"latest|[vV]\d+")  # MLflow's own

Stored = Mapping[str, tuple[str, str]]  # version in the models folder -> ids of the logged model and of the run in MLflow


@dataclass
class SyncedState:
    """The state of both registries at the last synchronisation."""

    destination: str = ""
    versions: dict[str, str] = field(default_factory=dict)  # number in the models folder -> MLflow's
    aliases: dict[str, str] = field(default_factory=dict)  # alias -> number in the models folder


def synchronise(
    client: Any, target: Destination, workspace: Workspace, names: Sequence[str] | None = None, stored: Stored | None = None
) -> list[str]:
    """Synchronise versions and aliases; return one sentence for each difference that remains.

    Args:
        names: of the models; by default all in the models folder, and those in MLflow with a version made from a bundle.
        stored: versions whose bundle is already logged in MLflow.
    """
    registry = Registry(workspace.models)
    if names is None:
        known = {*registry.names(), *_once_mirrored(registry)}
        names = sorted({*known, *_ours_in_mlflow(client, known)})
    found: list[str] = []
    for name in names:
        with file_lock(registry.root / name / ".mlflow.lock"):
            found += _Synchronisation(client, target, registry, name, stored or {}).run()
    return found


class _Synchronisation:
    """The synchronisation of one model. In it `ours` is the models folder and `theirs` is MLflow."""

    def __init__(self, client: Any, target: Destination, registry: Registry, name: str, stored: Stored) -> None:
        self.client, self.target, self.registry, self.name, self.stored = client, target, registry, name, stored
        self.state_file = registry.root / name / STATE
        self.notes: list[str] = []

    def run(self) -> list[str]:
        """Synchronise versions, then aliases; return one sentence for each difference that remains."""
        model = self._registered()
        agreed = self._read_state()
        if model is None or agreed.destination != self.target.shown:
            agreed = SyncedState(self.target.shown)  # never synchronised with this MLflow before
        theirs = self._theirs() if model is not None else {}
        pairs = self._pairs(theirs)
        self._delete_there(agreed, theirs, pairs)
        self._push(agreed, pairs)
        self._pull(agreed, theirs, pairs)
        agreed.versions |= pairs
        agreed.versions = {ours: number for ours, number in agreed.versions.items() if self._has(ours)}
        if pairs:
            self._aliases(agreed, pairs)
        if agreed.versions or self.state_file.exists():
            write_json(self.state_file, asdict(agreed))
        return self.notes

    # -- what there is

    def _read_state(self) -> SyncedState:
        try:
            return SyncedState(**read_json(self.state_file))
        except (FileNotFoundError, ValueError, TypeError):
            return SyncedState()

    def _registered(self) -> Any | None:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _theirs(self) -> dict[str, Any]:
        """Return MLflow's versions by their number."""
        return {str(version.version): version for version in self.client.search_model_versions(f"name = '{self.name}'")}

    def _ours(self) -> dict[str, ModelVersion]:
        return {version.version: version for version in self.registry.versions(self.name)}

    def _has(self, version: str) -> bool:
        return version in self._ours()

    def _pairs(self, theirs: Mapping[str, Any]) -> dict[str, str]:
        """Map each of our versions to MLflow's version with the same bundle; among several, to the one tagged with its number."""
        digests = {
            number: digest for number, version in theirs.items() if (digest := digest_of(self.client, version)) is not None
        }
        pairs: dict[str, str] = {}
        for number, version in self._ours().items():
            digest = bundle_digest(read_manifest(version.path))
            same = [theirs_number for theirs_number, other in digests.items() if other == digest]
            free = [one for one in same if one not in pairs.values()]
            marked = [one for one in free if theirs[one].tags.get(NUMBER_TAG) == number]
            if chosen := [*marked, *(one for one in free if NUMBER_TAG not in theirs[one].tags)]:
                pairs[number] = chosen[0]
        return pairs

    # -- versions

    def _delete_there(self, agreed: SyncedState, theirs: dict[str, Any], pairs: Mapping[str, str]) -> None:
        """Delete the versions in MLflow that were deleted in the models folder."""
        for ours, number in list(agreed.versions.items()):
            if not self._has(ours) and number in theirs and number not in pairs.values():
                self.client.delete_model_version(self.name, number)
                del theirs[number]
                del agreed.versions[ours]

    def _push(self, agreed: SyncedState, pairs: dict[str, str]) -> None:
        """Register the versions in MLflow that only the models folder has."""
        for number, version in self._ours().items():
            if number in pairs:
                continue
            if number in agreed.versions:
                self.notes.append(f"{self.name} version {number} was deleted in MLflow, and is still here")
                continue
            pairs[number] = self._register(version)

    def _register(self, version: ModelVersion) -> str:
        manifest = read_manifest(version.path)
        digest = bundle_digest(manifest)
        model_id, run_id = self.stored.get(version.version, (None, None))
        if model_id is None:
            model_id, run_id = self._stored(version, digest)
        self._create_registered_model()
        tags = {BUNDLE_TAG: digest, NUMBER_TAG: version.version, "method": str(manifest.method.get("type", ""))}
        for _ in range(MOST_PLACEHOLDERS):
            made = self.client.create_model_version(
                self.name,
                f"models:/{model_id}",
                run_id,
                tags,
                description=_described(manifest),
                await_creation_for=0,
                model_id=model_id,
            )
            if int(made.version) >= int(version.version):
                break
            # MLflow numbers consecutively: placeholders use up the numbers of versions that were deleted in the models folder.
            self.client.delete_model_version(self.name, made.version)
        link_version(self.client, model_id, self.name, str(made.version))
        if str(made.version) != version.version:
            self.notes.append(
                f"{self.name} version {version.version} is version {made.version} in MLflow, which had that number already"
            )
        return str(made.version)

    def _stored(self, version: ModelVersion, digest: str) -> tuple[str, str | None]:
        """Return the ids of the bundle's logged model and its run; log the model without a run if MLflow does not have it."""
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments(max_results=1000)]
        if (known := stored_model(self.client, experiments, digest)) is not None:
            return known, self.client.get_logged_model(known).source_run_id
        from finetune.tracking.mlflow.tracker import experiment_named

        experiment_id = experiment_named(self.client, self.target, self.name)
        return log_model(self.client, ModelView(version.path, self.name, version.version), experiment_id, None), None

    def _create_registered_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.name, description=MODEL_NOTE)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _pull(self, agreed: SyncedState, theirs: Mapping[str, Any], pairs: dict[str, str]) -> None:
        """Register versions in the models folder that were registered in MLflow from one of our bundles."""
        for number, version in sorted(theirs.items(), key=lambda item: int(item[0])):
            if number in pairs.values() or digest_of(self.client, version) is None:
                continue
            if not self.registry.has(self.name):
                # The user who registered it in MLflow is unknown, so only administrators may use it until they share it.
                self.registry.set_access(self.name, Access(owner=None, visibility="private"))
            with tempfile.TemporaryDirectory(prefix="finetune-mlflow-") as scratch:
                found = _download(self.target, self.name, number, Path(scratch))
                ours = self.registry.register(found, self.name).version
            self.client.set_model_version_tag(self.name, number, NUMBER_TAG, ours)
            self.client.set_model_version_tag(self.name, number, BUNDLE_TAG, digest_of(self.client, version))
            pairs[ours] = number
            agreed.versions[ours] = number

    # -- aliases

    def _aliases(self, agreed: SyncedState, pairs: Mapping[str, str]) -> None:
        here = {alias: number for number, version in self._ours().items() for alias in version.aliases if alias != LATEST}
        of_theirs = {number: ours for ours, number in pairs.items()}
        model = self._registered()
        there = {
            alias: of_theirs[str(number)]
            for alias, number in (model.aliases if model else {}).items()
            if str(number) in of_theirs
        }
        for alias in sorted({*here, *there}):
            if settled := self._synchronise_alias(alias, here.get(alias), there.get(alias), agreed.aliases.get(alias), pairs):
                agreed.aliases[alias] = settled
            else:
                agreed.aliases.pop(alias, None)

    def _synchronise_alias(
        self, alias: str, here: str | None, there: str | None, before: str | None, pairs: Mapping[str, str]
    ) -> str | None:
        """Synchronise one alias; return the version that it has in both registries, or None if that failed."""
        if here == there:
            return here
        if not _MLFLOW_ALIAS.fullmatch(alias) or _RESERVED_ALIAS.fullmatch(alias):
            self.notes.append(f"MLflow allows no alias {alias!r}, so {self.name}@{alias} exists only in the models folder")
            return None
        moved_there = there is not None and there != before and here in (before, None)
        if moved_there:
            assert there is not None
            try:
                promote(self.registry, self.name, there, alias, by="MLflow")
            except (PromotionRefused, InvalidInput, NotFound) as error:
                self.notes.append(f"{self.name}@{alias} was moved in MLflow to version {there}, and not here: {error}")
                return before
            return there
        if here is None or here not in pairs:
            return None
        if there is not None and there != before:
            self.notes.append(
                f"{self.name}@{alias} was moved in both registries: version {here} of the models folder counts, not {there}"
            )
        self.client.set_registered_model_alias(self.name, alias, pairs[here])
        return here


def _once_mirrored(registry: Registry) -> Iterator[str]:
    for state in registry.root.glob(f"*/{STATE}"):
        yield state.parent.name


def _ours_in_mlflow(client: Any, known: Container[str]) -> Iterator[str]:
    """Yield the names of models in MLflow, other than `known`, with a version made from one of our bundles."""
    versions: dict[str, list[Any]] = {}
    for version in client.search_model_versions():
        if version.name not in known and re.fullmatch(SUFFIX_PATTERN, version.name):
            versions.setdefault(version.name, []).append(version)
    for name, found in versions.items():
        if any(digest_of(client, version) is not None for version in found):
            yield name


def digest_of(client: Any, version: Any) -> str | None:
    """Return the digest of the bundle that a version in MLflow was made from; None if it was not made from one of ours."""
    if BUNDLE_TAG in version.tags:
        return str(version.tags[BUNDLE_TAG])
    model_id = getattr(version, "model_id", None) or _model_id_in(version.source)
    if model_id is None:
        return None
    found = client.get_logged_model(model_id).tags.get(BUNDLE_TAG)
    return None if found is None else str(found)


def _model_id_in(source: str | None) -> str | None:
    found = re.fullmatch(r"models:/(m-[0-9a-f]+)(/.*)?", source or "")
    return found[1] if found else None


def _download(target: Destination, name: str, number: str, folder: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    return Path(
        download_artifacts(
            artifact_uri=f"models:/{name}/{number}", dst_path=str(folder), tracking_uri=target.uri, registry_uri=target.uri
        )
    )


def _described(manifest: Manifest) -> str:
    """Return a version's description: method, backbone and metrics."""
    metrics, figures = manifest.metrics, []
    for key, value in metrics.items():
        low, high, n = (metrics.get(name) for name in (f"{key}_low", f"{key}_high", f"{key.partition('/')[0]}/n"))
        if low is not None and high is not None and n is not None:
            figures.append(f"{key} {value:.4f} ({low:.4f} to {high:.4f}, n {n:,.0f})")
    return "; ".join([f"{manifest.method.get('type')} on {manifest.backbone.get('name')}", *figures])
