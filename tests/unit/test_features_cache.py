"""The row cache: rows come back under their keys, damage and death lose rows but never falsify them, the folder stays bounded."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune.features import cache as cache_module
from finetune.features.cache import RowCache
from finetune.runtime.seconds import Seconds
from finetune.storage.store import Store

SHAPE = (3, 5)


def open_cache(root: Path, budget_bytes: int = 10**9, space: str = "space") -> RowCache:
    return RowCache(Store(root, budget_bytes), space, SHAPE, "float16")


def keys_and_rows(numbers: range) -> tuple[np.ndarray, np.ndarray]:
    """A row that can be told from its key."""
    keys = np.zeros((len(numbers), 32), np.uint8)
    keys[:, :4] = np.array(numbers, dtype="<u4").view(np.uint8).reshape(-1, 4)
    rows = np.repeat(np.array(numbers, dtype=np.float16), 15).reshape(-1, *SHAPE)
    return keys, rows


def fill(cache: RowCache, numbers: range) -> None:
    writer = cache.writer()
    writer.append(*keys_and_rows(numbers), Seconds())
    writer.flush()


def test_rows_come_back_under_their_keys_in_any_order(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    fill(cache, range(50))
    fill(cache, range(50, 70))
    keys, rows = keys_and_rows(range(70))
    order = np.random.default_rng(0).permutation(70)
    found = open_cache(tmp_path).find(keys[order])
    assert len(found.missing) == 0
    taken = found.take(np.arange(70))
    assert taken.dtype == np.float16
    np.testing.assert_array_equal(taken, rows[order])
    found.release()
    np.testing.assert_array_equal(found.take(np.arange(70)), rows[order])


def test_rows_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    fill(open_cache(tmp_path), range(5))
    shards = list(tmp_path.rglob("*.shard"))
    assert shards
    assert {path.stat().st_mode & 0o777 for path in shards} == {0o600}


def test_keys_that_are_not_stored_are_missing_and_cannot_be_taken(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    fill(cache, range(10))
    found = cache.find(keys_and_rows(range(5, 15))[0])
    np.testing.assert_array_equal(found.missing, np.arange(5, 10))
    with pytest.raises(KeyError, match="1 of 2 rows"):
        found.take(np.array([0, 7]))


def test_rows_cost_what_computing_them_took(tmp_path: Path) -> None:
    for numbers, seconds in ((range(10), Seconds(10.0, 20.0)), (range(10, 30), Seconds(60.0, 100.0))):
        writer = open_cache(tmp_path).writer()
        for part in np.array_split(numbers, 4):  # chunks of unequal sizes
            share = len(part) / len(numbers)
            writer.append(*keys_and_rows(range(part[0], part[-1] + 1)), seconds * share)
        writer.flush()

    def cost_of(numbers: range) -> tuple[float, float]:
        seconds = open_cache(tmp_path).find(keys_and_rows(numbers)[0]).seconds
        return seconds.wall, seconds.cpu

    assert cost_of(range(30)) == pytest.approx((70.0, 120.0))
    assert cost_of(range(5, 12)) == pytest.approx((5 + 2 * 3, 10 + 2 * 5))
    assert cost_of(range(25, 40)) == pytest.approx((5 * 3, 5 * 5)), "missing rows cost nothing yet"
    assert cost_of(range(30, 40)) == (0, 0)


def test_other_spaces_are_not_read(tmp_path: Path) -> None:
    fill(open_cache(tmp_path, space="one"), range(10))
    assert len(open_cache(tmp_path, space="two").find(keys_and_rows(range(10))[0]).missing) == 10


def test_rows_of_two_writers_are_both_found(tmp_path: Path) -> None:
    first, second = open_cache(tmp_path).writer(), open_cache(tmp_path).writer()
    first.append(*keys_and_rows(range(20)), Seconds())
    second.append(*keys_and_rows(range(10, 30)), Seconds())
    second.flush()
    first.flush()
    keys, rows = keys_and_rows(range(30))
    np.testing.assert_array_equal(open_cache(tmp_path).find(keys).take(np.arange(30)), rows)


def test_a_full_writer_stores_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 4 * (30 + 32))
    cache = open_cache(tmp_path)
    keys, rows = keys_and_rows(range(10))
    cache.writer().append(keys, rows, Seconds(10.0, 20.0))  # never flushed
    found = cache.find(keys)
    np.testing.assert_array_equal(found.missing, [8, 9])
    np.testing.assert_array_equal(found.take(np.arange(8)), rows[:8])
    assert (found.seconds.wall, found.seconds.cpu) == (pytest.approx(8.0), pytest.approx(16.0))


def test_a_slow_writer_stores_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_SECONDS", 0.0)
    cache = open_cache(tmp_path)
    cache.writer().append(*keys_and_rows(range(3)), Seconds())  # never flushed
    assert len(cache.find(keys_and_rows(range(3))[0]).missing) == 0


@pytest.mark.parametrize("damage", ["rows", "keys", "description", "cut short", "empty"])
def test_a_damaged_shard_is_deleted_and_its_rows_are_missing(tmp_path: Path, damage: str) -> None:
    fill(open_cache(tmp_path), range(10))
    fill(open_cache(tmp_path), range(10, 20))
    shard = next(iter((tmp_path / "features" / "space").glob("*.shard")))
    data = bytearray(shard.read_bytes())
    place = {"rows": 100, "keys": 10 * 30 + 40, "description": 10 * 30 + 10 * 32 + 5}.get(damage)
    if place is not None:
        data[place] ^= 0x55
    shard.write_bytes(b"" if damage == "empty" else bytes(data[:-30]) if damage == "cut short" else bytes(data))
    keys, rows = keys_and_rows(range(20))
    found = open_cache(tmp_path).find(keys)
    assert len(found.missing) == 10
    there = np.flatnonzero(found.shard_of >= 0)
    np.testing.assert_array_equal(found.take(there), rows[there])
    assert not shard.exists()


def test_every_way_to_cut_a_shard_short_is_noticed(tmp_path: Path) -> None:
    fill(open_cache(tmp_path), range(4))
    (shard,) = (tmp_path / "features" / "space").glob("*.shard")
    whole = shard.read_bytes()
    for length in range(len(whole)):
        shard.write_bytes(whole[:length])
        assert len(open_cache(tmp_path).find(keys_and_rows(range(4))[0]).missing) == 4
    shard.write_bytes(whole)
    assert len(open_cache(tmp_path).find(keys_and_rows(range(4))[0]).missing) == 0


ENDLESS_WRITER = """
import signal
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_features_cache import fill, open_cache
for first in range(0, 30_000, 100):
    fill(open_cache(Path({root!r})), range(first, first + 100))
    print(first, flush=True)
