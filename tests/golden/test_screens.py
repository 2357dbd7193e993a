"""What people see: the help of every command, lists, models, and what is said when something is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from PIL import Image
from screens import FOLDER, Compare, Run
from tiny_bundle import write_tiny_bundle

from finetune.bundle.registry import Registry
from finetune.cli import cli


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    """The words of every command and group below this one."""
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


COMMANDS = list(commands(cli))


@pytest.mark.parametrize("command", [(), *COMMANDS], ids=lambda words: "-".join(words) or "finetune")
def test_help(screen: Run, golden: Compare, command: tuple[str, ...]) -> None:
    shown = screen(*command, "--help")
    assert not [line for line in shown.lines() if line.endswith("...") and not line.startswith("Usage: ")], (
        "the first sentence of a help text fits into a list"
    )
    golden(shown, "-".join(("help", *command)))


def test_every_help_has_its_file_and_no_file_is_left_of_a_command_that_is_gone() -> None:
    assert len(COMMANDS) > 15
    expected = {"-".join(("help", *command)) for command in [(), *COMMANDS]}
    assert {path.stem for path in FOLDER.glob("help*.txt")} == expected


# ── backbones ─────────────────────────────────────────────────────────────────────────────────────


def test_backbones_by_pattern(screen: Run, golden: Compare) -> None:
    golden(screen("backbones", "test_*", "--limit", "5"), "backbones-pattern")


def test_one_backbone(screen: Run, golden: Compare) -> None:
    golden(screen("backbones", "test_resnet"), "backbones-one")


def test_a_backbone_that_is_not_there(screen: Run, golden: Compare) -> None:
    golden(screen("backbones", "resnet51"), "backbones-unknown", wide=True)


# ── models ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def two_versions(screen: Run) -> Run:
    registry = Registry(Path(".finetune").absolute() / "models")
    write_tiny_bundle(Path("bundle"))
    for _ in range(2):
        registry.register(Path("bundle"), "trees")
    return screen


def test_no_models(screen: Run, golden: Compare) -> None:
    golden(screen("models", "list"), "models-none")


def test_two_versions_of_a_model(two_versions: Run, golden: Compare) -> None:
    golden(two_versions("models", "list"), "models-list")


def test_one_model(two_versions: Run, golden: Compare) -> None:
    golden(two_versions("models", "show", "trees@2"), "models-show")


def test_promoting_and_rolling_back(two_versions: Run, golden: Compare) -> None:
    golden(two_versions("models", "promote", "trees", "2"), "models-promote")
    golden(two_versions("models", "rollback", "trees"), "models-rollback")


def test_a_model_that_is_not_there(two_versions: Run, golden: Compare) -> None:
    golden(two_versions("models", "show", "tree"), "models-unknown", wide=True)


def test_predicting(two_versions: Run, golden: Compare) -> None:
    Image.new("RGB", (40, 30), (30, 120, 60)).save("leaf.png")
    golden(two_versions("predict", "leaf.png", "nothing.png", "--model", "trees", "--top-k", "2"), "predict")


# ── errors ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("unknown-command", ["trian"]),
        ("unknown-option", ["train", "--date", "photos"]),
        ("several-wrong-fields", ["train", "--data", "photos", "--set", "metod.type=full", "--epochs", "-1"]),
        ("no-data", ["train"]),
        ("no-such-folder", ["train", "--data", "photos", "--model", "test_resnet", "--set", "model.weights=none"]),
        ("nothing-to-predict-with", ["predict", "x.jpg"]),
    ],
)  # fmt: skip
def test_an_error(screen: Run, golden: Compare, name: str, arguments: list[str]) -> None:
    golden(screen(*arguments), f"error-{name}", wide=True)
