"""Our models folder and MLflow's registry say the same, whichever was changed, also while one could not reach the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from run_folders import registered_run
from tiny_bundle import CLASSES, write_tiny_bundle

from finetune.bundle.registry import Registry
from finetune.promotion import promote
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import Mirror, tracked_as
from finetune.tracking.mlflow.connection import connect, destination_of
from finetune.tracking.mlflow.registry import synchronise
from finetune.tracking.tracker import Choice


@dataclass
class Both:
    """Both registries of a workspace."""

    workspace: Workspace
    ours: Registry
    theirs: Any

    def register(self, name: str = "flowers", *, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> str:
        bundle = self.workspace.root / "bundles" / f"{name}-{seed}"
        if not bundle.exists():
            write_tiny_bundle(bundle, seed=seed, classes=classes)
        return self.ours.register(bundle, name).version

    def sync(self, *names: str) -> list[str]:
        return synchronise(self.theirs, destination_of(self.workspace), self.workspace, names or None)

    def here(self, name: str = "flowers") -> dict[str, str]:
        versions = self.ours.versions(name)
        return {alias: version.version for version in versions for alias in version.aliases if alias != "latest"}

    def there(self, name: str = "flowers") -> dict[str, str]:
        aliases = self.theirs.get_registered_model(name).aliases
        return {alias: str(number) for alias, number in aliases.items()}

    def versions_there(self, name: str = "flowers") -> list[str]:
        return sorted(str(version.version) for version in self.theirs.search_model_versions(f"name = '{name}'"))


@pytest.fixture
def both(mlflow_workspace: Path) -> Both:
    workspace = Workspace.at(mlflow_workspace)
    return Both(workspace, Registry(workspace.models), connect(destination_of(workspace)))


def test_what_is_registered_here_is_there_under_the_same_number_and_alias(both: Both) -> None:
    for seed in range(3):
        both.register(seed=seed)
    assert both.sync() == []
    assert both.versions_there() == ["1", "2", "3"]
    assert both.there() == both.here() == {"champion": "1"}
    (version,) = [one for one in both.theirs.search_model_versions("name = 'flowers'") if str(one.version) == "3"]
    assert version.description.startswith("linear_probe on ")
    assert both.sync() == []
    assert both.versions_there() == ["1", "2", "3"]


def test_a_promotion_here_moves_the_alias_there(both: Both) -> None:
    for seed in range(2):
        both.register(seed=seed)
    assert both.sync() == []
    promote(both.ours, "flowers", "2", by="ada")
    both.ours.set_alias("flowers", "candidate", "1")
    assert both.sync() == []
    assert both.there() == {"champion": "2", "candidate": "1"}


def test_an_alias_that_is_moved_there_is_a_promotion_here_with_its_checks(both: Both) -> None:
    for seed in range(2):
        both.register(seed=seed)
    assert both.sync() == []
    both.theirs.set_registered_model_alias("flowers", "champion", "2")
    both.theirs.set_registered_model_alias("flowers", "staging", "1")
    assert both.sync() == []
    assert both.here() == {"champion": "2", "staging": "1"}
    journal = (both.workspace.models / "flowers" / "aliases.jsonl").read_text()
    assert '"by": "MLflow"' in journal


def test_an_alias_that_is_moved_there_to_a_version_that_fails_its_checks_is_not_moved_here(both: Both) -> None:
    both.register(seed=0)
    both.register(seed=1, classes=("other", "classes"))
    assert both.sync() == []
    both.theirs.set_registered_model_alias("flowers", "champion", "2")
    for _ in range(2):  # it is said as long as it is so
        (note,) = both.sync()
        assert note.startswith("flowers@champion was moved in MLflow to version 2, and not here:")
        assert "classes" in note
        assert both.here() == {"champion": "1"}
    promote(both.ours, "flowers", "2", force=True, by="ada")
    assert both.sync() == []
    assert both.here() == both.there() == {"champion": "2"}


def test_an_alias_that_was_moved_on_both_sides_means_what_it_means_here(both: Both) -> None:
    for seed in range(3):
        both.register(seed=seed)
    assert both.sync() == []
    both.ours.set_alias("flowers", "champion", "2")
    both.theirs.set_registered_model_alias("flowers", "champion", "3")
    (note,) = both.sync()
    assert "version 2 of the models folder counts, not 3" in note
    assert both.here() == both.there() == {"champion": "2"}


def test_an_alias_that_was_deleted_there_is_there_again(both: Both) -> None:
    both.register()
    assert both.sync() == []
    both.theirs.delete_registered_model_alias("flowers", "champion")
    assert both.sync() == []
    assert both.there() == {"champion": "1"}


def test_after_an_outage_both_sides_have_what_happened_on_the_other(both: Both) -> None:
    for seed in range(3):
        both.register(seed=seed)
    assert both.sync() == []
    # MLflow cannot be reached: here two versions come, one goes, an alias moves; there another alias moves.
    both.register(seed=3)
    both.register(seed=4)
    both.ours.delete("flowers", "2")
    both.ours.set_alias("flowers", "champion", "5")
    both.theirs.set_registered_model_alias("flowers", "shadow", "3")
    assert both.sync() == []
    assert both.versions_there() == ["1", "3", "4", "5"]
    assert both.here() == both.there() == {"champion": "5", "shadow": "3"}


def test_a_model_that_is_deleted_here_is_deleted_there_version_by_version(both: Both) -> None:
    both.register()
    assert both.sync() == []
    both.ours.delete("flowers", force=True)
    assert both.sync() == []
    assert both.versions_there() == []


def test_a_version_that_was_deleted_there_stays_here_and_does_not_come_back_there(both: Both) -> None:
    for seed in range(2):
        both.register(seed=seed)
    assert both.sync() == []
    both.theirs.delete_model_version("flowers", "2")
    for _ in range(2):
        assert both.sync() == ["flowers version 2 was deleted in MLflow, and is still here"]
    assert [version.version for version in both.ours.versions("flowers")] == ["1", "2"]
    assert both.versions_there() == ["1"]


def test_when_mlflow_has_lost_everything_it_gets_everything_and_nothing_is_lost_here(both: Both) -> None:
    for seed in range(2):
        both.register(seed=seed)
    assert both.sync() == []
    both.theirs.delete_registered_model("flowers")
    assert both.sync() == []
    assert both.versions_there() == ["1", "2"]
    assert both.here() == both.there() == {"champion": "1"}


def test_numbers_are_the_same_although_some_were_given_and_deleted_before(both: Both) -> None:
    for seed in range(4):
        both.register(seed=seed)
    both.ours.set_alias("flowers", "champion", "4")
    for number in ("1", "3"):
        both.ours.delete("flowers", number)
    assert both.sync() == []
    assert both.versions_there() == ["2", "4"]
    assert both.there() == {"champion": "4"}


def test_a_number_that_mlflow_has_given_to_something_else_is_said(both: Both) -> None:
    both.theirs.create_registered_model("flowers")
    both.theirs.create_model_version("flowers", "s3://elsewhere/model")
    both.register()
    (note,) = both.sync()
    assert note == "flowers version 1 is version 2 in MLflow, which had that number already"
    assert both.there() == {"champion": "2"}
    both.theirs.set_registered_model_alias("flowers", "staging", "2")
    assert both.sync() == []
    assert both.here() == {"champion": "1", "staging": "1"}


def test_a_bundle_that_is_registered_there_is_a_version_here_for_administrators_alone(both: Both) -> None:
    """As by the button "Register model" on MLflow's page of a run's model."""
    run = RunDir(both.workspace.runs / "a")
    registered_run(run, both.workspace)
    assert Mirror(run, Choice("mlflow"), both.workspace, "flowers").update(alive=False) == ""
    (output,) = both.theirs.get_run(tracked_as(run, "mlflow")).outputs.model_outputs
    both.theirs.create_registered_model("roses")
    both.theirs.create_model_version("roses", f"models:/{output.model_id}", model_id=output.model_id)
    both.theirs.set_registered_model_alias("roses", "staging", "1")
    assert both.sync() == []
    assert both.here("roses") == {"champion": "1", "staging": "1"}
    assert both.there("roses") == {"champion": "1", "staging": "1"}
    access = both.ours.access("roses")
    assert (access.owner, access.visibility) == (None, "private")
    flowers, roses = (both.ours.resolve(name).path for name in ("flowers", "roses"))
    assert (flowers / "model.onnx").read_bytes() == (roses / "model.onnx").read_bytes()
    assert both.sync() == []
    assert both.versions_there("roses") == ["1"]


def test_models_that_are_not_ours_are_left_alone(both: Both) -> None:
    both.theirs.create_registered_model("forecast")
    both.theirs.create_model_version("forecast", "s3://elsewhere/model")
    assert both.sync() == []
    assert both.ours.names() == ()


def test_names_that_mlflow_keeps_for_itself_or_does_not_take_stay_here(both: Both) -> None:
    both.register()
    both.ours.set_alias("flowers", "v1", "1")
    both.ours.set_alias("flowers", "of.may", "1")
    notes = both.sync()
    assert notes == [
        "MLflow allows no alias 'of.may', so flowers@of.may exists only in the models folder",
        "MLflow allows no alias 'v1', so flowers@v1 exists only in the models folder",
    ]
    assert both.there() == {"champion": "1"}


def test_the_same_bundle_registered_twice_is_two_versions_on_both_sides(both: Both) -> None:
    both.register(seed=0)
    both.register(seed=0)
    assert both.sync() == []
    assert both.versions_there() == ["1", "2"]
    both.ours.set_alias("flowers", "champion", "2")
    assert both.sync() == []
    assert both.there() == {"champion": "2"}


def test_each_version_is_stored_once(both: Both) -> None:
    run = RunDir(both.workspace.runs / "a")
    registered_run(run, both.workspace)
    for _ in range(2):
        assert Mirror(run, Choice("mlflow"), both.workspace, "flowers").update(alive=False, thorough=True) == ""
        assert both.sync() == []
    experiments = [experiment.experiment_id for experiment in both.theirs.search_experiments()]
    assert len(both.theirs.search_logged_models(experiments)) == 1
    assert mlflow.MlflowClient is type(both.theirs)
