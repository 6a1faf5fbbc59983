"""A benchmark's questions over a cluster of Ray: the run's folder is that of one process."""

import itertools
import json
from pathlib import Path

import pytest

from llava_fa import FourierError
from llava_fa.eval.answerers import Loaded
from llava_fa.eval.benchmarks import benchmark
from llava_fa.eval.benchmarks.run import run
from llava_fa.hub.loading import load

pytest.importorskip("ray")
from llava_fa.cluster.answers import Readers
from llava_fa.cluster.connect import connected

QUESTIONS = 60


def asked(out, answerer, progress=lambda done, total: None):
    """A run of the world, eight chunks of questions."""
    questions = benchmark("world", Path(), limit=QUESTIONS, seed=0)
    run(questions, lambda: answerer, model="tiny", out=out, batch_size=2, progress=progress)
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of one process's run."""
    return asked(tmp_path_factory.mktemp("eval") / "alone", Loaded(*load("tiny", "cpu")))


def assert_same(out, alone):
    for name in ("predictions.jsonl", "answers.json", "run.json"):
        assert (out / name).read_bytes() == (alone / name).read_bytes()
    mine, theirs = (json.loads((folder / "results.json").read_text()) for folder in (out, alone))
    assert mine["score"] == theirs["score"]


@pytest.mark.parametrize("cpus", [(1,), (1, 1)])
def test_the_answers_are_the_same(nodes, alone, tmp_path, cpus):
    nodes.have(*cpus)
    with connected(nodes.address):
        out = asked(tmp_path / "ray", Readers("tiny", "cpu", None, False, None))
    assert_same(out, alone)


def test_a_node_is_killed(nodes, alone, tmp_path):
    nodes.have(1, 1)
    kill = itertools.chain([nodes.kill], itertools.repeat(lambda: None))

    def progress(done, total):
        if done:
            next(kill)()

    with connected(nodes.address):
        out = asked(tmp_path / "ray", Readers("tiny", "cpu", None, False, None), progress)
    assert_same(out, alone)


def test_a_killed_run_goes_on_where_it_was(nodes, alone, tmp_path):
    nodes.have(1)

    def stop(done, total):
        if done >= 16:
            raise KeyboardInterrupt

    with connected(nodes.address):
        with pytest.raises(KeyboardInterrupt):
            asked(tmp_path / "ray", Readers("tiny", "cpu", None, False, None), stop)
        before = (tmp_path / "ray" / "predictions.jsonl").read_bytes()
        out = asked(tmp_path / "ray", Readers("tiny", "cpu", None, False, None))
    assert (out / "predictions.jsonl").read_bytes().startswith(before)
    assert before
    assert_same(out, alone)


def test_a_model_that_cannot_be_loaded_is_said(nodes, tmp_path):
    nodes.have(1)
    with connected(nodes.address):
        readers = Readers("tiny", "cuda:9", None, False, 0.0)
        with pytest.raises(FourierError, match=r"worker 1 on .*"):
            asked(tmp_path / "ray", readers)
