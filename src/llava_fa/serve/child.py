"""A server in a process of its own that ends with this one, and whose last words are kept."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

from llava_fa.errors import FourierError

CLOSING_SECONDS = 20.0
"""Between SIGTERM and SIGKILL."""
_POLL_SECONDS = 0.2
_KEPT, _TOLD = 400, 8
"""Lines of the log that are kept, and how many of them an error repeats."""
_CAUSE = re.compile(r"(?:^|[\])]\s+|ERROR:?\s+)((?:\w+\.)*\w*(?:Error|Exception): \S.*)")
"""The line of a traceback that names the exception, after whatever a logger puts before it."""


class Child:
    """A running command; its output goes to ``log``."""

    def __init__(self, name: str, command: Sequence[str], log: TextIO, environment: Mapping[str, str]) -> None:
        self.name = name
        self._lines: deque[str] = deque(maxlen=_KEPT)
        leashed = [sys.executable, "-m", "llava_fa.serve.leash", str(os.getpid()), *command]
        # A session of its own: Ctrl-C is for us, who let requests under way end first.
        self._process = subprocess.Popen(
            leashed,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=dict(environment),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return once it is ready, however long that takes.

        Raises:
            FourierError: it has ended instead; with what its log says of the cause.
        """
        while not ready():
            if not self.alive():
                self._reader.join(_POLL_SECONDS * 5)
                what = f"{self.name} ended while it started (exit code {self._process.returncode})"
                raise FourierError(f"{what}: {self._cause()}", remedy="Its whole log is above")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """End it and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._reader.join(_POLL_SECONDS * 5)

    def _read(self, log: TextIO) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.append(line.rstrip())
                with contextlib.suppress(OSError, ValueError):  # a log that is closed is no reason to stop reading
                    log.write(line)
                    log.flush()

    def _cause(self) -> str:
        """The errors that its log names, or else its last lines."""
        lines = [line for line in self._lines if line.strip()]
        causes = list(dict.fromkeys(match[1] for line in lines if (match := _CAUSE.search(line))))
        return " / ".join(causes[:_TOLD] or lines[-_TOLD:]).rstrip(".") or "it said nothing"


@contextlib.contextmanager
def running(name: str, command: Sequence[str], log: TextIO, environment: Mapping[str, str]) -> Iterator[Child]:
    """A child that is ended with the context.

    Args:
        name: of the server, for errors.
        command: program, as a path, and arguments.
        log: where its output goes, line by line.
        environment: its environment variables.
    """
    child = Child(name, command, log, environment)
    try:
        yield child
    finally:
        child.stop()
