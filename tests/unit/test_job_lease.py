"""The lease file, from both of its sides."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from finetune.jobs.clock import LeaseTime, machine_time
from finetune.jobs.lease import LEASE_VARIABLE, read_lease, write_lease

WATCHER = """
    import signal, sys, time
    from finetune.jobs.lease import watch_lease_from_environment
    {before}
    try:
        watch_lease_from_environment()
        time.sleep(60)
    except KeyboardInterrupt:
        sys.stdout.write("writes its checkpoint")
        sys.exit(7)
    sys.exit("nobody stopped it")
"""
ASKS_NICELY = "signal.signal(signal.SIGTERM, signal.default_int_handler)"
BOOT = "0b3b1c5e-3a5e-4c39-9a39-6f9b3c1d2e4f"  # of another machine
WARNED_AT_ONCE = "import finetune.jobs.lease as watched; watched.WARNING_FRACTION = 1e-6"  # long before the lease ends
IS_DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def ago(seconds: float) -> LeaseTime:
    return LeaseTime(machine_time().seconds - seconds, machine_time().epoch)


def watch(lease: Path | None, before: str = ASKS_NICELY, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, LEASE_VARIABLE: str(lease) if lease else ""}
    script = textwrap.dedent(WATCHER.replace("{before}", before)).replace("time.sleep(60)", f"time.sleep({seconds})")
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_a_lease_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_lease(tmp_path / "lease", LeaseTime(1000.0, BOOT), 30.0)
    assert read_lease(tmp_path / "lease") == (1000.0, 30.0, BOOT)
    write_lease(tmp_path / "lease", LeaseTime(1_000_005.25, BOOT), 30.0)
    assert read_lease(tmp_path / "lease") == (1_000_005.25, 30.0, BOOT)


def test_a_process_whose_lease_was_withdrawn_ends(tmp_path: Path) -> None:
    assert watch(tmp_path / "lease", before=IS_DEAF).returncode == 130


def test_on_another_machine_a_lease_counts_from_when_it_was_seen(tmp_path: Path) -> None:
    write_lease(tmp_path / "lease", LeaseTime(machine_time().seconds - 10_000, BOOT), 3000.0)
    stopped = watch(tmp_path / "lease", before=f"{ASKS_NICELY}; {WARNED_AT_ONCE}")
    assert (stopped.returncode, stopped.stdout) == (7, "writes its checkpoint")
    write_lease(tmp_path / "lease", LeaseTime(machine_time().seconds + 10_000, BOOT), 0.3)
    assert watch(tmp_path / "lease", before=IS_DEAF).returncode == 130


def test_a_lease_is_renewed_in_place_also_on_a_full_disk(tmp_path: Path) -> None:
    lease = tmp_path / "lease"
    write_lease(lease, LeaseTime(1000.0, BOOT), 30.0)
    inode, size = lease.stat().st_ino, lease.stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        write_lease(lease, LeaseTime(2_000_000.0, BOOT), 30.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (lease.stat().st_ino, lease.stat().st_size) == (inode, size)
    assert read_lease(lease) == (2_000_000.0, 30.0, BOOT)


def test_a_process_whose_lease_is_running_out_is_asked_to_stop(tmp_path: Path) -> None:
    write_lease(tmp_path / "lease", ago(2500.0), 3000.0)
    stopped = watch(tmp_path / "lease")
    assert (stopped.returncode, stopped.stdout) == (7, "writes its checkpoint")


def test_a_process_that_does_not_stop_ends_with_its_lease(tmp_path: Path) -> None:
    write_lease(tmp_path / "lease", ago(29.0), 30.0)
    assert watch(tmp_path / "lease", before=IS_DEAF).returncode == 130


def test_a_process_without_a_lease_is_left_alone() -> None:
    assert watch(None, seconds=0.0).stderr.strip() == "nobody stopped it"
