#!/usr/bin/env python3
"""Build bentos and the serving image's contents, each installed in an environment of its own without torch, and ask them.

Images cannot be built everywhere, so the steps of docker/serve.Dockerfile are carried out here as they stand there: its COPY and
RUN lines in a clean folder, its entry point as a user without rights, its health check. Run it with a Python that has the core
dependencies and `uv`, from anywhere.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from processes import free_port, run, serving

REPOSITORY = Path(__file__).resolve().parents[1]
UNPRIVILEGED = 10001  # the user id in docker/serve.Dockerfile
REGISTER = (
    "import sys; from pathlib import Path; from finetune.bundle.registry import Registry; "
    "Registry(Path(sys.argv[1])).register(Path(sys.argv[2]), 'trees')"
)
NO_TRAINING = "import importlib.util as u; print([n for n in ('torch', 'timm', 'mlflow', 'onnx', 'cv2') if u.find_spec(n)])"


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="finetune-bento-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        home = folder / "home"
        bundle, image = make_bundle(folder / "material")
        home_with(bundle, home)
        store = {"BENTOML_HOME": str(folder / "bentoml"), "FINETUNE_HOME": str(home)}
        tag = finetune("build", "trees@champion", environment=store).strip().splitlines()[-1]
        step(began, f"finetune build made {tag}")
        plain = build_in_a_checkout(folder / "checkout", home, store)
        step(began, f"bentoml build made {plain}")
        python = environment_of(path_of(tag, store), folder / "environment")
        step(began, "installed what the bento asks for")
        expected = json.loads(finetune("predict", str(image), "--json", environment=store))[0]
        for one in (tag, plain):
            with serving_as([str(python), "-m", "bentoml", "serve", str(path_of(one, store))], folder / "served") as url:
                check_answer(url, image, expected)
            step(began, f"{one} answers as the model does")
        check_image(folder / "image", image, bundle, expected)
        user = "as its own user" if rights(unprivileged=True) else "as this user"
        step(began, f"the serving image's steps work {user}, with a key")
    print("bento: all checks passed", flush=True)


def step(began: float, what: str) -> None:
    print(f"bento: {time.monotonic() - began:5.0f} s  {what}", flush=True)


def make_bundle(folder: Path) -> tuple[Path, Path]:
    """Write a small true bundle and an image, with the checkout's test helpers."""
    script = (
        "import sys; from pathlib import Path; from PIL import Image; from tiny_bundle import write_tiny_bundle; "
        "folder = Path(sys.argv[1]); folder.mkdir(); write_tiny_bundle(folder / 'bundle'); "
        "Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert('RGB').save(folder / 'image.png')"
    )
    run([sys.executable, "-c", script, str(folder)], environment={"PYTHONPATH": f"{REPOSITORY / 'tests'}:{REPOSITORY}"})
    return folder / "bundle", folder / "image.png"


def home_with(bundle: Path, home: Path) -> None:
    """Make a workspace with two versions of a model, of which the first is promoted."""
    script = (
        "import sys; from pathlib import Path; from finetune.bundle.registry import Registry; "
        "registry = Registry(Path(sys.argv[2]) / 'models'); [registry.register(Path(sys.argv[1]), 'trees') for _ in range(2)]"
    )
    run([sys.executable, "-c", script, str(bundle), str(home)], environment={"PYTHONPATH": str(REPOSITORY)})


PROGRAMS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # uv among them


def finetune(*arguments: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "finetune", *arguments]
    return run(command, environment={**environment, "PYTHONPATH": str(REPOSITORY), "PATH": PROGRAMS})


def build_in_a_checkout(checkout: Path, home: Path, store: dict[str, str]) -> str:
    """Run plain `bentoml build` where a user would: in a checkout whose workspace has models."""
    checkout.mkdir()
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY).splitlines()
    for name in listed:
        source = REPOSITORY / name
        if source.is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, checkout / name)
    shutil.copytree(home / "models", checkout / ".finetune" / "models")
    environment = {**store, "FINETUNE_HOME": str(checkout / ".finetune"), "PATH": PROGRAMS}
    said = run([sys.executable, "-m", "bentoml", "build", "--output", "tag"], cwd=checkout, environment=environment)
    found = re.search(r"__tag__:(\S+)", said)
    assert found is not None, said
    return found[1]


def path_of(tag: str, store: dict[str, str]) -> Path:
    name, _, version = tag.partition(":")
    return Path(store["BENTOML_HOME"]) / "bentos" / name / version


