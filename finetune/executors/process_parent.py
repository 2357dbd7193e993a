"""``python -m finetune.executors.process_parent PARENT_PID COMMAND…``: execute COMMAND so that it is killed when its parent ends.

This is a program of its own because code that runs between fork and exec (`preexec_fn`) may deadlock in a process with threads.
The kernel sends the signal when the *thread* that forked ends, so parents start children from their main thread. This works on
Linux only; elsewhere a process whose worker has ended stops when its lease file expires.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Have the kernel send the signal `number` to this process when its parent ends for any reason.

    Raises:
        OSError: the kernel refuses.
    """
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def main() -> None:
    """Execute the command in the arguments, unless the parent has ended already."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    signal_when_parent_dies(signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call above, so the signal would never be sent
        sys.exit(os.EX_TEMPFAIL)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
