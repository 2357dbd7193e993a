"""The registry of models, a folder with named models in numbered versions. Torch-free.

``<name>/<version>/`` is a bundle; ``<name>/aliases.json`` maps aliases to versions; ``<name>/predictions/<version>.npz`` is the
table of a version's predictions on its test images; ``<name>/monitoring/<version>/`` contains what a server keeps of its live
predictions.

Registering does not deploy: a new version moves only the alias ``latest``. The version of a bare model name (alias ``champion``)
and the server's default (``default.json``, see `finetune.bundle.deployment`) change only by promotion. Exceptions are the first
version of a model and the first model of an empty folder, which are promoted when they are registered.

Readers need no lock: a version appears by a rename, and an alias changes by another, so everything visible is complete. Writers
of one model exclude each other with a lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from finetune.bundle import deployment
from finetune.bundle.access import ACCESS_ADAPTER, SHARED, Access
from finetune.bundle.aliases import (
    ALIAS_PATTERN,
    ALIASES,
    CHAMPION,
    JOURNAL,
    LATEST,
    AliasMove,
    is_version,
    move_alias,
    moves_in,
    read_aliases,
    recorded_versions,
    versions_in,
)
from finetune.bundle.calibration import Calibration, CertaintyEstimator, CertaintyOptions
from finetune.bundle.manifest import MANIFEST, Manifest, read_manifest
from finetune.bundle.remote import fetch_bundle
from finetune.errors import BundleError, Conflict, InvalidInput, NotFound, did_you_mean
from finetune.spec import SUFFIX_PATTERN
from finetune.storage.addresses import is_uri
from finetune.storage.files import atomic_path, file_lock, files_under, sha256_file, write_json
from finetune.storage.journal import read_lines
from finetune.tasks import task_named

_ACCESS = "access.json"
_PREDICTIONS = "predictions"  # a folder: ``<version>.npz``
_MONITORING = "monitoring"  # a folder: ``<version>/``, see `finetune.monitoring`
_FETCHED = ".fetched"  # a folder of bundles from object storage
_ARRIVING, _LEAVING = ".arriving-", ".leaving-"
REFERENCE = r"[a-z0-9][a-z0-9._-]{0,62}(@[a-z0-9][a-z0-9._-]{0,62})?"  # checked before it becomes part of a path


@dataclass(frozen=True)
class ModelVersion:
    """A registered bundle."""

    name: str
    version: str
    path: Path
    aliases: tuple[str, ...]
    created_at: float  # when it was registered, Unix seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path), "aliases": list(self.aliases)}


@dataclass(frozen=True)
class Registry:
    """The models in the folder `root`, usually ``models`` of the workspace; the folder need not exist yet."""

    root: Path

    def register(self, bundle: Path, name: str, *, once: bool = False, predictions: Path | None = None) -> ModelVersion:
        """Copy a bundle into the registry as the next version of `name`, and point ``latest`` at it.

        The first version of a model also becomes its champion, and the first model of an empty folder the server's default.

        Args:
            once: if the bundle already is a version of `name`, return that version. A job that was killed between registering and
                reporting registers again.
            predictions: table of the model's predictions on test images. A copy is kept, so that a later version can be compared
                with this one on the same images before it is promoted.

        Raises:
            InvalidInput: `name` is not a valid model name.
            BundleError: the bundle is incomplete or was changed; nothing is registered.
            DiskFull: there is no space for the copy; nothing is registered.
        """
        if not re.fullmatch(SUFFIX_PATTERN, name):
            raise InvalidInput(
                f"{name!r} cannot be a model name: use a-z, 0-9, dot, dash and underscore, at most 63, as in 'flowers'"
            )
        manifest = read_manifest(bundle)
        folder = self.root / name
        with _locked(folder):
            for known in self._versions_of(name) if once else ():
                if read_manifest(known.path).files == manifest.files:
                    self._point_aliases(name, known.version)  # in case it was killed before the aliases moved
                    return self.resolve(name, known.version)
            version = str(1 + max((int(version) for version in (*versions_in(folder), *recorded_versions(folder))), default=0))
            arriving = folder / f"{_ARRIVING}{version}"
            _copy_bundle(bundle, arriving, dataclasses.replace(manifest, name=name, version=version))
            _keep_predictions(predictions, folder / _PREDICTIONS / f"{version}.npz")
            arriving.rename(folder / version)
            self._point_aliases(name, version)
        return self._describe(name, version, read_aliases(folder))

    def predictions_of(self, version: ModelVersion) -> Path:
        """Return the path of a version's predictions on test images; the file does not exist if there were no test images."""
        return self.root / version.name / _PREDICTIONS / f"{version.version}.npz"

    def monitoring_of(self, name: str, version: str) -> Path:
        """Return the folder for records of a version's live predictions; it does not exist as long as there are none."""
        return self.root / name / _MONITORING / version

    @contextlib.contextmanager
    def monitoring(self, name: str, version: str) -> Iterator[Path | None]:
        """Yield the folder for records of live predictions, and prevent that the version is deleted during the block.

        Yields:
            None if the version does not exist.
        """
        if not (self.root / name / version / MANIFEST).exists():
            yield None
            return
        with _locked(self.root / name):
            if not (self.root / name / version / MANIFEST).exists():
                yield None
                return
            folder = self.monitoring_of(name, version)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            yield folder

    def _point_aliases(self, name: str, version: str) -> None:
        """Point ``latest`` at a new version, and promote the version or the model if nothing was promoted before."""
        folder = self.root / name
        aliases = read_aliases(folder)
        if CHAMPION not in aliases:  # the version that the bare name referred to so far is promoted
            earlier = [known for known in versions_in(folder) if int(known) < int(version)]
            move_alias(folder, CHAMPION, aliases.get(LATEST, earlier[-1] if earlier else version), by="first registration")
        if int(version) > int(aliases.get(LATEST, "0")):
            move_alias(folder, LATEST, version, by="registration")
        deployment.deploy_first(self, name)

    def list(self) -> tuple[ModelVersion, ...]:
        """Return every version of every model, sorted by name and then in the order of registration."""
        names = sorted(folder.name for folder in self.root.iterdir() if folder.is_dir()) if self.root.is_dir() else []
        return tuple(version for name in names for version in self._versions_of(name))

    def versions(self, name: str) -> tuple[ModelVersion, ...]:
        """Return every version of a model, in the order of registration; empty if there is no such model."""
        return self._versions_of(name)

    def journal(self, name: str) -> Path:
        """Return the path of the append-only file with the moves of a model's aliases."""
        return self.root / name / JOURNAL

    def moves(self, name: str) -> tuple[AliasMove, ...]:
        """Return all moves of the aliases of a model, oldest first."""
        return tuple(
            AliasMove(line["alias"], line["version"], float(line.get("at", 0.0)), str(line.get("by", "")))
            for line in read_lines(self.journal(name))
            if isinstance(line, dict) and isinstance(line.get("alias"), str) and is_version(line.get("version"))
        )

    def names(self) -> tuple[str, ...]:
        """Return the names of all models that have a version."""
        folders = [folder for folder in self.root.iterdir() if folder.is_dir()] if self.root.is_dir() else []
        found = (folder.name for folder in folders if re.fullmatch(SUFFIX_PATTERN, folder.name) and versions_in(folder))
        return tuple(sorted(found))

    def has(self, name: str) -> bool:
        """Return whether there is a model with this name that has a version."""
        return re.fullmatch(SUFFIX_PATTERN, name) is not None and bool(versions_in(self.root / name))

    def resolve(self, name: str, version_or_alias: str | None = None) -> ModelVersion:
        """Return the version with this number or alias; by default the champion or, if none was promoted, the latest.

        Raises:
            NotFound: there is no such model, version or alias. The message names those that exist, but only shared models,
                because other users may read it.
        """
        found = self._versions_of(name)
        if not found:
            raise NotFound(f"no model {name!r}.{self._suggestion(name)}")
        by_key = {key: version for version in found for key in (version.version, *version.aliases)}
        by_key.setdefault(LATEST, found[-1])  # aliases.json is missing if the folder was filled by hand
        by_key.setdefault(CHAMPION, by_key[LATEST])
        key = version_or_alias or CHAMPION
        if key not in by_key:
            raise NotFound(
                f"model {name!r} has no version or alias {key!r}.{did_you_mean(key, list(by_key))} It has: {', '.join(by_key)}"
            )
        return by_key[key]

    def _suggestion(self, name: str) -> str:
        """Return a sentence that suggests existing models in place of an unknown name."""
        names = self.names()
        if not names:
            return " None is registered: train one with finetune train"
        shared = [known for known in names if self.access(known).visibility == SHARED]
        listed = f"Registered are: {', '.join(shared)}" if shared else "finetune models list shows those that are registered"
        return f"{did_you_mean(name, shared)} {listed}"

    def default(self) -> ModelVersion:
        """Return the version of the server's default reference (see `finetune.bundle.deployment`).

        Raises:
            NotFound: no model is registered, there is no default, or it does not exist any more.
        """
        return self.lookup(deployment.default_reference(self))

    def lookup(self, reference: str) -> ModelVersion:
        """Return the version of a reference: ``name``, ``name@version`` or ``name@alias``.

        Raises:
            NotFound: there is no such version, or the text is not a reference.
        """
        if not re.fullmatch(REFERENCE, reference):
            raise NotFound(
                f"no model {reference[:100]!r}: a reference is a name, name@version or name@alias, as in 'flowers@champion'"
            )
        name, _, key = reference.partition("@")
        return self.resolve(name, key or None)

    def locate(self, reference: str | None = None) -> Path:
        """Return the folder of the bundle that a user refers to.

        Args:
            reference: the folder of a bundle or of a run; an address such as ``s3://bucket/flowers/3``, from which the bundle is
                fetched into the registry's folder; or ``name``, ``name@version`` or ``name@alias``. None: the server's default.

        Raises:
            NotFound: there is no such folder, model, version or alias.
        """
        if reference is None:
            return self.default().path
        if is_uri(reference):
            return fetch_bundle(reference, self.root / _FETCHED)
        folder = Path(reference)
        for place in (folder, folder / "bundle"):
            if (place / MANIFEST).is_file():
                return place
        if "/" in reference:
            raise NotFound(f"{reference}: this folder is neither a bundle nor a run that exported a model")
        return self.lookup(reference).path

    def set_alias(self, name: str, alias: str, version: str, **audit: Any) -> ModelVersion:
        """Point an alias atomically at a version, which may be given by another alias.

        Args:
            audit: who moved it and why, for the journal.

        Raises:
            InvalidInput: the alias is not a valid one.
            NotFound: there is no such model or version.
        """
        if not re.fullmatch(ALIAS_PATTERN, alias):
            raise InvalidInput(f"{alias!r} cannot be an alias: start with a letter a-z, as in 'champion'; numbers are versions")
        if alias == LATEST:
            raise InvalidInput(f"{alias!r} always means the newest version; give the version another alias, such as 'champion'")
        self.resolve(name, version)
        folder = self.root / name
        with _locked(folder):
            target = self.resolve(name, version).version
            move_alias(folder, alias, target, **audit)
        return self._describe(name, target, read_aliases(folder))

    def rollback(self, name: str, alias: str = CHAMPION, **audit: Any) -> ModelVersion:
        """Point an alias back at its previous version; a second rollback undoes the first.

        Raises:
            NotFound: there is no such model or alias.
            Conflict: the alias never pointed at another version that still exists.
        """
        current = self.resolve(name, alias).version
        folder = self.root / name
        moves = [version for moved, version in moves_in(folder) if moved == alias]
        previous = next((version for version in reversed(moves) if version != current and (folder / version).is_dir()), None)
        if previous is None:
            raise Conflict(f"{name}@{alias} has never pointed at a version other than {current} that still exists")
        return self.set_alias(name, alias, previous, **audit)

    def delete(self, name: str, version: str | None = None, *, force: bool = False) -> None:
        """Delete one version of a model, or all of them. Their numbers are not used again.

        Args:
            force: delete versions even if aliases point at them; ``latest`` then moves to the newest remaining version, and other
                aliases are removed.

        Raises:
            NotFound: there is no such model or version.
            Conflict: an alias points at a version, and `force` is not given.
        """
        folder = self.root / name
        self.resolve(name, version)
        with _locked(folder):
            deleted = self._versions_of(name) if version is None else (self.resolve(name, version),)
            in_use = sorted(alias for found in deleted for alias in found.aliases)
            if in_use and not force:
                what = name if version is None else f"version {deleted[0].version} of {name}"
                otherwise = "Move them to another version first, or give force=True"
                raise Conflict(f"aliases point at {what}: {', '.join(in_use)}. {otherwise}")
            numbers = {found.version for found in deleted}
            left = [found for found in versions_in(folder) if found not in numbers]
            aliases = {alias: target for alias, target in read_aliases(folder).items() if target not in numbers}
            write_json(folder / ALIASES, {**aliases, LATEST: aliases.get(LATEST, left[-1])} if left else {})
            for found in deleted:
                gone = folder / f"{_LEAVING}{found.version}"
                found.path.rename(gone)
                shutil.rmtree(gone)
                self.predictions_of(found).unlink(missing_ok=True)
                shutil.rmtree(self.monitoring_of(name, found.version), ignore_errors=True)
            for emptied in (folder / _PREDICTIONS, folder / _MONITORING):
                with contextlib.suppress(OSError):  # other versions have files there, or there never were any
                    emptied.rmdir()

    def set_abstention(self, name: str, version: str | None, precision: float | None) -> ModelVersion:
        """Switch abstention of a version on, with this precision of the predictions that are returned; None: switch it off.

        Raises:
            NotFound: there is no such model, version or alias.
            InvalidInput: the version's held-out images are too few for this precision.
        """
        found = self.resolve(name, version)
        with _locked(self.root / name):
            manifest = read_manifest(found.path)
            if precision is not None:
                calibration, unavailable = Calibration.of(manifest.calibration), task_named(manifest.task).why_no_prediction_sets
                CertaintyEstimator(manifest.classes, calibration, None, unavailable=unavailable).resolved(
                    CertaintyOptions(precision=precision)
                )
            abstain: dict[Literal["precision"], float] = {} if precision is None else {"precision": precision}
            written = (found.path / MANIFEST).stat()
            write_json(found.path / MANIFEST, dataclasses.replace(manifest, abstain=abstain).to_dict())
            # The time in seconds stays that of the registration; the microsecond makes servers load the manifest again.
            os.utime(found.path / MANIFEST, ns=(written.st_atime_ns, written.st_mtime_ns + 1000))
        return found

    def access(self, name: str) -> Access:
        """Return who may use a model; only administrators if the record is damaged."""
        if not re.fullmatch(SUFFIX_PATTERN, name):
            return Access()
        try:
            return ACCESS_ADAPTER.validate_json((self.root / name / _ACCESS).read_bytes())
        except FileNotFoundError:
            return Access()
        except ValidationError:
            return Access(owner=None, visibility="private")

    def owned_bytes(self, owner: str) -> int:
        """Return the disk space of an owner's models in bytes, without records of live predictions."""
        total = 0
        for name in self.names():
            for path in files_under(self.root / name) if self.access(name).owner == owner else ():
                if path.is_relative_to(self.root / name / _MONITORING):
                    continue
                with contextlib.suppress(FileNotFoundError):  # it has been deleted meanwhile
                    total += path.lstat().st_size
        return total

    def set_access(self, name: str, access: Access) -> None:
        """Record who may use a model, which need not have a version yet."""
        with _locked(self.root / name):
            write_json(self.root / name / _ACCESS, dataclasses.asdict(access))

    def reserve(self, name: str, access: Access) -> None:
        """Record the owner of a model before the job that makes it begins, unless the model exists already."""
        folder = self.root / name
        with _locked(folder):
            if not versions_in(folder):
                write_json(folder / _ACCESS, dataclasses.asdict(access))

    def _versions_of(self, name: str) -> tuple[ModelVersion, ...]:
        """Return all versions of a model in the order of registration, from a consistent reading of its folder."""
        if not re.fullmatch(SUFFIX_PATTERN, name):  # the path could be outside the folder
            return ()
        folder = self.root / name
        while True:  # until nothing changed meanwhile, because a version could be missed while another one replaces it
            aliases, versions = read_aliases(folder), versions_in(folder)
            described = []
            for version in versions:
                with contextlib.suppress(FileNotFoundError):  # deleted since the folder was listed, or not a bundle
                    described.append(self._describe(name, version, aliases))
            if (read_aliases(folder), versions_in(folder)) == (aliases, versions):
                return tuple(described)

    def _describe(self, name: str, version: str, aliases: dict[str, str]) -> ModelVersion:
        path = self.root / name / version
        created_at = (path / MANIFEST).stat().st_mtime
        return ModelVersion(
            name, version, path, tuple(sorted(key for key, target in aliases.items() if target == version)), created_at
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the writers of a model, over threads and processes, and remove the leftovers of a killed writer."""
    with file_lock(folder / ".lock"):
        for leftover in (*folder.glob(f"{_ARRIVING}*"), *folder.glob(f"{_LEAVING}*")):
            shutil.rmtree(leftover)
        yield


def _keep_predictions(predictions: Path | None, target: Path) -> None:
    """Copy a table of predictions to `target`; without one, delete a table that a killed registration has left there."""
    if predictions is None:
        target.unlink(missing_ok=True)
        return
    target.parent.mkdir(exist_ok=True)
    with atomic_path(target) as temporary:
        shutil.copyfile(predictions, temporary)


def _copy_bundle(bundle: Path, target: Path, manifest: Manifest) -> None:
    """Copy the files in the manifest, verify their checksums, and write the manifest last.

    Raises:
        BundleError: a file is missing or was changed.
    """
    target.mkdir()
    for name, expected in manifest.files.items():
        try:
            with atomic_path(target / name) as temporary:
                shutil.copyfile(bundle / name, temporary)
        except FileNotFoundError:
            raise BundleError(f"{bundle}: {name} is missing. Copy or export the bundle again") from None
        if sha256_file(target / name) != expected:
            raise BundleError(
                f"{bundle}: {name} is not what {MANIFEST} says: it was changed or cut short. Export the bundle again"
            )
    write_json(target / MANIFEST, manifest.to_dict())
