"""The store: one byte budget for all namespaces, and nothing is deleted that somebody uses or that is not in the budget."""

from __future__ import annotations

import os
import time
from pathlib import Path

from finetune.storage.store import Namespace, Store, mark_used


def put(store: Store, namespace: Namespace, name: str, n_bytes: int, unused_seconds: float = 0.0) -> Path:
    path = store.folder(namespace) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * n_bytes)
    at = time.time() - unused_seconds
    os.utime(path, (at, at))
    return path


def test_the_least_recently_used_files_of_all_namespaces_make_room(tmp_path: Path) -> None:
    store = Store(tmp_path, 300)
    old = put(store, "features", "a/old", 100, 300)
    older = put(store, "pixels", "b/older", 100, 600)
    recent = put(store, "engines", "c/recent", 100, 10)
    assert Store(tmp_path, 300).reserve(90)
    assert (old.exists(), older.exists(), recent.exists()) == (True, False, True)


def test_what_was_used_since_the_store_was_opened_stays(tmp_path: Path) -> None:
    put(Store(tmp_path), "features", "a", 100, 1000)
    store = Store(tmp_path, 150)
    mark_used(store.folder("features") / "a")
    assert not store.reserve(100)
    assert (store.folder("features") / "a").exists()


def test_a_file_that_is_used_after_the_room_was_counted_stays(tmp_path: Path) -> None:
    first = put(Store(tmp_path), "features", "a", 100, 1000)
    second = put(Store(tmp_path), "features", "b", 100, 2000)
    store = Store(tmp_path, 250)
    assert store.reserve(10)
    mark_used(second)
    assert store.reserve(100)
    assert (first.exists(), second.exists()) == (False, True)


def test_more_than_the_budget_is_refused_and_deletes_nothing(tmp_path: Path) -> None:
    kept = put(Store(tmp_path), "features", "a", 100, 1000)
    assert not Store(tmp_path, 1000).reserve(1001)
    assert kept.exists()


def test_room_that_was_reserved_is_not_given_twice(tmp_path: Path) -> None:
    store = Store(tmp_path, 100)
    assert store.reserve(60)
    assert not store.reserve(60)
    store.forget_room()
    assert store.reserve(60)


def test_notes_are_outside_the_budget(tmp_path: Path) -> None:
    note = put(Store(tmp_path), "notes", "readable", 10_000, 10_000)
    assert Store(tmp_path, 100).reserve(100)
    assert note.exists()


def test_a_temporary_file_of_a_dead_process_is_deleted_and_a_young_one_stays(tmp_path: Path) -> None:
    abandoned = put(Store(tmp_path), "features", ".a.tmp", 10, 7200)
    in_use = put(Store(tmp_path), "features", ".b.tmp", 10)
    assert Store(tmp_path, 100).reserve(10)
    assert (abandoned.exists(), in_use.exists()) == (False, True)
