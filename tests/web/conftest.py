"""The embedded model as one side of a comparison, and pages in processes of their own."""

import json
import os
import signal
import subprocess
import sys

import pytest

import llava_fa
from llava_fa.web.side import load_side

LIMITS = ("--max-image", "50000", "--max-pixels", "40000", "--max-tokens", "60")


@pytest.fixture(scope="session")
def tiny():
    return load_side("tiny", "cpu")


@pytest.fixture(scope="session")
def two_bits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "two"
    llava_fa.compress("tiny", folder, llava_fa.FourierConfig(bits=2))
    return folder


@pytest.fixture(scope="session")
def open_page():
    """Opens `llava-fa compare` with its arguments; gives the address."""
    opened = []

    def start(*arguments):
        line = [sys.executable, "-m", "llava_fa.cli.main", "compare", *map(str, arguments), "--port", "0", "--json"]
        given = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)
        opened.append(process)
        said = ""
        for text in process.stdout:
            said += text
            if text == "}\n":
                return json.loads(said)["url"]
        raise AssertionError(process.stderr.read())

    yield start
    for process in opened:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in errors, errors
        assert errors.rstrip().endswith("stopped")


@pytest.fixture(scope="session")
def page(open_page, two_bits):
    return open_page("tiny", two_bits, *LIMITS)
