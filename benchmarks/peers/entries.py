"""What is compared: each entry is one or more commands, run one after another in fresh processes, and what has to be there first.

Ours is the command line as a user types it, tracked in MLflow; `finetune predict` then writes the probabilities that all others
are asked for too. The peers are the scripts beside this file.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
PEERS_PYTHON = HERE / ".venv" / "bin" / "python"
OURS = (sys.executable, "-m", "finetune")


@dataclass(frozen=True)
class Data:
    """Class folders inside one folder: what is learned from, and what is judged on."""

    train: Path
    val: Path
    classes: tuple[str, ...]
    train_files: tuple[str, ...]  # relative to `train`, as `val_files` are to `val`
    val_files: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """What one run of an entry may use."""

    data: Data
    weights: Path
    threads: int
    repeat: int
    out: Path  # empty
    homes: Path  # where workspaces live that outlast a run


@dataclass(frozen=True)
class Command:
    """One process: its standard output goes to ``<name>.out`` in the run's folder."""

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str
    what: str
    commands: Callable[[Setting], list[Command]]
    before: Callable[[Setting], list[Command]] = lambda _: []  # not timed
    scored: bool = True
    of_peer: bool = False  # runs in the peers' environment


def all_entries() -> dict[str, Entry]:
    """In the order of the table. A warm run comes right after the cold one that fills its cache."""
    entries = (
        Entry("floor", "every image decoded once, and one forward pass", _floor, scored=False),
        Entry("ours-probe-cold", "finetune train --method linear_probe, nothing cached", _ours_cold("linear_probe")),
        Entry("ours-probe-warm", "the same with another seed, features cached", _ours_warm, before=_fill_cache),
        Entry("ours-probe-steps", "ours-probe-cold under a stopwatch", _ours_steps, scored=False),
        Entry("ours-folds", "finetune train --folds 5, nothing cached", _ours_folds, scored=False),
        Entry("ours-partial", "finetune train --method partial, nothing cached", _ours_cold("partial")),
        Entry("ours-full", "finetune train --method full, nothing cached", _ours_cold("full")),
        Entry("ours-auto", "finetune train --method auto, nothing cached", _ours_cold("auto")),
        _peer("sklearn", "scikit-learn LogisticRegression on eager timm features", "sklearn_features.py"),
        _peer("sklearn-tuned", "the same, C of six chosen on validation", "sklearn_features.py", "--tune"),
        _peer("plain-loop", "PyTorch as the Keras guide: 2 epochs head, 1 epoch all", "plain_loop.py"),
        _peer("fastai-frozen", "fastai vision_learner, 3 frozen epochs", "fastai_learner.py", "--recipe", "frozen"),
        _peer("fastai-finetune", "fastai vision_learner, fine_tune(3)", "fastai_learner.py", "--recipe", "fine_tune"),
    )
    return {entry.name: entry for entry in entries}


def _peer(name: str, what: str, script: str, *options: str) -> Entry:
    def commands(setting: Setting) -> list[Command]:
        given = {
            "train": setting.data.train,
            "val": setting.data.val,
            "weights": setting.weights,
            "out": setting.out,
            "seed": setting.repeat,
            "threads": setting.threads,
        }
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        return [Command("run", (str(PEERS_PYTHON), str(HERE / script), *options, *words))]

    return Entry(name, what, commands, of_peer=True)


def _train(setting: Setting, home: Path, seed: int, *options: str) -> Command:
    given = ("--data", str(setting.data.train), "--validation", str(setting.data.val), "--seed", str(seed), "--name", "peer")
    return Command("train", (*OURS, "train", *given, *options, "--json"), {"FINETUNE_HOME": str(home)})


def _train_and_predict(setting: Setting, home: Path, seed: int, *options: str) -> list[Command]:
    files = [str(setting.data.val / name) for name in setting.data.val_files]
    options = (*options, "--set", "hyperparameters.refit=false")  # the files that judge are never trained on
    predict = (*OURS, "predict", *files, "--model", "peer", "--top-k", str(len(setting.data.classes)), "--json")
    return [_train(setting, home, seed, *options), Command("predict", predict, {"FINETUNE_HOME": str(home)})]


def _ours_cold(method: str) -> Callable[[Setting], list[Command]]:
    return lambda setting: _train_and_predict(setting, setting.out / "home", setting.repeat, "--method", method)


def _warm_home(setting: Setting) -> Path:
    return setting.homes / "warm"


def _fill_cache(setting: Setting) -> list[Command]:
    return [_train(setting, _warm_home(setting), 0, "--method", "linear_probe")]


def _ours_warm(setting: Setting) -> list[Command]:
    return _train_and_predict(setting, _warm_home(setting), setting.repeat + 1, "--method", "linear_probe")


def _ours_folds(setting: Setting) -> list[Command]:
    return [_train(setting, setting.out / "home", setting.repeat, "--method", "linear_probe", "--folds", "5")]


def _ours_steps(setting: Setting) -> list[Command]:
    plain = _train(setting, setting.out / "home", setting.repeat, "--method", "linear_probe")
    stopwatch = (sys.executable, str(HERE / "ours_steps.py"), str(setting.out / "steps.json"))
    return [Command("train", (*stopwatch, *plain.arguments[len(OURS) :]), plain.environment)]


def _floor(setting: Setting) -> list[Command]:
    folders = (str(setting.data.train), str(setting.data.val))
    given = ("--threads", str(setting.threads), "--out", str(setting.out / "steps.json"))
    return [Command("run", (sys.executable, str(HERE / "floor.py"), *folders, *given))]


def probabilities_of(out: Path, data: Data) -> tuple[Sequence[str], Sequence[str], np.ndarray]:
    """Files (relative to the validation folder), classes, and (N, C) probabilities that a run has handed in."""
    if (handed_in := out / "probabilities.npz").exists():
        with np.load(handed_in) as arrays:
            return arrays["files"].tolist(), arrays["classes"].tolist(), arrays["probs"]
    answers = json.loads((out / "predict.out").read_text())
    files = [Path(answer["file"]).relative_to(data.val).as_posix() for answer in answers]
    rows = [{row["label"]: row["probability"] for row in answer["predictions"]} for answer in answers]
    return files, data.classes, np.array([[row[name] for name in data.classes] for row in rows])


def images_per_second(out: Path, entry: str) -> dict[str, float]:
    """How fast a run trained, by what trained; empty where it took no steps."""
    if (handed_in := out / "images_per_second.json").exists():
        speeds: dict[str, float] = json.loads(handed_in.read_text())
        return speeds
    lines = [line for journal in out.glob("home/runs/*/metrics.jsonl") for line in journal.read_text().splitlines()]
    values = [json.loads(line)["values"] for line in lines]
    epochs = [value["train/images_per_second"] for value in values if "train/images_per_second" in value]
    return {"all" if entry == "ours-full" else "what the method trains": statistics.median(epochs)} if epochs else {}
