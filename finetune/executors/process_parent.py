"""``python -m finetune.executors.process_parent PARENT_PID COMMAND…``: become COMMAND, and die when the parent dies.

A separate step before exec, because code between fork and exec in a process with threads may deadlock. The kernel sends the
signal when the *thread* that forked ends, so parents start children from their main thread. Linux only: elsewhere the lease file
alone ends a process whose worker is gone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Have the kernel send this process `number` when its parent ends, however that ends."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    signal_when_parent_dies(signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call above: nobody would send the signal
        sys.exit(os.EX_TEMPFAIL)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
