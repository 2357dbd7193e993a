"""Versions count up, appear whole, and aliases flip in one step, whoever else is writing or dying meanwhile."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from tiny_bundle import write_tiny_bundle

from finetune.bundle import aliases
from finetune.bundle import registry as registry_module
from finetune.bundle.access import Access
from finetune.bundle.predictor import Predictor
from finetune.bundle.registry import ModelVersion, Registry
from finetune.errors import BundleError, Conflict, DiskFull, InvalidInput, NotFound


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product catches it."""


def die(*_: object, **__: object) -> None:
    raise Killed


def versions(registry: Registry, name: str = "trees") -> list[str]:
    return [version.version for version in registry.list() if version.name == name]


def test_versions_count_up_and_latest_follows(registry: Registry, bundle: Path) -> None:
    registered = [registry.register(bundle, "trees") for _ in range(11)]
    assert [version.version for version in registered] == [str(number) for number in range(1, 12)]
    assert versions(registry) == [str(number) for number in range(1, 12)]  # 10 after 9, not after 1
    assert registry.resolve("trees", "latest") == registered[-1]
    assert registry.resolve("trees", "3").aliases == ()


def test_a_registered_bundle_loads_under_its_name_and_version(registry: Registry, bundle: Path) -> None:
    version = registry.register(bundle, "oaks")
    manifest = Predictor.load(version.path).manifest
    assert (manifest.name, manifest.version) == ("oaks", "1")
    assert sorted(entry.name for entry in version.path.iterdir()) == ["bundle.json", "model.onnx", "probe.npz"]


def test_names_are_separate_and_listed_in_order(registry: Registry, bundle: Path) -> None:
    for name in ("oaks", "elms", "oaks"):
        registry.register(bundle, name)
    assert [(version.name, version.version) for version in registry.list()] == [("elms", "1"), ("oaks", "1"), ("oaks", "2")]


def test_a_registry_that_does_not_exist_is_empty(registry: Registry) -> None:
    assert registry.list() == ()
    with pytest.raises(NotFound, match=r"no model is registered in .*models: train one"):
        registry.default()
    with pytest.raises(NotFound, match=r"no model 'trees'\. None is registered"):
        registry.resolve("trees")
    assert not registry.root.exists()