signal.pause()
"""


def test_a_killed_process_leaves_only_whole_rows(tmp_path: Path) -> None:
    program = ENDLESS_WRITER.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        finished = [int(writer.stdout.readline()) for _ in range(3)]
        writer.send_signal(signal.SIGKILL)
        finished += [int(line) for line in writer.stdout]
    assert writer.returncode == -signal.SIGKILL
    keys, rows = keys_and_rows(range(finished[-1] + 300))
    found = open_cache(tmp_path).find(keys)
    there = np.flatnonzero(found.shard_of >= 0)
    assert finished[-1] + 100 <= len(there) <= finished[-1] + 200, "what was told is stored, and perhaps the next"
    np.testing.assert_array_equal(found.take(there), rows[there])


def test_rows_stay_readable_after_another_process_made_room(tmp_path: Path) -> None:
    fill(open_cache(tmp_path), range(10))
    keys, rows = keys_and_rows(range(10))
    found = open_cache(tmp_path).find(keys)
    for shard in tmp_path.rglob("*.shard"):
        shard.unlink()
    np.testing.assert_array_equal(found.take(np.arange(10)), rows)


def test_rows_of_the_wrong_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        open_cache(tmp_path).writer().append(np.zeros((2, 32), np.uint8), np.zeros((2, 4), np.float16), Seconds())
