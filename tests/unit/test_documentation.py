"""What the documentation tells people to type exists: commands, options, make targets, routes, variables; Python compiles."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from PIL import Image
from serving import in_process

from finetune.cli import cli
from finetune.spec import load_spec

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "docs/*.md", "benchmarks/README.md")
TEXTS = {str(path.relative_to(REPOSITORY)): path.read_text() for pattern in DOCUMENTS for path in REPOSITORY.glob(pattern)}


def blocks(language: str, texts: dict[str, str] = TEXTS) -> list[str]:
    found = [block for text in texts.values() for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)]
    assert found
    return found


def shell_lines() -> Iterator[str]:
    """Every command of a shell block, without its comment, and every command in running text."""
    for block in blocks("sh"):
        yield from (re.sub(r"\s+#.*", "", line) for line in block.splitlines() if line and not line.startswith("#"))
    for text in TEXTS.values():
        yield from (re.sub(r"\s+", " ", code) for code in re.findall(r"(?<!`)`((?:finetune|make) [^`]+)`(?!`)", text))


def commands_of(program: str) -> list[list[str]]:
    lines = sorted({line for line in shell_lines() if line.startswith(f"{program} ")})
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize("arguments", commands_of("finetune"), ids=" ".join)
def test_a_command_of_the_documentation_can_be_given_like_that(arguments: list[str]) -> None:
    command, context, rest = cli, click.Context(cli, **cli.context_settings), list(arguments)
    while isinstance(command, click.Group) and rest:
        name, found, rest = command.resolve_command(context, rest)  # raises where there is no such command
        assert found is not None
        command, context = found, click.Context(found, parent=context, info_name=name)
    if rest or not named_in_passing(arguments):
        context = command.make_context(context.info_name, rest, parent=context.parent)
    if settings := context.params.get("settings"):
        load_spec(None, {"training_file": "photos"}, settings)


def named_in_passing(arguments: list[str]) -> bool:
    """Text may say `finetune train` and mean the command as such, without what it requires."""
    return len(arguments) <= 2 and not any(word.startswith("-") for word in arguments)


@pytest.mark.parametrize("target", sorted({words[0] for words in commands_of("make")}))
def test_a_make_target_of_the_documentation_is_there(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:.*## ", (REPOSITORY / "Makefile").read_text(), re.M)


def test_curl_asks_routes_that_exist_with_bodies_that_are_json(tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False) as client:
        routes = client.get("/docs.json").json()["paths"]
    checked = 0
    for words in commands_of("curl"):
        url = next(word for word in words if word.startswith("http://"))
        if url.endswith("/invocations"):  # MLflow's server
            continue
        path = re.sub(r"^http://[^/]+|\?.*$", "", url)
        templates = [route for route in routes if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", route), path)]
        assert templates, f"curl {shlex.join(words)}: no such route"
        sends = any(word in ("-F", "--data-binary", "--json") for word in words)
        method = words[words.index("-X") + 1].lower() if "-X" in words else "post" if sends else "get"
        assert any(method in routes[template] for template in templates)
        if "--json" in words:
            json.loads(words[words.index("--json") + 1])
        checked += 1
    assert checked >= 5


def test_variables_of_the_documentation_are_read_somewhere() -> None:
    source = "".join(path.read_text() for folder in ("finetune", "service") for path in (REPOSITORY / folder).rglob("*.py"))
    named = {name for text in TEXTS.values() for name in re.findall(r"\bFINETUNE_[A-Z_]+\b", text)} - {"FINETUNE_TEST_PHOTOS"}
    assert len(named) >= 5
    assert {name for name in named if f'"{name}"' not in source} == set()


def test_python_of_the_documentation_compiles() -> None:
    for block in blocks("python"):
        compile(block, "documentation", "exec")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_commands_of_the_readme_work_one_after_the_other(tmp_path: Path) -> None:
    text = (REPOSITORY / "README.md").read_text().partition("## Your own photographs")[2]
    lines = blocks("sh", {"README.md": text})[0].splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    servers = {"mlflow", "serve"}
    ran = [words for words in commands if words[1] not in servers]
    assert len(ran) >= 4
    for number in range(45):
        folder = tmp_path / "photos" / ("cat", "dog", "owl")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        left = (number % 3) * 60
        picture = Image.effect_noise((128, 128), 60).convert("RGB")
        picture.paste((200, left + 60, 40), (left % 64, left % 48, left % 64 + 50, left % 48 + 50))
        picture.save(folder / f"{number}.jpg")
    picture.save(tmp_path / "some.jpg")
    shutil.copytree(tmp_path / "photos", tmp_path / "other")
    (tmp_path / "unsorted").mkdir()
    for number in range(12):
        Image.effect_noise((96, 128), 30 + 5 * number).convert("RGB").save(tmp_path / "unsorted" / f"{number}.jpg")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FINETUNE_", "MLFLOW_TRACKING"))}
    for words in ran:
        assert words[0] == "finetune"
        words = [_found(tmp_path, word) for word in words]
        ended = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stdout}\n{ended.stderr}"
    assert list((tmp_path / "maps").glob("*.png"))


def _found(folder: Path, word: str) -> str:
    """Return what a path that the text cuts short (``photos-full-…``) is there."""
    return str(next(folder.glob(word.replace("…", "*")))) if "…" in word else word


def test_the_page_about_http_lists_every_route_and_no_other(tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False) as client:
        paths = client.get("/docs.json").json()["paths"]
    listed = re.findall(r"^\| `([A-Z]+) (/[^`]*)` \| \S", TEXTS["docs/http.md"], re.M)
    assert len(listed) == len(set(listed)) > 90
    assert set(listed) == {(method.upper(), path) for path, item in paths.items() for method in item}
