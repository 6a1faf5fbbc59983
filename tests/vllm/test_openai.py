"""The official client against vLLM's own server, started on a packed folder as anyone would."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time

import pytest
from engines import Prompt, from_transformers

import llava_fa
from llava_fa import FourierConfig
from llava_fa.eval.endpoint import parts
from llava_fa.eval.runner import prompt
from llava_fa.hub.loading import processor_of
from llava_fa.world.samples import held_out_samples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

COUNT = 12
CLIENTS, SECONDS = 8, 120


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    llava_fa.compress("tiny", out, FourierConfig(bits=4), embeddings=4)
    return out


@pytest.fixture(scope="module")
def client(packed):
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(packed), "--port", str(port)]
    command += ["--served-model-name", "packed", "--dtype", "float32", "--max-model-len", "512"]
    environment = {**os.environ, "LLAVA_FA_ACTIVATIONS": "exact", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, env=environment)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    try:
        while True:
            assert process.poll() is None, "vLLM ended while it started"
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        yield client
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def known(packed):
    """Questions, and what transformers answers."""
    samples = held_out_samples(18, 0)
    processor = processor_of("tiny")
    asked = [Prompt(prompt(processor, 1, sample.question.text), (sample.image,)) for sample in samples]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LLAVA_FA_ACTIVATIONS", "exact")
        answers = from_transformers(packed, asked, COUNT)
    special = set(processor.tokenizer.all_special_ids)
    ends = [next((i for i, token in enumerate(one.tokens) if token in special), COUNT) for one in answers]
    texts = [processor.tokenizer.decode(one.tokens[:end]).strip() for one, end in zip(answers, ends, strict=True)]
    return [(sample.image, sample.question.text, said) for sample, said in zip(samples, texts, strict=True)]


def ask(client, pictures, text, **more):
    messages = [{"role": "user", "content": parts(pictures, text)}]
    return client.chat.completions.create(
        model="packed", messages=messages, **{"max_tokens": COUNT, "temperature": 0, **more}
    )


def test_answers_and_streams(client, known):
    for picture, question, said in known:
        assert ask(client, [picture], question).choices[0].message.content.strip() == said
    picture, question, said = known[0]
    chunks = list(ask(client, [picture], question, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == said


def test_several_pictures_are_all_seen(client, known):
    """The same question with two pictures in either order, and with one: three prompts, of three lengths or answers."""
    (one, question, _), (two, _, _) = known[0], known[1]
    lengths = [ask(client, shown, question).usage.prompt_tokens for shown in ([one], [one, two], [two, one])]
    assert lengths[1] == lengths[2] == lengths[0] + 64
    likely = [
        ask(client, shown, question, logprobs=True).choices[0].logprobs.content[0].logprob
        for shown in ([one], [one, two], [two, one])
    ]
    assert len(set(likely)) == 3


def test_a_json_schema_is_kept(client, known):
    picture, question, _ = known[0]
    schema = {"type": "string", "enum": ["three red squares", "no circle at all"]}  # white space would never end
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    said = ask(client, [picture], question, response_format=wanted, max_tokens=100).choices[0].message.content
    assert json.loads(said) in schema["enum"]
    assert json.loads(said) != ask(client, [picture], question).choices[0].message.content


def test_many_clients_for_two_minutes(client, known):
    """No error, and no answer that another request has anything to do with."""
    end, wrong, counts = time.monotonic() + SECONDS, [], [0] * CLIENTS

    def keep_asking(number):
        draw = random.Random(number)
        while time.monotonic() < end:
            picture, question, said = draw.choice(known)
            try:
                got = ask(client, [picture], question).choices[0].message.content.strip()
                if got != said:
                    wrong.append((question, said, got))
            except Exception as error:
                wrong.append((question, said, repr(error)))
            counts[number] += 1

    threads = [threading.Thread(target=keep_asking, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert min(counts) > 0
