"""Errors that mean that there was not enough memory are recognised, whichever library raises them."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import ExportError, OutOfMemory
from finetune.runtime.memory import available_memory, memory_errors_named, ran_out_of_memory

THREADED = """
import threading
from finetune.runtime.allocator import return_free_memory, limit_free_memory

def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])

def work():
    blocks = [bytearray(50_000) for _ in range(400)]  # too small to be mapped one by one
    kept.append(blocks[-1])  # keeps the end of the arena

limit_free_memory(2)
kept = []
for _ in range(8):
    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
before = resident()
return_free_memory()
print(before, resident())
"""

LARGE_BLOCKS = """
import sys
from finetune.runtime.allocator import limit_free_memory

def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])

if sys.argv[1] == "limited":
    limit_free_memory(2)
before, kept = resident(), []
for _ in range(3):
    blocks = [bytearray(b"1") * (2 << 20) for _ in range(20)]
    kept.append(bytearray(b"1") * 40_000)  # after them, so that the heap cannot shrink
    del blocks
print(resident() - before)
"""

LIMITED = """
import sys
from finetune.runtime.memory import limit_memory, memory_errors_named
import numpy, onnxruntime, torch
limit_memory(1 << 30)
for allocate in (lambda: torch.ones(1 << 29), lambda: numpy.ones(1 << 28), lambda: bytearray(2 << 30)):
    try:
        with memory_errors_named("too large"):
            allocate()
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.longer
def test_what_a_limited_process_cannot_allocate_is_named() -> None:
    ran = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True, timeout=240)
    assert ran.stdout.splitlines() == ["OutOfMemory too large"] * 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has a size from which on blocks are mapped")
def test_large_blocks_are_returned_when_they_are_freed() -> None:
    def grown_kib(*arguments: str) -> int:
        command = [sys.executable, "-c", LARGE_BLOCKS, *arguments]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout)

    assert grown_kib("limited") < 10_000 < 20_000 < grown_kib("as glibc does")


@pytest.mark.longer
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
def test_memory_that_threads_have_freed_is_returned() -> None:
    ran = subprocess.run([sys.executable, "-c", THREADED], capture_output=True, text=True, check=True, timeout=240)
    before, after = map(int, ran.stdout.split())
    assert after < before


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to …"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 1"), True),
        (RuntimeError("shapes do not fit"), False),
        (KeyError("memory"), False),
    ],
)
def test_an_error_is_recognised_also_as_the_cause_of_another(error: Exception, is_memory: bool) -> None:
    assert ran_out_of_memory(error) == is_memory
    wrapped = ExportError("the graph is refused")
    wrapped.__cause__ = error
    with pytest.raises(OutOfMemory if is_memory else ExportError), memory_errors_named("not enough"):
        raise wrapped


def test_a_containers_limit_counts_where_there_is_one(tmp_path: Path) -> None:
    quota = tmp_path / "memory.max"
    whole = available_memory(quota)
    for text, expected in (("max", whole), ("1048576", 1 << 20), (str(whole * 2), whole)):
        quota.write_text(f"{text}\n")
        assert available_memory(quota) == expected
