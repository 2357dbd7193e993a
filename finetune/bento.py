"""Build a bento: a BentoML archive of the service with a model inside, without training libraries.

A bento contains the source of both packages, one registered version in ``models``, which is its default, and the exact versions
of the installed core dependencies. ``bentoml serve TAG`` and the image of ``bentoml containerize TAG`` serve that model. Plain
``bentoml build`` in a checkout does the same with all models of the workspace ``.finetune``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from finetune.bundle.aliases import CHAMPION
from finetune.bundle.deployment import Deployment, deploy
from finetune.bundle.manifest import MANIFEST, read_manifest
from finetune.bundle.registry import Registry
from finetune.distribution import DISTRIBUTION
from finetune.errors import InvalidInput

MODELS_IN_BENTO = (
    "models",
    ".finetune/models",
)  # where `finetune build` and `bentoml build` put models in a bento's source folder
_PACKAGES = ("finetune", "service")
_SERVICE = "service.app:Service"
_REQUIREMENTS = "requirements.txt"


def build_bento(registry: Registry, reference: str | None = None) -> str:
    """Build a bento with one registered version into BentoML's store; return its tag.

    Raises:
        NotFound: there is no such model or, without a reference, no default.
    """
    version = registry.default() if reference is None else registry.lookup(reference)
    manifest = read_manifest(version.path)
    with tempfile.TemporaryDirectory(prefix="finetune-bento-") as name:
        context = Path(name)
        for package in _PACKAGES:
            shutil.copytree(_source_of(package), context / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        packed = Registry(context / MODELS_IN_BENTO[0])
        folder = packed.root / version.name / version.version
        folder.mkdir(parents=True)
        for file in (*manifest.files, MANIFEST):
            shutil.copyfile(version.path / file, folder / file)
        packed.set_alias(version.name, CHAMPION, version.version, by="finetune build")
        deploy(packed, Deployment(version.name), by="finetune build")
        (context / _REQUIREMENTS).write_text("".join(f"{line}\n" for line in core_requirements()))
        labels = {"project": "finetune", "model": version.name, "model_version": version.version}
        return _built(context, version.name, labels)


def _built(context: Path, name: str, labels: dict[str, str]) -> str:
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    from bentoml.bentos import build_bentofile  # BentoML takes a second to import

    options = {
        "service": _SERVICE,
        "labels": labels,
        "include": ["**"],
        "python": {"requirements_txt": f"./{_REQUIREMENTS}", "lock_packages": False},
        "envs": [{"name": "BENTOML_DO_NOT_TRACK", "value": "True"}],
    }
    (context / "bentofile.yaml").write_text(yaml.safe_dump(options))
    built = build_bentofile(str(context / "bentofile.yaml"), name=name, build_ctx=str(context))
    return str(built.tag)


def models_in_bento(source: Path) -> Path | None:
    """Return the models folder of the bento that contains the code in `source`; None outside a bento."""
    if not (source.parent / "bento.yaml").is_file():
        return None
    return next((source / name for name in MODELS_IN_BENTO if (source / name).is_dir()), None)


def core_requirements() -> list[str]:
    """Return ``name==version`` of all installed packages that serving needs, sorted by name."""
    found = {name: importlib.metadata.version(name) for name in _needed_by(_core_dependencies())}
    return sorted(f"{name}=={version}" for name, version in found.items())


def _core_dependencies() -> list[str]:
    """Return the project's core requirements, from pyproject.toml in a checkout, else from the installed distribution."""
    project = _source_of("finetune").parent / "pyproject.toml"
    if project.is_file():
        dependencies: list[str] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
        return dependencies
    lines = importlib.metadata.requires(DISTRIBUTION) or []
    return [line for line in lines if "extra ==" not in line]


def _needed_by(requirements: list[str]) -> Iterator[str]:
    """Yield the names of the installed packages among all direct and indirect dependencies, each once."""
    waiting = [Requirement(line) for line in requirements]
    seen: set[tuple[str, ...]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if (name, *sorted(requirement.extras)) in seen:
            continue
        if all(known[0] != name for known in seen):
            yield name
        seen.add((name, *sorted(requirement.extras)))
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in requirement.extras or {""}):
                needed.marker = None
                waiting.append(needed)


def _source_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InvalidInput(f"the package {package} is not installed here, so it cannot be put into a bento")
    return Path(found.origin).parent
