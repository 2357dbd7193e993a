"""The commands of a person at a shell, on a real (tiny) job from a folder of pictures to a served answer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tiny_bundle import write_tiny_bundle

from finetune.bundle.registry import Registry
from finetune.cli import cli, main
from finetune.distribution import install_command
from finetune.errors import InvalidInput, SpecError
from finetune.evaluation.evaluate import evaluate
from finetune.evaluation.predictions import read
from finetune.storage.files import read_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir

CLASSES = ("blue", "green", "red")
TINY = ["--model", "test_efficientnet", "--set", "model.weights=none", "--set", "model.input_size_px=64"]


def write_pictures(folder: Path, per_class: int) -> Path:
    """Class folders of coloured noise that a solved head on random features can tell apart."""
    for label, name in enumerate(CLASSES):
        for number in range(per_class):
            generator = np.random.default_rng([label, number])
            pixels = generator.integers(0, 100, (72, 80, 3), dtype=np.uint8)
            pixels[:, :, 2 - label] += 120
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    return folder


def run(*arguments: str) -> Any:
    """The command's JSON document; an error of the command is raised here."""
    result = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False, standalone_mode=False)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "colours", 14)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The outcome of one linear probe, and the workspace that it is in."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_HOME", str(home))
        outcome = run("train", "--data", str(pictures), *TINY)
    return outcome, home


