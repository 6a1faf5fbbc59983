"""The official client against a server in a process of its own, with the embedded model."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
pytest.importorskip("uvicorn", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
pytest.importorskip("openai", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
pytest.importorskip("httpx", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")

import httpx
import openai

from llava_fa.eval.runner import answer
from llava_fa.hub.loading import load
from llava_fa.world.samples import held_out_samples

KEY = "a-key"
LOAD_SECONDS = 45
ENDLESS = {"logit_bias": {str(token): -100 for token in (1, 2, 3)}, "max_tokens": 10**6}


def start(*options):
    """(process, what it said when it listened)."""
    line = [sys.executable, "-m", "llava_fa.cli.main", "serve", "tiny", "--port", "0", "--json", *options]
    given = {**os.environ, "LLAVA_FA_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)
    said = ""
    for text in process.stdout:
        said += text
        if text == "}\n":
            return process, json.loads(said)
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def server():
    process, said = start("--timeout", "120", "--max-tokens", "40")
    yield process, said["url"]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors, errors
    assert errors.rstrip().endswith("stopped")


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server[1], api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def samples():
    return held_out_samples(2)


def caption(samples):
    return next(sample for sample in samples if sample.question.task == "caption")


def messages(sample):
    buffer = io.BytesIO()
    sample.image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample.question.text}]
    return [{"role": "user", "content": parts}]


def ask(client, sample, **options):
    reply = client.chat.completions.create(model="tiny", messages=messages(sample), **options)
    return reply.choices[0]


def streamed(client, sample, **options):
    chunks = client.chat.completions.create(model="tiny", messages=messages(sample), stream=True, **options)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def metric(url, name):
    text = httpx.get(url.replace("/v1", "/metrics"), headers={"authorization": f"Bearer {KEY}"}).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_answers_are_those_of_the_model_streamed_or_not(client, samples):
    model, processor = load("tiny", "cpu")
    few = [samples[0], samples[5], samples[10]]
    expected = answer(model, processor, [(s.image, s.question.text) for s in few], batch_size=1)
    assert len(set(expected)) > 1
    replies = [ask(client, sample) for sample in few]
    assert [reply.message.content.strip() for reply in replies] == expected
    assert {reply.finish_reason for reply in replies} == {"stop"}
    assert [streamed(client, sample).strip() for sample in few] == expected


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


def test_tokens_are_limited_and_usage_is_told(client, server, samples):
    before = metric(server[1], 'llava_fa_tokens_total{kind="completion"}')
    reply = client.chat.completions.create(model="tiny", messages=messages(caption(samples)), max_tokens=3)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 3)
    assert reply.usage.prompt_tokens > 64
    assert reply.model == "tiny"
    assert metric(server[1], 'llava_fa_tokens_total{kind="completion"}') == before + 3
    reply = client.chat.completions.create(model="tiny", messages=messages(caption(samples)), **ENDLESS)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 40)


def test_sampling_follows_temperature_and_seed(client, samples):
    hot = {"temperature": 2.0, "max_tokens": 12}
    drawn = [ask(client, caption(samples), seed=seed, **hot).message.content for seed in (1, 2, 3, 1, 2, 3)]
    assert drawn[:3] == drawn[3:]
    assert len(set(drawn)) > 1
    assert ask(client, samples[0], temperature=0).message.content == ask(client, samples[0]).message.content


def test_a_stop_string_ends_the_answer(client, samples):
    whole = ask(client, samples[0]).message.content
    cut = ask(client, samples[0], stop=[whole[1:3]])
    assert whole[1:3] in cut.message.content
    assert cut.finish_reason == "stop"


def test_errors_are_those_of_openai(client, server, samples):
    with pytest.raises(openai.NotFoundError) as wrong_model:
        client.chat.completions.create(model="other", messages=messages(samples[0]))
    assert wrong_model.value.code == "model_not_found"
    text = [{"role": "user", "content": "<image><image> What is it?"}]
    with pytest.raises(openai.BadRequestError, match="make no prompt"):
        client.chat.completions.create(model="tiny", messages=text)
    long = [{"role": "user", "content": "red " * 3000}]
    for stream in (False, True):  # a stream that cannot begin has the error as its status
        with pytest.raises(openai.BadRequestError, match=r"length is 1024 .* resulted in 3\d\d\d") as beyond:
            client.chat.completions.create(model="tiny", messages=long, stream=stream)
        assert (beyond.value.code, beyond.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    broken = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    with pytest.raises(openai.BadRequestError, match="arguments is not JSON"):
        client.chat.completions.create(model="tiny", messages=broken)
    address = server[1].replace("/v1", "")
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    keyed = {"authorization": f"Bearer {KEY}"}
    assert httpx.post(f"{address}/load_model", json={"model": "a/b"}, headers=keyed).status_code == 404


def test_what_the_chat_template_leaves_out_is_refused(client, samples):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="chat template") as refused:
            ask(client, samples[0], tools=[tool], stream=stream)
        assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "tools")
    history = [*messages(samples[0]), {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError, match="chat template") as refused:
        client.chat.completions.create(model="tiny", messages=history)
    assert refused.value.param == "messages[1].tool_calls[0]"


def test_an_answer_longer_than_the_context_leaves_is_refused_where_it_was_asked_for(client, samples):
    near = [{"role": "user", "content": "red " * 1000}]
    for asked in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(openai.BadRequestError, match=r"10\d\d tokens .* 40 in the completion") as beyond:
            client.chat.completions.create(model="tiny", messages=near, **{asked: 500})
        assert (beyond.value.code, beyond.value.param) == ("context_length_exceeded", asked)
    unasked = client.chat.completions.create(model="tiny", messages=near, logit_bias=ENDLESS["logit_bias"])
    assert unasked.choices[0].finish_reason == "length"
    assert unasked.usage.total_tokens == 1024


def test_no_stop_strings_are_no_stop(client, samples):
    assert ask(client, samples[0], stop=[]).message.content == ask(client, samples[0]).message.content
    assert streamed(client, samples[0], stop=[]) == ask(client, samples[0]).message.content


def test_a_client_that_leaves_frees_the_model(client, server, samples):
    left, written = 'llava_fa_requests_total{status="disconnected"}', 'llava_fa_tokens_total{kind="completion"}'
    before = metric(server[1], left), metric(server[1], written)
    with client.chat.completions.create(
        model="tiny", messages=messages(caption(samples)), stream=True, **ENDLESS
    ) as stream:
        next(iter(stream))
    until = time.monotonic() + 60
    while metric(server[1], "llava_fa_active_requests") and time.monotonic() < until:
        time.sleep(0.1)
    assert metric(server[1], left) == before[0] + 1
    assert metric(server[1], written) - before[1] < 40
    assert ask(client, samples[1]).message.content


@pytest.mark.slow
def test_eight_clients_at_once_get_their_own_answers_and_memory_stays(server, samples):
    process, url = server
    mine = [samples[i] for i in (0, 1, 2, 3, 5, 6, 8, 11)]
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120) as client:
        alone = [ask(client, sample).message.content for sample in mine]
        assert len(set(alone)) >= 4
        for sample in mine + mine:  # every allocation that happens once has happened
            streamed(client, sample)

    counts, wrong, resident = [0] * len(mine), [], []
    end = time.monotonic() + LOAD_SECONDS

    def work(i):
        with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120) as client:
            while time.monotonic() < end:
                way = (ask(client, mine[i]).message.content, streamed(client, mine[i]))
                counts[i] += 2
                wrong.extend((i, said) for said in way if said != alone[i])

    def guarded_work(i):
        try:
            work(i)
        except Exception as error:
            wrong.append((i, repr(error)))

    threads = [threading.Thread(target=guarded_work, args=(i,)) for i in range(len(mine))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        resident.append(psutil.Process(process.pid).memory_info().rss)
        time.sleep(0.5)
    assert wrong == []
    assert min(counts) >= 2
    third = len(resident) // 3
    first, last = (sorted(part)[third // 2] for part in (resident[third : 2 * third], resident[-third:]))
    assert last - first < 8e6, f"{sum(counts)} answers: {first / 1e6:.1f} → {last / 1e6:.1f} MB"
    print(f"{sum(counts)} answers in {LOAD_SECONDS} s, {first / 1e6:.1f} → {last / 1e6:.1f} MB")