@pytest.mark.parametrize("name", ["", "Trees", "../trees", "trees/1", ".trees", "a" * 64, "trees\n"])
def test_a_name_that_cannot_be_a_folder_is_refused(registry: Registry, bundle: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be a model name"):
        registry.register(bundle, name)
    assert not registry.root.exists()


@pytest.mark.parametrize("name", ["../models/trees", "..", "trees/../trees", "/etc"])
def test_a_name_never_leads_out_of_the_folder(registry: Registry, bundle: Path, name: str) -> None:
    registry.register(bundle, "trees")
    with pytest.raises(NotFound, match="no model"):
        registry.resolve(name)


def test_an_unknown_model_version_or_alias_names_what_exists(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    with pytest.raises(NotFound, match=r"no model 'tree'\. Did you mean 'trees'\? Registered are: trees"):
        registry.resolve("tree")
    with pytest.raises(NotFound, match=r"no version or alias '2'.* It has: 1, champion, latest"):
        registry.resolve("trees", "2")
    with pytest.raises(NotFound, match=r"Did you mean 'latest'\?"):
        registry.resolve("trees", "lates")


def test_a_private_model_is_not_named_in_place_of_an_unknown_one(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    registry.set_access("trees", Access(owner="ann", visibility="private"))
    with pytest.raises(NotFound, match=r"^no model 'tree'\. finetune models list shows those that are registered$"):
        registry.resolve("tree")


# ---- aliases -----------------------------------------------------------------------------------------------------------------


def test_registering_never_changes_what_a_bare_name_means(registry: Registry, bundle: Path) -> None:
    for _ in range(3):
        registry.register(bundle, "trees")
        assert registry.resolve("trees").version == "1"
    assert registry.set_alias("trees", "champion", "2").aliases == ("champion",)
    assert registry.resolve("trees").version == "2"
    registry.register(bundle, "trees")
    assert registry.resolve("trees").version == "2"
    assert registry.resolve("trees", "latest").version == "4"


def test_an_alias_may_be_pointed_at_what_another_alias_means(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    with pytest.raises(InvalidInput, match="always means the newest version"):
        registry.set_alias("trees", "latest", "1")
    assert registry.set_alias("trees", "champion", "latest").aliases == ("champion", "latest")
    registry.register(bundle, "trees")
    assert registry.resolve("trees", "champion").version == "1"


def test_aliases_json_is_a_plain_mapping(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    registry.set_alias("trees", "champion", "1")
    assert json.loads((registry.root / "trees" / "aliases.json").read_text()) == {"champion": "1", "latest": "1"}


@pytest.mark.parametrize("alias", ["1", "", "Best", "../x", "a b"])
def test_an_alias_cannot_be_mistaken_for_a_version_or_a_path(registry: Registry, bundle: Path, alias: str) -> None:
    registry.register(bundle, "trees")
    with pytest.raises(InvalidInput, match="cannot be an alias"):
        registry.set_alias("trees", alias, "1")


def test_an_alias_to_nothing_is_refused(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    with pytest.raises(NotFound, match="no version or alias '9'"):
        registry.set_alias("trees", "champion", "9")
    with pytest.raises(NotFound, match="no model 'ferns'"):
        registry.set_alias("ferns", "champion", "1")
    assert not (registry.root / "ferns").exists()


def test_rollback_goes_to_the_version_before_and_twice_comes_back(registry: Registry, bundle: Path) -> None:
    for _ in range(3):
        registry.register(bundle, "trees")
    for version in ("3", "1", "3", "3"):
        registry.set_alias("trees", "champion", version)
    assert registry.rollback("trees").version == "1"
    assert registry.resolve("trees").version == "1"
    assert registry.rollback("trees").version == "3"


def test_rollback_skips_versions_that_are_gone(registry: Registry, bundle: Path) -> None:
    for version in ("1", "2", "3"):
        registry.register(bundle, "trees")
        registry.set_alias("trees", "champion", version)
    registry.delete("trees", "2")
    assert registry.rollback("trees", "champion").version == "1"


def test_rollback_without_a_past_says_so(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    with pytest.raises(NotFound, match="no version or alias 'challenger'"):
        registry.rollback("trees", "challenger")
    registry.set_alias("trees", "champion", "1")
    with pytest.raises(Conflict, match="has never pointed at a version other than 1"):
        registry.rollback("trees")


def test_a_folder_filled_by_hand_works_without_aliases(registry: Registry, bundle: Path) -> None:
    write_tiny_bundle(registry.root / "trees" / "2")
    write_tiny_bundle(registry.root / "trees" / "10")
    assert registry.resolve("trees").version == "10"
    assert registry.default().version == "10"
    assert registry.register(bundle, "trees").version == "11"
    assert registry.resolve("trees").version == registry.default().version == "10"


@pytest.mark.parametrize("damage", ["{", "[1]", '"x"', '{"latest": 7}', '{"latest": "../1"}', ""])
def test_damaged_aliases_are_read_from_the_journal_and_mended_by_the_next_promotion(
    registry: Registry, bundle: Path, damage: str
) -> None:
    for _ in range(3):
        registry.register(bundle, "trees")
    registry.set_alias("trees", "champion", "2")
    aliases = registry.root / "trees" / "aliases.json"
    aliases.write_text(damage)
    assert registry.resolve("trees").version == "2"
    assert registry.resolve("trees", "latest").version == "3"
    assert len(registry.list()) == 3
    registry.set_alias("trees", "champion", "3")
    assert json.loads(aliases.read_text()) == {"champion": "3", "latest": "3"}


def test_registering_once_keeps_the_version_that_a_bundle_already_is(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    first = registry.register(bundle, "trees", once=True)
    assert registry.register(bundle, "trees", once=True) == first
    write_tiny_bundle(tmp_path / "other", seed=1)
    registry.register(tmp_path / "other", "trees", once=True)
    assert registry.register(bundle, "trees", once=True).version == "1"
    assert registry.resolve("trees", "latest").version == "2"


def test_registering_once_finishes_what_a_killed_writer_left_undone(
    registry: Registry, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_bundle(tmp_path / "other", seed=1)
    registry.register(tmp_path / "other", "trees")
    monkeypatch.setattr(registry_module, "move_alias", die)
    with pytest.raises(Killed):
        registry.register(bundle, "trees", once=True)
    monkeypatch.undo()
    assert registry.resolve("trees", "latest").version == "1"
    assert registry.register(bundle, "trees", once=True).aliases == ("latest",)
    assert registry.resolve("trees").version == "1"
    assert versions(registry) == ["1", "2"]


def test_a_reference_is_a_folder_a_name_or_a_name_with_a_version_or_alias(registry: Registry, bundle: Path) -> None:
    for _ in range(2):
        registry.register(bundle, "trees")
    registry.set_alias("trees", "champion", "1")
    folder = registry.root / "trees"
    assert registry.locate(str(bundle)) == registry.locate(str(bundle.parent)) == bundle, "the bundle, or its run's folder"
    assert registry.locate() == registry.locate("trees") == registry.locate("trees@champion") == folder / "1"
    assert registry.locate("trees@2") == registry.locate("trees@latest") == folder / "2"
    with pytest.raises(NotFound, match="this folder is neither a bundle nor a run that exported a model"):
        registry.locate("./nowhere")
    with pytest.raises(NotFound, match="no version or alias '7'"):
        registry.locate("trees@7")


# ---- deleting ----------------------------------------------------------------------------------------------------------------


def test_a_version_without_alias_is_deleted_and_its_number_not_given_again(registry: Registry, bundle: Path) -> None:
    for _ in range(3):
        registry.register(bundle, "trees")
    registry.delete("trees", "2")
    assert versions(registry) == ["1", "3"]
    registry.delete("trees", "3", force=True)
    assert registry.register(bundle, "trees").version == "4"


def test_what_an_alias_means_is_only_deleted_by_force(registry: Registry, bundle: Path) -> None:
    for _ in range(2):
        registry.register(bundle, "trees")
    registry.set_alias("trees", "champion", "2")
    with pytest.raises(Conflict, match="aliases point at version 2 of trees: champion, latest"):
        registry.delete("trees", "2")
    assert versions(registry) == ["1", "2"]
    registry.delete("trees", "2", force=True)
    assert registry.resolve("trees").version == "1"
    assert registry.resolve("trees").aliases == ("latest",)


def test_a_whole_model_is_deleted_by_force_and_starts_behind_its_old_numbers(registry: Registry, bundle: Path) -> None:
    for _ in range(2):
        registry.register(bundle, "trees")
    with pytest.raises(Conflict, match="aliases point at trees: champion, latest"):
        registry.delete("trees")
    registry.delete("trees", force=True)
    assert registry.list() == ()
    with pytest.raises(NotFound, match="no model 'trees'"):
        registry.resolve("trees")
    with pytest.raises(NotFound, match="no model 'trees'"):
        registry.delete("trees")
    assert registry.register(bundle, "trees").version == "3"


# ---- what goes wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.onnx", "probe.npz"])
def test_a_damaged_bundle_is_not_registered(registry: Registry, tmp_path: Path, name: str) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / name).write_bytes(b"other")
    with pytest.raises(BundleError, match=f"{name} is not what bundle.json says"):
        registry.register(tmp_path / "bundle", "trees")
    (tmp_path / "bundle" / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        registry.register(tmp_path / "bundle", "trees")
    assert registry.list() == ()


def test_a_full_disk_registers_nothing(registry: Registry, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registry_module.shutil, "copyfile", full)
    with pytest.raises(DiskFull, match="the disk is full"):
        registry.register(bundle, "trees")
    assert registry.list() == ()
    monkeypatch.undo()
    assert registry.register(bundle, "trees").version == "1"


@pytest.mark.parametrize(
    ("module", "step"),
    [
        (registry_module.shutil, "copyfile"),
        (registry_module, "sha256_file"),
        (registry_module, "write_json"),
        (registry_module, "move_alias"),
        (aliases, "write_json"),
        (aliases, "append_line"),
    ],
)
def test_a_writer_killed_at_any_step_leaves_what_readers_and_writers_can_use(
    registry: Registry, bundle: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str
) -> None:
    registry.register(bundle, "trees")
    monkeypatch.setattr(module, step, die)
    with pytest.raises(Killed):
        registry.register(bundle, "trees")
    monkeypatch.undo()

    for version in registry.list():
        Predictor.load(version.path)
    registry.resolve("trees")
    after = registry.register(bundle, "trees")
    assert int(after.version) == 1 + int(versions(registry)[-2])
    assert registry.resolve("trees", "latest") == after
    assert registry.resolve("trees").version == "1"
    assert not [entry for entry in (registry.root / "trees").iterdir() if entry.name.startswith((".arriving", ".leaving"))]


def test_a_deletion_that_was_killed_is_finished_by_the_next_writer(
    registry: Registry, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        registry.register(bundle, "trees")
    monkeypatch.setattr(registry_module.shutil, "rmtree", die)
    with pytest.raises(Killed):
        registry.delete("trees", "2")
    monkeypatch.undo()
    assert versions(registry) == ["1", "3"]
    registry.register(bundle, "trees")
    assert not list((registry.root / "trees").glob(".leaving*"))


# ---- at the same time --------------------------------------------------------------------------------------------------------


REGISTER_FOUR = """
import sys
from pathlib import Path
from finetune.bundle.registry import Registry
for _ in range(4):
    print(Registry(Path(sys.argv[1])).register(Path(sys.argv[2]), "trees").version)
"""


def test_processes_and_threads_that_register_at_once_each_get_their_own_version(registry: Registry, bundle: Path) -> None:
    command = [sys.executable, "-c", REGISTER_FOUR, str(registry.root), str(bundle)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    in_threads: list[str] = []

    def register() -> None:
        in_threads.extend(registry.register(bundle, "trees").version for _ in range(4))

    threads = [threading.Thread(target=register) for _ in range(2)]
    for thread in threads:
        thread.start()
    in_processes = [version for process in processes for version in process.communicate(timeout=240)[0].split()]
    for thread in threads:
        thread.join()
    everything = sorted((*in_processes, *in_threads), key=int)
    assert everything == [str(number) for number in range(1, 21)]
    assert versions(registry) == everything
    assert registry.resolve("trees", "latest").version == "20"
    moves = [json.loads(line) for line in (registry.root / "trees" / "aliases.jsonl").read_text().splitlines()]
    assert [move["version"] for move in moves if move["alias"] == "latest"] == everything  # one at a time, in order
    assert [move["version"] for move in moves if move["alias"] == "champion"] == ["1"]


def test_a_model_is_found_while_its_only_version_gives_way_to_the_next(
    registry: Registry, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register(bundle, "trees")
    describe = Registry._describe

    def meanwhile(self: Registry, name: str, version: str, aliases: dict[str, str]) -> ModelVersion:
        monkeypatch.setattr(Registry, "_describe", describe)
        registry.register(bundle, "trees")
        registry.set_alias("trees", "live", "2")
        registry.delete("trees", "1", force=True)
        return describe(self, name, version, aliases)

    monkeypatch.setattr(Registry, "_describe", meanwhile)
    assert registry.resolve("trees", "live").version == "2"


def test_a_folder_in_place_of_a_version_is_not_one(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    (registry.root / "trees" / "2").mkdir()
    assert versions(registry) == ["1"]
    assert registry.resolve("trees").version == "1"


def test_a_reader_never_sees_half_a_version_while_others_register_and_delete(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    enough, changes = threading.Event(), 0

    def churn() -> None:
        nonlocal changes
        while changes < 12 or not enough.is_set():
            registry.register(bundle, "trees")
            registry.delete("trees", versions(registry)[0], force=True)
            changes += 1

    writer = threading.Thread(target=churn)
    writer.start()
    seen = 0
    try:
        while writer.is_alive():
            for version in registry.list():
                with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                    names = sorted(entry.name for entry in version.path.iterdir())
                    assert names == ["bundle.json", "model.onnx", "probe.npz"] or not version.path.exists()
                    seen += 1
            assert int(registry.resolve("trees").version) >= 1
            if seen >= 12:
                enough.set()
    finally:
        enough.set()
        writer.join()
    assert (changes >= 12, seen >= 12, len(versions(registry))) == (True, True, 1)
