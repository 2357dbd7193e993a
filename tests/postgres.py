"""A PostgreSQL server of the tests' own: a fresh cluster in a temporary folder, on a socket in that folder, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class PostgresMissing(Exception):
    """Why no server can be started here."""


@contextmanager
def running_postgres() -> Iterator[str]:
    """Yield the URL of an empty database.

    Raises:
        PostgresMissing: PostgreSQL is not installed, or there is no user that it may run as.
    """
    binaries = _binaries()
    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="finetune-postgres-"))
    try:
        if account:
            os.chown(folder, pwd.getpwnam(account).pw_uid, -1)
        run = {"user": account, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        cluster = folder / "cluster"
        _call([binaries / "initdb", "-D", cluster, "-U", "tests", "-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C"], run)
        options = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=200"
        _call([binaries / "pg_ctl", "start", "-w", "-D", cluster, "-l", folder / "log", "-o", options], run)
        try:
            yield f"postgresql://tests@/postgres?host={folder}"
        finally:
            _call([binaries / "pg_ctl", "stop", "-w", "-m", "immediate", "-D", cluster], run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _call(command: list[str | Path], run: dict[str, Any]) -> None:
    subprocess.run([str(part) for part in command], check=True, **run)


def _binaries() -> Path:
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = installed[-1] if installed else shutil.which("initdb")
    if not found:
        raise PostgresMissing("needs PostgreSQL: apt-get install postgresql")
    return Path(found).parent


def _account() -> str | None:
    """The user to run as: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    if "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
        raise PostgresMissing("needs a user named postgres, because PostgreSQL does not run as root")
    return "postgres"
