"""For tests only: a Python process that finds this folder on its PYTHONPATH kills itself at the point that CRASH_AT names.

CRASH_AT is ``before`` or ``after``, a call (``replace``, ``rename``, ``fsync``, ``unlink``, ``commit``), and a pattern for the
name of the file that the call makes, flushes, removes or, for ``commit``, of the SQLite database; perhaps a number: the how
many-th such call. ``before replace outcome.json``, ``after commit jobs.db 3``. CRASH_MARK is a file that is made just before the
kill; where it exists nothing happens any more, so that the next attempt lives. The product knows nothing of this.
"""

import fnmatch
import itertools
import os
import re
import signal
import sqlite3
import sqlite3.dbapi2
from pathlib import Path

_seen = itertools.count(1)  # over all connections to the database, for `commit`


def _kill_here() -> None:
    try:
        os.close(os.open(os.environ["CRASH_MARK"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _meant_for(path: object) -> str:
    """The name that a temporary file will get."""
    name = Path(os.fsdecode(path)).name
    temporary = re.fullmatch(r"\.(.+)\.[0-9a-z_]+\.tmp", name)
    return temporary[1] if temporary else name


def _wrap(call, name_of, when, pattern, number):
    def wrapped(*arguments, **named):
        here = fnmatch.fnmatch(name_of(*arguments), pattern) and not os.path.exists(os.environ["CRASH_MARK"])
        crash = here and next(_seen) == number
        if crash and when == "before":
            _kill_here()
        result = call(*arguments, **named)
        if crash:
            _kill_here()
        return result

    return wrapped


def _crash_at_commits(when, pattern, number):
    connect = sqlite3.connect

    class Crashing(sqlite3.Connection):
        def __init__(self, database, *arguments, **named):
            super().__init__(database, *arguments, **named)
            self.commit = _wrap(super().commit, lambda: Path(database).name, when, pattern, number)

    def connecting(database, **named):
        return connect(database, **{**named, "factory": Crashing})

    sqlite3.connect = sqlite3.dbapi2.connect = connecting


if point := os.environ.get("CRASH_AT"):
    _when, _call, _pattern, *_number = point.split(" ")
    _nth = int(_number[0]) if _number else 1
    if _call == "commit":
        _crash_at_commits(_when, _pattern, _nth)
    else:
        _names = {
            "replace": lambda source, target: Path(target).name,
            "rename": lambda source, target: Path(target).name,
            "unlink": lambda path, **_: Path(path).name,
            "fsync": lambda descriptor: _meant_for(os.readlink(f"/proc/self/fd/{descriptor}")),
        }
        setattr(os, _call, _wrap(getattr(os, _call), _names[_call], _when, _pattern, _nth))
