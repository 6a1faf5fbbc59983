"""`llava-fa serve --engine vllm` with vLLM itself: one server for all tests, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import helpers
import psutil
import pytest
import torch

pytest.importorskip("httpx", reason="needs the extra [vllm]: pip install 'llava-fa[vllm]'")

import httpx
from safetensors.torch import load_file, save_file

from llava_fa.eval.answerers import Loaded
from llava_fa.eval.endpoint import Endpoint, connect, parts
from llava_fa.hub.loading import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ARGUMENTS = ("--dtype=float32", "--enforce-eager", "--max-model-len=256")
ENDLESS = {"logit_bias": {"0": -100}}
NOT_WHOLE = "\ufffd"
"""Bytes of a character that the end of an answer has cut: vLLM leaves them out."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random LLaVA with heads wide enough for vLLM's attention, under the names of published checkpoints."""
    folder = helpers.save_llava(tmp_path_factory.mktemp("vllm") / "llava", model=helpers.random_llava(hidden=128))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    old = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    save_file(old, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def temporary():
    """A folder for temporary ones, which a server that is killed leaves behind; pytest's are too deep for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.fixture(scope="module")
def server(model, temporary):
    """(The process, the URL.)"""
    line = [sys.executable, "-m", "llava_fa.cli.main", "serve", str(model), "--port", "0", "--json", "--max-tokens=60"]
    line += [f"--engine-arg={argument}" for argument in ARGUMENTS]
    given = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TMPDIR": temporary}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=given)
    said = ""
    while not said.endswith("}\n"):
        said += process.stdout.readline()
        assert process.poll() is None, said
    told = json.loads(said)
    assert told["engine"] == "vllm"
    yield process, told["url"]
    process.kill()
    process.wait(30)
    process.stdout.close()


def asked(server, text="What is it?", **more):
    messages = [{"role": "user", "content": text}]
    body = {"model": "llava", "messages": messages, "max_tokens": 8, **more}
    return httpx.post(f"{server[1]}/chat/completions", json=body, timeout=120)


def choices(server, **more):
    reply = asked(server, **more)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


def metric(server, name):
    lines = httpx.get(server[1].replace("/v1", "/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_answers_are_those_of_the_model_here(server, model):
    questions = [(helpers.picture(i), f"What is number {i}?") for i in range(20)]
    questions += [((), "Nothing to see?"), ([helpers.picture(1), helpers.picture(2)], "a <image> b <image> c")]
    options = {"max_new_tokens": 24, "progress": lambda done, total: None}
    here = Loaded(*load(model, "cpu", torch.float32)).answer(questions, batch_size=1, **options)
    with connect(server[1]) as client:
        there = Endpoint(client).answer(questions, batch_size=8, **options)
    assert [row["answer"].rstrip(NOT_WHOLE) for row in there] == [row["answer"].rstrip(NOT_WHOLE) for row in here]
    assert len({row["answer"] for row in there}) > 10


def test_streams_are_the_whole_answer_with_its_usage(server):
    content = parts([helpers.picture()], "What is it?")
    whole = choices(server, text=content, max_tokens=30)[0]["message"]["content"]
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 30}
    events = [line[6:] for line in asked(server, content, **options).text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks[:-1]) == whole
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 30)
    assert not any("usage" in chunk for chunk in chunks[:-1])


def test_what_vllm_does_more(server):
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer", "enum": [7]}}}
    (forced,) = choices(server, response_format=wanted)
    assert (forced["message"]["content"].strip(), forced["finish_reason"]) == ("7", "stop")
    (logprobs,) = choices(server, logprobs=True, top_logprobs=3, max_tokens=1)
    assert len(logprobs["logprobs"]["content"][0]["top_logprobs"]) == 3
    drawn = choices(server, n=3, temperature=1.5, seed=1)
    assert len({choice["message"]["content"] for choice in drawn}) > 1
    assert drawn == choices(server, n=3, temperature=1.5, seed=1)


def test_limits_and_errors(server):
    reply = asked(server, max_tokens=10**6, **ENDLESS)
    assert (reply.json()["usage"]["completion_tokens"], reply.json()["choices"][0]["finish_reason"]) == (60, "length")
    assert asked(server, **{**ENDLESS, "max_tokens": None}).json()["usage"]["completion_tokens"] == 60
    error = asked(server, "red " * 400).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    broken = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}
    assert asked(server, response_format=broken).json()["error"]["type"] == "invalid_request_error"
    assert asked(server, n=2).json()["error"]["type"] == "invalid_request_error"  # greedy
    assert asked(server).status_code == 200


def test_a_client_that_leaves_ends_its_request(server):
    left, written = 'llava_fa_requests_total{status="disconnected"}', 'llava_fa_tokens_total{kind="completion"}'
    before = metric(server, left), metric(server, written)
    body = {"model": "llava", "messages": [{"role": "user", "content": "?"}], "stream": True, **ENDLESS}
    with httpx.stream("POST", f"{server[1]}/chat/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        for _ in range(6):
            next(lines)
    end = time.monotonic() + 20
    while metric(server, left) == before[0] and time.monotonic() < end:
        time.sleep(0.1)
    assert metric(server, left) == before[0] + 1
    assert 0 < metric(server, written) - before[1] < 60


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_nothing_of_it_is_left_when_the_server_is_killed(server):
    below = psutil.Process(server[0].pid).children(recursive=True)
    assert len(below) >= 2  # vLLM's server and its engine
    server[0].send_signal(signal.SIGKILL)
    server[0].wait(30)
    _, alive = psutil.wait_procs(below, 60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