def environment_of(bento: Path, folder: Path) -> Path:
    """Install what a bento asks for, and nothing else."""
    requirements = bento / "env" / "python" / "requirements.txt"
    run([sys.executable, "-m", "venv", str(folder)])
    python = folder / "bin" / "python"
    run([str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--requirement", str(requirements)])
    assert run([str(python), "-c", NO_TRAINING]).strip() == "[]", "something that trains was installed"
    return python


def check_image(folder: Path, image: Path, bundle: Path, expected: dict) -> None:
    """Carry out docker/serve.Dockerfile in `folder` instead of an image, and use the result as compose.yaml does."""
    dockerfile = (REPOSITORY / "docker" / "serve.Dockerfile").read_text().replace("\\\n", " ")
    source, installed, data = folder / "src", folder / "opt", folder / "data"
    source.mkdir(parents=True)
    instructions = [line.split(None, 1) for line in dockerfile.splitlines() if line and not line.startswith("#")]
    build = instructions[: [number for number, (word, _) in enumerate(instructions) if word == "FROM"][1]]
    for word, rest in build:
        if word == "COPY":
            *names, target = rest.split()
            for name in names:
                copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy2
                copy(REPOSITORY / name, source / (target if (REPOSITORY / name).is_dir() else name))
        elif word == "RUN":
            run(
                [
                    "sh",
                    "-ec",
                    rest.replace("/opt/finetune", str(installed)).replace("python -m venv", f"{sys.executable} -m venv"),
                ],
                cwd=source,
            )
    data.mkdir()
    if rights(unprivileged=True):
        os.chown(data, UNPRIVILEGED, UNPRIVILEGED)
    python = str(installed / "bin" / "python")
    assert run([python, "-c", NO_TRAINING]).strip() == "[]", "something that trains is in the serving image"
    environment = {"PATH": f"{installed / 'bin'}:/usr/bin:/bin", "FINETUNE_HOME": str(data), "HOME": "/tmp"}
    as_user: dict = {"environment": environment, "rights": rights(unprivileged=True), "cwd": data}
    key = run(["finetune", "keys", "create", "admin", "--scope", "admin"], **as_user).strip()
    run([python, "-c", REGISTER, str(data / "models"), str(bundle)], **as_user)
    entry = json.loads(next(rest for word, rest in instructions if word == "ENTRYPOINT"))
    command = json.loads(next(rest for word, rest in instructions if word == "CMD"))
    health = json.loads(re.search(r"HEALTHCHECK.*?CMD (\[.*\])", dockerfile)[1])
    with serving_as([*entry, *command], data, environment=environment, unprivileged=True) as url:
        run([word.replace("http://127.0.0.1:3000", url) for word in health], **as_user)
        check_answer(url, image, expected, key=key)
        assert status_without_key(url, image) == 401, "a server on a network address answered without a key"
        check_batch(url, image, folder / "batch", expected, key)


def status_without_key(url: str, image: Path) -> int:
    try:
        ask(url, image)
    except urllib.error.HTTPError as refused:
        return refused.code
    return 200


def check_answer(url: str, image: Path, expected: dict, key: str | None = None) -> None:
    answer = ask(url, image, key)
    assert (answer["model"], answer["version"]) == ("trees", "1"), answer
    assert [row["label"] for row in answer["predictions"]] == [row["label"] for row in expected["predictions"]], (
        answer,
        expected,
    )


def check_batch(url: str, image: Path, folder: Path, expected: dict, key: str) -> None:
    """Have the worker beside the server, which cannot train either, answer a folder."""
    (folder / "pictures").mkdir(parents=True)
    shutil.copy2(image, folder / "pictures")
    answers = folder / "answers.csv"
    asked = ["predict", str(folder / "pictures"), "--server", url, "--model", "trees@1", "--out", str(answers)]
    finetune(*asked, environment={"FINETUNE_API_KEY": key})
    with open(answers, newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert expected["predictions"][0]["label"] in row.values(), (row, expected)


def ask(url: str, image: Path, key: str | None = None) -> dict:
    headers = {"Content-Type": "image/png", **({"Authorization": f"Bearer {key}"} if key else {})}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/predict", image.read_bytes(), headers), timeout=30) as response:
        return json.load(response)


@contextlib.contextmanager
def serving_as(
    command: list[str], cwd: Path, environment: dict[str, str] | None = None, *, unprivileged: bool = False
) -> Iterator[str]:
    """Run a server, whose command may name port 3000, on a free port of this machine until the block ends; yield its address."""
    cwd.mkdir(exist_ok=True)
    port = free_port()
    words = [word if word != "3000" else str(port) for word in command]
    words += [] if "--port" in words else ["--port", str(port), "--host", "127.0.0.1"]
    with serving(words, port, cwd, {"FINETUNE_HOME": str(cwd), **(environment or {})}, rights(unprivileged=unprivileged)) as url:
        yield url


def rights(*, unprivileged: bool) -> dict:
    """Return what starts a process as the image's user, where this process may choose and that user can read this Python."""
    python = Path(sys.base_prefix).resolve()
    readable = all(folder.stat().st_mode & 0o005 == 0o005 for folder in (python, *python.parents))
    if not unprivileged or os.geteuid() != 0 or not readable:
        return {}
    return {"user": UNPRIVILEGED, "group": UNPRIVILEGED, "extra_groups": []}


if __name__ == "__main__":
    main()
