"""Damaged tables, annotations and saved datasets: samples, or an error of ours that says what is wrong, never anything else."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from formats import FORMATS, Contents

from finetune.data.check import check_images
from finetune.data.index import index_dataset
from finetune.errors import FinetuneError

CONTENTS: Contents = {None: {"007": 3, "naïve, cat": 3, "null": 3}}
IMAGES = {".png", ".jpg", ".jpeg"}
LONGEST_CPU_SECONDS = 60.0  # far beyond what any of them takes
SNIPPETS = (
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b'"', b"'", b",,", b"\t", b"{", b"}", b"[[", b"null", b"NaN", b"-1"),
    *(b"../../etc/passwd", b"/dev/zero", b"C:\\x", b"\xc3\x28", b"9" * 400, b"\n" * 40, b"file_name", b"label", b"\\ud800"),
    b"1e999",
)


def mutated(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Bytes changed, cut, doubled, moved, taken from another table, or what tables fear put in."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 12])):
        at = rng.randrange(len(damaged)) if damaged else 0
        match rng.randrange(8):
            case 0:
                damaged[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del damaged[at : at + rng.choice([1, 8, 60])]
            case 2:
                damaged[at:at] = damaged[at : at + rng.choice([1, 20, 300])]
            case 3:
                del damaged[at:]
            case 4:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                damaged[at:at] = other[start : start + rng.choice([4, 80, 600])]
            case _:
                damaged[at:at] = rng.choice(SNIPPETS)
    return bytes(damaged)


def attack(root: Path, count: int, seed: int) -> tuple[Counter[str], Counter[str]]:
    """Damage one file of one format at a time and read it as training would; return outcomes, and how often each format came."""
    rng = random.Random(seed)
    targets: list[tuple[str, Path, Path, bytes]] = []
    for name, form in FORMATS.items():
        place = form.write(root / name.replace(",", "") / "data", CONTENTS)
        folder = place if place.is_dir() else place.parent
        targets += [(name, place, file, file.read_bytes()) for file in sorted(folder.rglob("*")) if _is_table(file)]
    outcomes, seen = Counter[str](), Counter[str]()
    everything = [data for *_, data in targets]
    for number in range(count):
        name, place, file, whole = targets[number % len(targets)]
        file.write_bytes(mutated(whole, rng, everything))
        began = time.process_time()
        try:
            dataset = check_images(index_dataset(place), max_bad_fraction=1.0)
        except FinetuneError as error:
            outcomes[error.code if error.message.strip() else "nothing said"] += 1
        else:
            assert all(0 <= label < len(dataset.classes) for sample in dataset.samples for label in sample.labels)
            outcomes["read"] += 1
        finally:
            file.write_bytes(whole)
        assert time.process_time() - began < LONGEST_CPU_SECONDS, f"{name}: {file.name}"
        seen[name] += 1
    return outcomes, seen


def _is_table(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() not in IMAGES and path.stat().st_size > 0


def test_a_damaged_table_is_read_or_refused(tmp_path: Path) -> None:
    outcomes, seen = attack(tmp_path, 150, seed=1)
    assert outcomes.total() == 150
    assert not outcomes["nothing said"]
    assert len(seen) >= 12, "every format that has a table"
    assert min(outcomes["read"], outcomes["invalid_data"]) > 15, outcomes


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_damaged_tables_are_read_or_refused(tmp_path: Path) -> None:
    outcomes, seen = attack(tmp_path, 5_000, seed=2)
    assert outcomes.total() == 5_000
    assert min(seen.values()) >= 100
