"""What benchmarks and CI import from the packages exists: neither is type-checked or run by the tests."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for folder in ("benchmarks", ".ci") for path in (ROOT / folder).rglob("*.py") if ".venv" not in path.parts)


def imported(script: Path) -> Iterator[tuple[str, str]]:
    """Yield the modules and names that a script imports from the packages."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] in ("finetune", "service"):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_names_that_scripts_import_exist(script: Path) -> None:
    for module, name in imported(script):
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")  # a module of a package
