"""For tests only: a Python process that finds this folder on its PYTHONPATH kills itself at the point that CRASH_AT names.

CRASH_AT is ``before`` or ``after``, a call, and a pattern for the name of the file that it concerns: the file that ``replace`` or
``rename`` puts in place, that ``fsync`` flushes or ``unlink`` removes, or the SQLite database of a ``commit``. Conditions may
follow, and all must hold:

    in NAME       a function of that name is running in this thread; a method is named with its class
    with REGEX    the file that is put in place or flushed holds text that matches
    once GLOB     a path that matches is there, below the folder of CRASH_MARK

``before replace outcome.json``, ``after commit jobs.db in JobStore.claim``, ``before replace progress.json with exporting``. A
point says what the process is doing, never how many times it has done it: counts depend on timing. The first time that a point is
reached, the file CRASH_MARK is made and the process killed; where that file exists nothing happens, so that the next attempt
lives. CRASH_SIGNAL may name another signal than SIGKILL: with SIGSTOP the process stops there until it is told to go on. The
product knows nothing of this.
"""

import fnmatch
import os
import re
import signal
import sqlite3
import sqlite3.dbapi2
import sys
from pathlib import Path


def _end_here():
    try:
        os.close(os.open(os.environ["CRASH_MARK"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.Signals[os.environ.get("CRASH_SIGNAL", "SIGKILL")])


def _target_name(path):
    """The name of a file, or the one that a temporary file will get."""
    name = Path(os.fsdecode(path)).name
    temporary = re.fullmatch(r"\.(.+)\.[0-9a-z_]+\.tmp", name)
    return temporary[1] if temporary else name


def _running(function):
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_qualname == function:
            return True
        frame = frame.f_back
    return False


def _holds(content, conditions):
    """Whether every condition of the point is met; `content` is the path of what is put in place or flushed, if there is one."""
    home = Path(os.environ["CRASH_MARK"]).parent
    for kind, wanted in conditions:
        if kind == "in" and not _running(wanted):
            return False
        if kind == "with" and not re.search(wanted, Path(content).read_text(errors="replace")):
            return False
        if kind == "once" and not any(home.glob(wanted)):
            return False
    return True


def _wrap(call, name_of, content_of, when, pattern, conditions):
    def wrapped(*arguments, **named):
        matches = fnmatch.fnmatch(name_of(*arguments), pattern) and not os.path.exists(os.environ["CRASH_MARK"])
        crash = matches and _holds(content_of(*arguments), conditions)
        if crash and when == "before":
            _end_here()
        result = call(*arguments, **named)
        if crash:
            _end_here()
        return result

    return wrapped


def _crash_at_commits(when, pattern, conditions):
    connect = sqlite3.connect

    class Crashing(sqlite3.Connection):
        def __init__(self, database, *arguments, **named):
            super().__init__(database, *arguments, **named)
            self.commit = _wrap(super().commit, lambda: Path(database).name, lambda: None, when, pattern, conditions)

    def connecting(database, **named):
        return connect(database, **{**named, "factory": Crashing})

    sqlite3.connect = sqlite3.dbapi2.connect = connecting


def _open_file(descriptor):
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _install(point):
    when, call, pattern, *rest = point.split(" ")
    conditions = list(zip(rest[::2], rest[1::2], strict=True))
    unknown = {kind for kind, _ in conditions} - {"in", "with", "once"}
    if when not in ("before", "after") or unknown:
        raise ValueError(f"CRASH_AT={point!r} cannot be read")
    if call == "commit":
        _crash_at_commits(when, pattern, conditions)
        return
    name_of, content_of = {
        "replace": (lambda source, target: Path(target).name, lambda source, target: source),
        "rename": (lambda source, target: Path(target).name, lambda source, target: source),
        "unlink": (lambda path, **_: Path(path).name, lambda path, **_: path),
        "fsync": (lambda descriptor: _target_name(_open_file(descriptor)), _open_file),
    }[call]
    setattr(os, call, _wrap(getattr(os, call), name_of, content_of, when, pattern, conditions))


if "CRASH_AT" in os.environ:
    _install(os.environ["CRASH_AT"])
