"""The models folder: ``<name>/<version>/`` holds a bundle, ``<name>/aliases.json`` says which version an alias means.

Readers need no lock: a version appears by one rename and an alias moves by another, so what can be seen is complete. Writers of
one name take turns. Knows files and checksums; runs no model. Torch-free.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.bundle.manifest import MANIFEST, Manifest, read_manifest
from finetune.errors import BundleError, Conflict, InvalidInput, NotFound, did_you_mean
from finetune.spec import SUFFIX_PATTERN
from finetune.storage.files import atomic_path, read_json, sha256_file, write_json
from finetune.storage.journal import append_line, read_lines

LATEST = "latest"  # moves to every new version
CHAMPION = "champion"  # moves only when somebody promotes; served instead of the latest where it is set

_ALIASES = "aliases.json"
_JOURNAL = "aliases.jsonl"  # every move of every alias, append-only: rollback reads it, and no version number is given twice
_ARRIVING, _LEAVING = ".arriving-", ".leaving-"
_ALIAS_PATTERN = r"^[a-z][a-z0-9._-]{0,62}$"


@dataclass(frozen=True)
class ModelVersion:
    """One registered bundle."""

    name: str
    version: str
    path: Path
    aliases: tuple[str, ...]
    created_at: float  # when it was registered, Unix seconds

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**dataclasses.asdict(self), "path": str(self.path), "aliases": list(self.aliases)}


@dataclass(frozen=True)
class Registry:
    """All models under `root`, usually ``models`` of the workspace; the folder need not exist yet."""

    root: Path

    def register(self, bundle: Path, name: str, *, once: bool = False) -> ModelVersion:
        """Copy a bundle in as the next version of `name` and point ``latest`` at it.

        With `once`, a bundle that is a version of `name` already stays that version: a job that died between registering and
        saying so registers again.

        Raises:
            InvalidInput: a name that cannot be one.
            BundleError: the bundle is incomplete or was changed; nothing is registered.
            DiskFull: no space for the copy; nothing is registered.
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
                    if int(known.version) > int(_aliases(folder).get(LATEST, "0")):  # it died before the alias moved
                        _move_alias(folder, LATEST, known.version)
                    return self.resolve(name, known.version)
            version = str(1 + max((int(version) for version in (*_versions(folder), *_recorded(folder))), default=0))
            arriving = folder / f"{_ARRIVING}{version}"
            _copy_bundle(bundle, arriving, dataclasses.replace(manifest, name=name, version=version))
            arriving.rename(folder / version)
            _move_alias(folder, LATEST, version)
        return self._describe(name, version, _aliases(folder))

    def list(self) -> tuple[ModelVersion, ...]:
        """Every version of every model, by name, then in the order of registration."""
        names = sorted(folder.name for folder in self.root.iterdir() if folder.is_dir()) if self.root.is_dir() else []
        return tuple(version for name in names for version in self._versions_of(name))

    def resolve(self, name: str, version_or_alias: str | None = None) -> ModelVersion:
        """The version that a number or an alias means; by default what is served: the champion if there is one, else the latest.

        Raises:
            NotFound: no such model, version or alias; the message names those that exist.
        """
        found = self._versions_of(name)
        if not found:
            names = sorted({version.name for version in self.list()})
            known = f"Registered are: {', '.join(names)}" if names else "None is registered: train one with finetune train"
            raise NotFound(f"no model {name!r}.{did_you_mean(name, names)} {known}")
        by_key = {key: version for version in found for key in (version.version, *version.aliases)}
        by_key.setdefault(LATEST, found[-1])  # a folder that was filled by hand needs no aliases.json
        key = version_or_alias or (CHAMPION if CHAMPION in by_key else LATEST)
        if key not in by_key:
            raise NotFound(
                f"model {name!r} has no version or alias {key!r}.{did_you_mean(key, list(by_key))} It has: {', '.join(by_key)}"
            )
        return by_key[key]

    def newest(self) -> ModelVersion:
        """What is served of the model that was registered last.

        Raises:
            NotFound: nothing is registered.
        """
        newest = max(self.list(), key=lambda version: (version.created_at, int(version.version)), default=None)
        if newest is None:
            raise NotFound(
                f"no model is registered in {self.root}: train one with finetune train, or see it all with finetune demo"
            )
        return self.resolve(newest.name)

    def locate(self, reference: str | None = None) -> Path:
        """The bundle folder that a person means: a path, ``name``, ``name@version``, ``name@alias``; None is the newest model.

        Raises:
            NotFound: no such folder, model, version or alias.
        """
        if reference is None:
            return self.newest().path
        folder = Path(reference)
        if (folder / MANIFEST).is_file():
            return folder
        if "/" in reference:
            raise NotFound(f"{reference}: no bundle there (a bundle is a folder with {MANIFEST} in it)")
        name, _, key = reference.partition("@")
        return self.resolve(name, key or None).path

    def set_alias(self, name: str, alias: str, version: str) -> ModelVersion:
        """Point an alias at a version (or at what another alias means) in one step that readers see whole or not at all."""
        if not re.fullmatch(_ALIAS_PATTERN, alias):
            raise InvalidInput(f"{alias!r} cannot be an alias: start with a letter a-z, as in 'champion'; numbers are versions")
        self.resolve(name, version)
        folder = self.root / name
        with _locked(folder):
            target = self.resolve(name, version).version
            _move_alias(folder, alias, target)
        return self._describe(name, target, _aliases(folder))

    def rollback(self, name: str, alias: str = CHAMPION) -> ModelVersion:
        """Point an alias back at the version that it named before; twice brings it forth again.

        Raises:
            NotFound: no such model or alias.
            Conflict: the alias never named another version that still exists.
        """
        current = self.resolve(name, alias).version
        folder = self.root / name
        moves = [line["version"] for line in read_lines(folder / _JOURNAL) if line["alias"] == alias]
        previous = next((version for version in reversed(moves) if version != current and (folder / version).is_dir()), None)
        if previous is None:
            raise Conflict(f"{name}@{alias} has only ever meant version {current}: there is nothing to go back to")
        return self.set_alias(name, alias, previous)

    def delete(self, name: str, version: str | None = None, *, force: bool = False) -> None:
        """Delete one version, or all of them; their numbers are not given again.

        Raises:
            NotFound: no such model or version.
            Conflict: an alias means it, and `force` is not given. With it, ``latest`` moves to the newest left and others go.
        """
        folder = self.root / name
        self.resolve(name, version)
        with _locked(folder):
            doomed = self._versions_of(name) if version is None else (self.resolve(name, version),)
            held = sorted(alias for found in doomed for alias in found.aliases)
            if held and not force:
                what = name if version is None else f"version {doomed[0].version} of {name}"
                raise Conflict(f"{what} is what {', '.join(held)} means. Move the alias to another version first, or force it")
            leaving = {found.version for found in doomed}
            left = [found for found in _versions(folder) if found not in leaving]
            aliases = {alias: target for alias, target in _aliases(folder).items() if target not in leaving}
            write_json(folder / _ALIASES, {**aliases, LATEST: aliases.get(LATEST, left[-1])} if left else {})
            for found in doomed:
                gone = folder / f"{_LEAVING}{found.version}"
                found.path.rename(gone)
                shutil.rmtree(gone)

    def _versions_of(self, name: str) -> tuple[ModelVersion, ...]:
        if not re.fullmatch(SUFFIX_PATTERN, name):  # could lead out of the folder
            return ()
        folder = self.root / name
        aliases = _aliases(folder)
        described = []
        for version in _versions(folder):
            with contextlib.suppress(FileNotFoundError):  # deleted since the folder was listed
                described.append(self._describe(name, version, aliases))
        return tuple(described)

    def _describe(self, name: str, version: str, aliases: dict[str, str]) -> ModelVersion:
        path = self.root / name / version
        created_at = (path / MANIFEST).stat().st_mtime
        return ModelVersion(
            name, version, path, tuple(sorted(key for key, target in aliases.items() if target == version)), created_at
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer of one model at a time, over threads and processes; a killed one lets go by dying, and is cleaned up after."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in (*folder.glob(f"{_ARRIVING}*"), *folder.glob(f"{_LEAVING}*")):
            shutil.rmtree(leftover)
        yield


def _versions(folder: Path) -> list[str]:
    """Version numbers in their order; everything else in the folder is not one."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted((name for name in names if re.fullmatch(r"[1-9][0-9]*", name)), key=int)


def _recorded(folder: Path) -> set[str]:
    """Versions that the journal knows, also those deleted since."""
    return {line["version"] for line in read_lines(folder / _JOURNAL)}


def _aliases(folder: Path) -> dict[str, str]:
    path = folder / _ALIASES
    return dict(read_json(path)) if path.exists() else {}


def _move_alias(folder: Path, alias: str, version: str) -> None:
    write_json(folder / _ALIASES, {**_aliases(folder), alias: version})
    append_line(folder / _JOURNAL, {"alias": alias, "version": version})


def _copy_bundle(bundle: Path, target: Path, manifest: Manifest) -> None:
    """Copy what the manifest lists, checking that it is what the manifest says, and write the manifest last."""
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
