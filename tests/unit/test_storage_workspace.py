"""The workspace is one value made at a door, and a run folder knows where it stands in a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import Conflict
from finetune.storage.files import write_json
from finetune.storage.rundir import RunBusy, RunDir
from finetune.storage.workspace import Workspace


def test_everything_of_a_workspace_lies_in_its_folder() -> None:
    workspace = Workspace.at(Path("/w"))
    inside = [workspace.runs, workspace.models, workspace.files, workspace.cache, workspace.networks]
    assert all(path.is_relative_to("/w") for path in inside)
    assert len(set(inside)) == 5


def test_the_environment_names_the_folder_and_a_relative_one_is_fixed_at_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace.from_environment({"FINETUNE_HOME": "mine", "FINETUNE_CACHE": "/cache"})
    monkeypatch.chdir("/")
    assert workspace.runs == tmp_path / "mine" / "runs"
    assert workspace.networks == Path("/cache/networks"), "traced networks belong to the user"


@pytest.mark.parametrize(
    ("environment", "networks"),
    [({"XDG_CACHE_HOME": "/x"}, "/x/finetune/networks"), ({"FINETUNE_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c/networks")],
)
def test_without_a_name_it_is_here_and_networks_are_where_caches_go(
    environment: dict[str, str], networks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace.from_environment(environment)
    assert workspace.root == tmp_path / ".finetune"
    assert workspace.networks == Path(networks)


def test_a_run_knows_its_study_and_a_study_its_children(tmp_path: Path) -> None:
    study = RunDir(tmp_path / "study").create()
    child = study.child("fold-1").create()
    assert child.root == tmp_path / "study" / "runs" / "fold-1"
    assert child.parent is None, "a folder called runs makes no study"
    write_json(study.study, {"kind": "folds", "children": [], "kept": None})
    assert child.parent == study
    assert child.child("refit").parent is None
    assert study.parent is None


def test_only_one_process_works_on_a_run_and_leftovers_of_the_last_one_go(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run").create()
    leftover = run.child("fold-1").create().root / ".split.csv.abc.tmp"
    leftover.touch()
    with run.held():
        assert not leftover.exists()
        with pytest.raises(RunBusy, match="another process is working on this run"), RunDir(run.root).held():
            pass
    with run.held():
        pass
    assert issubclass(RunBusy, Conflict)
