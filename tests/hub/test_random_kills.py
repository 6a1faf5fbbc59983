"""Killed at random moments, over and over, a compression ends with the bytes of a run that nobody disturbed."""

import os
import random
import signal
import sys
import time

import pytest
import torch

import llava_fa
from llava_fa import Budget, FourierConfig

KILLS = 34
"""Of each kind of run."""
CONFIG = FourierConfig(bits=2, refine_passes=0)
KINDS = {
    "without data": {"config": CONFIG},
    "on samples": {"config": CONFIG, "embeddings": 4},
    "under a budget": {"config": CONFIG.replace(bits=4), "budget": Budget(bits=3.3)},
}


def _start(checkpoint, out, samples, kind):
    """A child process that compresses; its id."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(torch.get_num_threads())  # a fork leaves torch's thread pool to be made anew
    try:
        _compress(checkpoint, out, samples, kind)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _compress(checkpoint, out, samples, kind):
    llava_fa.compress(checkpoint, out, calibration=None if kind == "without data" else samples, **KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("without data", 2),
        ("on samples", 2),
        *(pytest.param(kind, KILLS, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]) for kind in KINDS),
    ],
)
def test_random_kills(checkpoint, samples, tmp_path, digest, kind, kills):
    began = time.monotonic()
    _compress(checkpoint, tmp_path / "undisturbed", samples, kind)
    whole = time.monotonic() - began
    expected = digest(tmp_path / "undisturbed")
    random_, killed, finished, resumed = random.Random(kind), 0, 0, 0
    out = tmp_path / "out"
    while killed < kills or not finished:
        partial = (tmp_path / "out.partial").exists()
        child = _start(checkpoint, out, samples, kind)
        # long enough to end now and then; a run that only takes up where others were ends sooner
        time.sleep(random_.uniform(0, 1.0 if killed < kills else 30.0) * whole)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), "the run failed"
        killed += status == signal.SIGKILL
        resumed += partial
        if out.exists():  # the last step gives it its name: it is whole
            finished += 1
            assert digest(out) == expected
            for path in sorted(out.rglob("*"), reverse=True):
                path.unlink()
            out.rmdir()
    print(f"\n{kind}: {killed} kills, {resumed} runs that went on, {finished} finished, all with the same bytes")
