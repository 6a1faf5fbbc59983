"""The embedded model as one side of a comparison, and pages in processes of their own."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest

import llava_fa
from llava_fa.web.side import load_side

LIMITS = ("--max-image", "50000", "--max-pixels", "40000", "--max-tokens", "60")


WATCHED = """
import sys

def watch(event, arguments):
    if event == "socket.connect":
        place = arguments[1]
    elif event == "socket.getaddrinfo":
        place = arguments[0]
    else:
        return
    host = place[0] if isinstance(place, tuple) else place
    if host not in ("127.0.0.1", "::1", "localhost", None):
        sys.stderr.write(f"connects to {host}\\n")

sys.addaudithook(watch)
from llava_fa.cli.main import app
app()
"""
"""`llava-fa` that says when it talks to another machine."""


@pytest.fixture(scope="session")
def tiny():
    return load_side("tiny", "cpu")


@pytest.fixture(scope="session")
def two_bits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "two"
    llava_fa.compress("tiny", folder, llava_fa.FourierConfig(bits=2))
    return folder


@pytest.fixture(scope="session")
def open_page(tmp_path_factory):
    """Opens `llava-fa compare` with its arguments; gives the address. At the end each is stopped, and looked at."""
    opened, signals = [], itertools.cycle([signal.SIGTERM, signal.SIGINT])
    temporary = tmp_path_factory.mktemp("temporary")

    def start(*arguments):
        line = [sys.executable, "-c", WATCHED, "compare", *map(str, arguments), "--port", "0", "--json"]
        given = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)
        opened.append(process)
        said = ""
        for text in process.stdout:
            said += text
            if text == "}\n":
                return json.loads(said)["url"]
        raise AssertionError(process.stderr.read())

    yield start
    assert len(list(temporary.glob("llava-fa-*"))) == len(opened)
    for process, kind in zip(opened, signals, strict=False):
        process.send_signal(kind)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in errors, errors
        assert errors.rstrip().endswith("stopped")
        assert "connects to" not in errors
    assert not list(temporary.glob("llava-fa-*"))  # what visitors gave is gone


@pytest.fixture(scope="session")
def page(open_page, two_bits):
    return open_page("tiny", two_bits, *LIMITS)
