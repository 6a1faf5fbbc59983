"""`python -m llava_fa.serve.leash PARENT COMMAND…`: becomes the command, and ends when the process PARENT does.

A program of its own, because what must happen between fork and exec is not safe in a process that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Ask Linux for SIGTERM when the parent dies, however it dies; elsewhere the child outlives a parent's SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before this was asked for
            raise SystemExit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
