"""A workspace goes into one file and comes back the same, here or in another place; what is damaged is refused whole."""

from __future__ import annotations

import io
import json
import sqlite3
import stat
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from serving import in_process, registered
from standin import picture, write_bundle

from finetune.bundle.registry import Registry
from finetune.cli import cli
from finetune.errors import Conflict, InvalidInput
from finetune.jobs.database import open_database
from finetune.jobs.store import JobStore
from finetune.spec import parse_spec
from finetune.storage.backup import restore_backup, write_backup
from finetune.storage.files import read_json, write_json
from finetune.storage.rundir import RunDir


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A workspace with a job that has not ended, its run, an upload, a model, and things that belong to living processes."""
    home = tmp_path / "home"
    home.mkdir()
    registered(home, write_bundle(tmp_path / "bundle"))
    (home / "files" / "file-1" / "daisy").mkdir(parents=True)
    (home / "files" / "file-1" / "daisy" / "1.png").write_bytes(picture())
    store = JobStore(open_database(home / "jobs.db"))
    spec = parse_spec({"training_file": str(home / "files" / "file-1")})
    job, _ = store.create("ann", spec.model_dump(mode="json"), spec_digest="0" * 64)
    run = RunDir(home / "runs" / job.id).create()
    write_json(run.outcome, {"bundle": str(run.bundle), "elsewhere": "/data/home"})
    run.checkpoints.mkdir()
    (run.checkpoints / "step-00000001.pt").write_bytes(b"\0\1" * 1000)
    for left_out in (".lock", "lease-3", ".x.tmp"):
        (run.root / left_out).write_text("of a living process")
    (home / "cache").mkdir()
    (home / "cache" / "features").write_text("computed again")
    (home / "files" / ".arriving-1").mkdir()
    (home / "files" / ".arriving-1" / "archive").write_text("half")
    return home


def the_job(home: Path) -> tuple[str, str]:
    (job,) = JobStore(open_database(home / "jobs.db")).newest(10)
    return job.id, str(job.spec["training_file"])


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_workspace_comes_back_in_another_place_with_its_paths(home: Path, tmp_path: Path) -> None:
    made = write_backup(home, tmp_path / "b.tar", jobs_database=home / "jobs.db")
    elsewhere = tmp_path / "deep" / "er"
    found = restore_backup(tmp_path / "b.tar", elsewhere)
    assert (found.n_files, found.root, found.size_bytes) == (made.n_files, home, made.size_bytes)
    job_id, training_file = the_job(elsewhere)
    assert training_file == str(elsewhere / "files" / "file-1")
    run = RunDir(elsewhere / "runs" / job_id)
    assert read_json(run.outcome) == {"bundle": str(run.bundle), "elsewhere": "/data/home"}
    assert (run.checkpoints / "step-00000001.pt").read_bytes() == b"\0\1" * 1000
    missing = names_in(home) - names_in(elsewhere)
    assert {name.rpartition("/")[2] for name in missing} - {"jobs.db-journal"} == {
        ".lock", "lease-3", ".x.tmp", "features", "archive",
    }  # fmt: skip
    before, after = (Registry(place / "models").resolve("colours") for place in (home, elsewhere))
    assert (after.version, after.created_at) == (before.version, pytest.approx(before.created_at, abs=1e-3))
    with in_process(elsewhere) as client:
        assert client.post("/predict", content=picture("red")).json()["predictions"][0]["label"] == "red"
        assert client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["status"] == "queued"
    assert not [path for path in (tmp_path / "deep").iterdir() if path.name.startswith(".")]


def test_a_run_that_was_not_finished_begins_anew_in_another_place_and_resumes_in_the_same(home: Path, tmp_path: Path) -> None:
    """Its checkpoints belong to a spec with the path of the data, which is another one there."""
    job_id, _ = the_job(home)
    RunDir(home / "runs" / job_id).outcome.unlink()
    write_backup(home, tmp_path / "b.tar", jobs_database=home / "jobs.db")
    home.rename(tmp_path / "lost")
    for place in (home, tmp_path / "elsewhere"):
        restore_backup(tmp_path / "b.tar", place)
    resumes, anew = (RunDir(place / "runs" / job_id) for place in (home, tmp_path / "elsewhere"))
    assert (resumes.checkpoints / "step-00000001.pt").exists()
    assert anew.root.is_dir()
    assert not anew.checkpoints.exists()


def test_a_database_is_copied_as_it_is_at_one_moment_also_while_it_is_written(home: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(home / "jobs.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE jobs SET owner = 'bob'")
        write_backup(home, tmp_path / "b.tar", jobs_database=home / "jobs.db")
        writer.execute("COMMIT")
    restore_backup(tmp_path / "b.tar", tmp_path / "there")
    (job,) = JobStore(open_database(tmp_path / "there" / "jobs.db")).newest(10)
    assert job.owner == "ann", "what was not committed is not in it"


def test_jobs_that_are_kept_elsewhere_are_left_out(home: Path, tmp_path: Path) -> None:
    write_backup(home, tmp_path / "b.tar", jobs_database=None)
    restore_backup(tmp_path / "b.tar", tmp_path / "there")
    assert not (tmp_path / "there" / "jobs.db").exists()


def test_a_workspace_that_is_there_is_never_written_over(home: Path, tmp_path: Path) -> None:
    write_backup(home, tmp_path / "b.tar", jobs_database=home / "jobs.db")
    with pytest.raises(Conflict, match="is not empty"):
        restore_backup(tmp_path / "b.tar", home)
    with pytest.raises(InvalidInput, match="holds no workspace"):
        write_backup(tmp_path / "nothing", tmp_path / "c.tar", jobs_database=None)


def test_a_backup_that_is_cut_short_changed_or_none_is_refused_and_nothing_appears(home: Path, tmp_path: Path) -> None:
    write_backup(home, tmp_path / "b.tar", jobs_database=home / "jobs.db")
    whole = (tmp_path / "b.tar").read_bytes()
    position = whole.index(b"\0\1" * 1000)
    damaged = {
        "cut": whole[: len(whole) // 2],
        "changed": whole[:position] + b"x" + whole[position + 1 :],
        "none": b"not a tar file at all" * 100,
        "without its end": _without_manifest(whole),
        "escaping": _tar({"../outside": b"x", "backup.json": b"{}"}),
        "newer": _tar({"backup.json": json.dumps({"schema_version": 9, "files": {}}).encode()}),
    }
    for name, data in damaged.items():
        (tmp_path / "damaged.tar").write_bytes(data)
        with pytest.raises(InvalidInput, match=r"damaged\.tar: "):
            restore_backup(tmp_path / "damaged.tar", tmp_path / "there")
        assert not (tmp_path / "there").exists(), name
    assert not (tmp_path / "outside").exists()
    assert not [path for path in tmp_path.iterdir() if "restoring" in path.name]


def _tar(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _without_manifest(whole: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        kept = {one.name: archive.extractfile(one).read() for one in archive if one.name != "backup.json"}  # type: ignore[union-attr]
    return _tar(kept)


def test_the_commands_write_and_restore(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINETUNE_DATABASE", raising=False)
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    written = CliRunner().invoke(cli, ["backup", str(tmp_path / "b.tar"), "--json"], catch_exceptions=False)
    assert json.loads(written.stdout)["jobs_included"] is True
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "there"))
    restored = CliRunner().invoke(cli, ["restore", str(tmp_path / "b.tar"), "--json"], catch_exceptions=False)
    assert json.loads(restored.stdout)["made_of"] == str(home)
    assert [stat.filemode((tmp_path / name).stat().st_mode) for name in ("b.tar", "there")] == ["-rw-------", "drwx------"]
    assert the_job(tmp_path / "there")[0] == the_job(home)[0]
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    monkeypatch.setenv("FINETUNE_DATABASE", "postgresql://localhost/jobs")
    without = CliRunner().invoke(cli, ["backup", str(tmp_path / "c.tar"), "--json"], catch_exceptions=False)
    assert json.loads(without.stdout)["jobs_included"] is False
    assert "pg_dump" in without.stderr