@pytest.fixture
def home(trained: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_HOME", str(trained[1]))
    return Path(trained[1])


def test_a_job_leaves_a_registered_model_and_everything_a_run_folder_promises(trained: Any):
    outcome, home = trained
    folder = RunDir(Path(outcome["run"]))
    for path in (folder.spec, folder.resolved, folder.split, folder.evaluation, folder.report, folder.outcome, folder.bundle):
        assert path.exists(), path
    assert (outcome["model"], outcome["version"]) == ("colours", "1")
    assert Path(outcome["bundle"]) == home / "models" / "colours" / "1"
    assert outcome["metrics"]["test/top1"] > 0.6
    assert outcome["cost"]["trainable_parameters"] < outcome["cost"]["total_parameters"]
    assert not any(key.startswith("cost/") for key in outcome["metrics"])
    assert {path.name for path in folder.predictions.iterdir()} == {"val.npz", "test.npz"}
    resolved = read_json(folder.resolved)
    assert resolved["sources"]["hyperparameters.l2"] == "chosen by validation"
    frozen = read_json(folder.bundle / "bundle.json")["frozen"]
    assert frozen["digest_before"] == frozen["digest_after"]
    assert "stem" in frozen["stages"]
    assert [line["kind"] for line in read_lines(folder.events)][-1] == "succeeded"


def test_the_same_request_again_is_a_new_run_and_a_new_version(trained: Any, pictures: Path, home: Path):
    again = run("train", "--data", str(pictures), *TINY)
    assert again["run"] != trained[0]["run"]
    assert again["version"] == "2"
    assert again["metrics"] == trained[0]["metrics"], "the same request gives the same model"


@pytest.mark.usefixtures("unmeasured_machine")
def test_check_shows_the_plan_and_trains_nothing(pictures: Path, home: Path):
    runs = sorted((home / "runs").iterdir())
    plan = run("check", "--data", str(pictures), "--method", "partial", *TINY)
    counts = plan["dataset"]["counts"]
    assert {sum(counts[split][name] for split in ("train", "val", "test")) for name in CLASSES} == {14}
    assert all(counts[split][name] for split in ("train", "val", "test") for name in CLASSES)
    assert [stage["trains"] for stage in plan["backbone"]["stages"]].count(True) == 1
    assert plan["backbone"]["stages"][-1]["trains"]
    assert sorted((home / "runs").iterdir()) == runs


def images_of(run_folder: str, split: str) -> list[list[str]]:
    """The rows of the split's file that are in this split."""
    rows = [line.split(",") for line in Path(run_folder, "split.csv").read_text().splitlines()[1:]]
    return [row for row in rows if row[2] == split]


def copy_split(run_folder: str, pictures: Path, splits: Iterable[str], target: Path) -> Path:
    """Class folders with the images that a run had in these splits."""
    for line in Path(run_folder, "split.csv").read_text().splitlines()[1:]:
        path, label, split, *_ = line.split(",")
        if split in splits:
            (target / label).mkdir(parents=True, exist_ok=True)
            (target / label / Path(path).name).write_bytes((pictures / path).read_bytes())
    return target


def test_evaluate_repeats_what_the_run_found(trained: Any, pictures: Path, home: Path, tmp_path: Path):
    outcome = trained[0]
    found = run("evaluate", "colours", "--data", str(copy_split(outcome["run"], pictures, ["test"], tmp_path / "test")))
    assert found["model"] == "colours@1", "the version that the name stood for"
    assert found["values"]["top1"] == outcome["metrics"]["test/top1"]
    assert found["values"]["loss"] == pytest.approx(outcome["metrics"]["test/loss"], rel=1e-5)
    assert found["n"] == outcome["metrics"]["test/n"] > 3
    assert (found["n_trained_on"], found["n_chosen_on"], found["unseen"]) == (0, 0, None)


def test_evaluate_says_how_many_images_the_model_was_trained_on_and_gives_the_figure_without_them(
    trained: Any, pictures: Path, home: Path, tmp_path: Path
):
    outcome = trained[0]
    mixed = copy_split(outcome["run"], pictures, ["train", "val", "test"], tmp_path / "mixed")
    found = run("evaluate", "colours@1", "--data", str(mixed))
    n_train, n_val, n_test = (len(images_of(outcome["run"], split)) for split in ("train", "val", "test"))
    assert (found["n"], found["n_trained_on"], found["n_chosen_on"]) == (42, n_train, n_val)
    assert found["unseen"]["n"] == n_test > 0
    assert found["unseen"]["values"]["top1"] == outcome["metrics"]["test/top1"]
    assert found["unseen"]["values"]["loss"] == pytest.approx(outcome["metrics"]["test/loss"], rel=1e-5)
    seen = run("evaluate", "colours@1", "--data", str(copy_split(outcome["run"], pictures, ["train"], tmp_path / "train")))
    assert (seen["n"], seen["n_trained_on"], seen["n_chosen_on"], seen["unseen"]) == (n_train, n_train, 0, None)
    (mixed / "red" / "copy.png").write_bytes(next((tmp_path / "train" / "red").iterdir()).read_bytes())
    again = run("evaluate", "colours@1", "--data", str(mixed))
    assert again["n_trained_on"] == n_train + 1, "known by its bytes, whatever it is called"


def test_evaluate_takes_a_single_class_and_one_image_a_class(trained: Any, pictures: Path, home: Path, tmp_path: Path):
    one_each, only_red = write_pictures(tmp_path / "one", 1), tmp_path / "red"
    (only_red / "red").mkdir(parents=True)
    for number in range(3):
        (only_red / "red" / f"{number}.png").write_bytes((pictures / "red" / f"00{number}.png").read_bytes())
    assert run("evaluate", "colours", "--data", str(one_each))["n"] == 3
    found = run("evaluate", "colours", "--data", str(only_red))
    assert (found["n"], found["values"]["top1"]) == (3, 1.0)
    assert [row["n"] for row in found["per_class"]] == [0, 0, 3]


def test_evaluate_measures_what_can_be_read_and_names_the_rest(trained: Any, pictures: Path, home: Path, tmp_path: Path):
    folder = write_pictures(tmp_path / "some", 2)
    (folder / "red" / "000.png").write_bytes(b"not an image")
    found = run("evaluate", "colours", "--data", str(folder))
    assert found["n"] == 5
    assert [bad["file"] for bad in found["unreadable"]] == ["red/000.png"]


@pytest.mark.parametrize("ending", ["csv", "parquet", "npz"])
def test_answers_are_written_as_a_table(ending: str, trained: Any, pictures: Path, home: Path, tmp_path: Path):
    folder, out = write_pictures(tmp_path / "some", 2), tmp_path / f"answers.{ending}"
    found = run("evaluate", "colours", "--data", str(folder), "--out", str(out))
    documents = run("predict", str(folder), "--model", "colours", "--out", str(tmp_path / f"predicted.{ending}"))
    assert len(documents) == found["n"] == 6
    if ending == "npz":
        table, unlabelled = read(out), read(tmp_path / "predicted.npz")
        assert evaluate(table).values == pytest.approx(found["values"])
        assert unlabelled.targets is None
        np.testing.assert_allclose(unlabelled.logits, table.logits, atol=1e-5)
        return
    rows, predicted = (table_rows(path) for path in (out, tmp_path / f"predicted.{ending}"))
    assert [row["label"] for row in rows] == ["blue", "blue", "green", "green", "red", "red"]
    assert "label" not in predicted[0]
    assert [row["predicted"] for row in rows] == [row["predicted"] for row in predicted]
    assert [row["predicted"] for row in predicted] == [document["predictions"][0]["label"] for document in documents]
    assert sum(row["label"] == row["predicted"] for row in rows) / 6 == pytest.approx(found["values"]["top1"])
    assert rows[0]["sha256"] == hashlib.sha256((folder / "blue" / "000.png").read_bytes()).hexdigest()
    assert sum(float(rows[0][f"p({name})"]) for name in CLASSES) == pytest.approx(1.0, abs=1e-5)


def table_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV or Parquet file, read by somebody else's library."""
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.csv.read_csv(path) if path.suffix == ".csv" else pyarrow.parquet.read_table(path)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def test_an_ending_that_no_table_has_is_refused_before_anything_is_asked(pictures: Path, home: Path, tmp_path: Path):
    for command in (["evaluate", "colours", "--data", str(pictures)], ["predict", str(pictures), "--model", "colours"]):
        with pytest.raises(InvalidInput, match=r"write to a file that ends in \.csv, \.parquet, \.npz"):
            run(*command, "--out", str(tmp_path / "answers.xls"))


def test_predict_takes_folders_files_and_patterns(pictures: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(pictures)
    answers = run("predict", "red", "green/003.png", "blue/01*.png", "--model", "colours")
    assert [answer["file"] for answer in answers] == [
        *(f"red/{number:03d}.png" for number in range(14)),
        "green/003.png",
        *(f"blue/{number:03d}.png" for number in range(10, 14)),
    ]


def test_evaluate_refuses_classes_that_the_model_does_not_know(home: Path, tmp_path: Path):
    folder = write_pictures(tmp_path / "other", 2)
    (folder / "red").rename(folder / "reds")
    with pytest.raises(InvalidInput, match="the model knows blue, green, red") as caught:
        run("evaluate", "colours", "--data", str(folder))
    assert [problem.where for problem in caught.value.problems] == ["reds"]


def test_predict_names_the_class_and_draws_where_it_looked(pictures: Path, home: Path, tmp_path: Path):
    picture = pictures / "green" / "003.png"
    (answer,) = run("predict", str(picture), "--model", "colours@1", "--top-k", "2", "--explain", str(tmp_path))
    assert answer["predictions"][0]["label"] == "green"
    assert len(answer["predictions"]) == 2
    with Image.open(answer["explanation"]) as drawn:
        assert drawn.size == (64, 64)


def test_every_image_has_an_activation_map_of_its_own(pictures: Path, home: Path, tmp_path: Path):
    folder = tmp_path / "holiday"
    for name, colour in (("a/1.png", "red"), ("b/1.png", "green"), ("b/1.jpg", "blue")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / colour / "000.png", folder / name)
    answers = run("predict", str(folder), "--model", "colours@1", "--explain", str(tmp_path / "maps"))
    maps = sorted(Path(answer["explanation"]).relative_to(tmp_path / "maps") for answer in answers)
    assert maps == [Path("a/1.cam.png"), Path("b/1-2.cam.png"), Path("b/1.cam.png")]
    assert all((tmp_path / "maps" / name).is_file() for name in maps)


def test_predict_answers_for_the_good_files_and_names_the_bad_one(pictures: Path, home: Path, tmp_path: Path):
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    result = CliRunner().invoke(cli, ["predict", str(bad), str(pictures / "red" / "000.png"), "--json"])
    assert result.exit_code == 2
    first, second = json.loads(result.stdout)
    assert first["error"]["code"] in ("invalid_image", "unsupported_image")
    assert second["predictions"][0]["label"] == "red"


def test_models_are_listed_promoted_and_rolled_back(trained: Any, pictures: Path, home: Path):
    run("train", "--data", str(pictures), "--name", "shades", *TINY)
    run("train", "--data", str(pictures), "--name", "shades", "--seed", "1", *TINY)
    for arguments in (["promote", "shades", "1"], ["promote", "shades", "2"], ["rollback", "shades"]):
        assert CliRunner().invoke(cli, ["models", *arguments]).exit_code == 0
    found = {row["version"]: row["aliases"] for row in run("models", "list")["models"] if row["name"] == "shades"}
    assert found == {"1": ["champion"], "2": ["latest"]}
    assert run("models", "show", "shades@champion")["version"] == "1"


def test_everything_wrong_with_data_and_model_is_said_at_once(tmp_path: Path, home: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput) as caught:
        run("check", "--data", str(tmp_path / "empty"), "--model", "resnet19")
    said = str(caught.value)
    assert "class folders" in said
    assert "Did you mean" in said


def test_a_wrong_flag_value_never_starts_anything(pictures: Path, home: Path):
    with pytest.raises(SpecError, match="a problem"):
        run("train", "--data", str(pictures), "--method", "ful")


def finetune(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False, timeout=120)


def test_the_process_ends_with_2_and_one_json_document_on_bad_input(tmp_path: Path):
    ended = finetune("predict", "x.jpg", "--json", FINETUNE_HOME=str(tmp_path))
    assert ended.returncode == 2
    error = json.loads(ended.stdout)["error"]
    assert error["code"] == "not_found"
    assert "finetune train" in error["message"]


def test_help_imports_nothing_heavy():
    code = "import sys; sys.argv=['finetune', '--help']\nfrom finetune.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch','numpy','pydantic','rich','bentoml','sqlalchemy') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_without_the_train_extra_a_training_command_says_what_to_install():
    code = "import sys; sys.modules['timm'] = None; sys.argv = ['finetune', 'backbones', 'resnet50']\n"
    code += "from finetune.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert install_command("train") in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "samples", "trees", "--out", "/proc/x"],
        ["models", "pull", "BUNDLE", "--name", "trees"],
    ],
)
def test_a_path_that_cannot_be_written_is_named_in_a_sentence(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    write_tiny_bundle(bundle)
    Registry(tmp_path / "models").register(bundle, "trees")
    home = tmp_path if "samples" in arguments else Path("/proc/x")
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    monkeypatch.setattr("finetune.cli.skip_final_collection", lambda: None)
    monkeypatch.setattr(sys, "argv", ["finetune", *(str(bundle) if one == "BUNDLE" else one for one in arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "/proc/x" in said
    assert "cannot be read or written here" in said
    assert "Traceback" not in said
