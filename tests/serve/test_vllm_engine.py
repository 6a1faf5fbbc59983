"""vLLM as the engine, with a server of the test's own in its place."""

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import helpers
import psutil
import pytest

pytest.importorskip("httpx", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
pytest.importorskip("uvicorn", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
pytest.importorskip("starlette", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")

import httpx
from starlette.testclient import TestClient
from test_guard import CHAT, drive, error_of, events_of, from_server

from llava_fa import FourierError
from llava_fa.hub.processor import load_processor
from llava_fa.hub.visual_tokens import attach_visual_tokens
from llava_fa.serve import vllm_engine as engine
from llava_fa.serve.errors import ApiError
from llava_fa.serve.limits import Limits
from llava_fa.serve.server import serving

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return helpers.save_llava(tmp_path_factory.mktemp("vllm") / "llava")


@pytest.fixture(scope="module")
def stubbed():
    """Children run the stub in vLLM's place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "MODULE", "stub_vllm")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
        yield


@contextlib.contextmanager
def served(model, *arguments, **options):
    """(A client of the guarded server, the log of the stub.)"""
    log = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", log)
        options = {"limits": Limits(tokens=40), **options}
        with serving(str(model), name="stub", engine="vllm", engine_args=arguments, **options) as app:
            yield TestClient(app, raise_server_exceptions=False), log


@pytest.fixture(scope="module")
def server(model, stubbed):
    with served(model) as made:
        yield made


@pytest.fixture
def api(server):
    return server[0]


def ask(text="What is it?", **more):
    return {"model": "stub", "messages": [{"role": "user", "content": text}], **more}


def received(api, **request):
    """What reaches the server of a request."""
    response = api.post(CHAT, json={**ask(), **request})
    assert response.status_code == 200, response.text
    return json.loads(response.json()["choices"][0]["message"]["content"])


def metric(api, name):
    lines = api.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def picture_url():
    buffer = io.BytesIO()
    helpers.picture().save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_it_is_started_with_what_the_model_needs(server, model):
    said = server[1].getvalue().split("stub ", 1)[1].splitlines()[0]
    assert said.endswith(" 1")  # no statistics are sent anywhere
    given = json.loads(said.rpartition(" ")[0])
    assert (given["model"], given["served_model_name"]) == (str(model), "stub")
    assert json.loads(given["override_generation_config"]) == {"max_new_tokens": 40}
    assert given["hf_overrides"] is None
    assert not given["trust_request_mm_kwargs"]  # of a model that is not elastic
    home = Path(given["uds"]).parent
    assert home.stat().st_mode & 0o777 == 0o700


def test_a_request_reaches_it_as_it_was_checked(api):
    image = {"type": "image_url", "image_url": {"url": picture_url(), "detail": "low"}}
    parts = [{"type": "text", "text": "What?"}, image]
    body = received(api, messages=[{"role": "user", "content": parts, "refusal": "x", "extra": 1}], seed=3, user="me")
    image["image_url"].pop("detail")
    assert body == {"model": "stub", "messages": [{"role": "user", "content": parts}], "seed": 3, "temperature": 0}


def test_what_vllm_does_more_is_handed_on(api):
    more = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        "logprobs": True,
        "top_logprobs": 5,
        "n": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": -2,
        "temperature": 0.7,
        "top_p": 0.9,
        "stop": ["\n"],
        "logit_bias": {"5": 1.0},
        "seed": -(2**63),
    }
    body = received(api, **more)
    assert {key: body[key] for key in more} == more


def test_an_answer_is_as_long_as_the_server_allows(api):
    assert received(api, max_tokens=10**6)["max_tokens"] == 40
    assert received(api, max_completion_tokens=7)["max_completion_tokens"] == 7
    assert "max_tokens" not in received(api)


def test_without_a_temperature_the_models_own_settings_hold(api, model, tmp_path):
    assert received(api)["temperature"] == 0
    assert "temperature" not in received(api, top_p=0.5)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6}')
    assert engine._samples(tmp_path)
    finish = engine.finisher(load_processor(model), 40, greedy=False)
    assert "temperature" not in finish({"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}]})


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"chat_template": "x"}, "chat_template", "unknown_parameter"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs", "unknown_parameter"),
        ({"mm_processor_kwargs": {"visual_tokens": 4}}, "mm_processor_kwargs", "unknown_parameter"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "unknown_parameter"),
        ({"vllm_xargs": {}}, "vllm_xargs", "unknown_parameter"),
        ({"priority": -1}, "priority", "unknown_parameter"),
        ({"n": 17}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logprobs": 1}, "logprobs", "invalid_value"),
        ({"presence_penalty": 2.1}, "presence_penalty", "invalid_value"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_object", "regex": "a"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"response_format": []}, "response_format", "invalid_value"),
        ({"tool_choice": "any"}, "tool_choice", "invalid_value"),
        ({"tool_choice": [{}]}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {"name": 1}}}, "tool_choice", "invalid_value"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options", "invalid_value"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "invalid_value"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "a <image> b"}]}, "messages[0].content", "invalid_value"),
    ],
)
def test_what_reaches_inside_or_cannot_be_is_refused(api, more, param, code):
    error = error_of(api.post(CHAT, json={**ask(), **more}), 400)
    assert (error["param"], error["code"]) == (param, code)


def test_what_the_chat_template_leaves_out_is_refused(api, model):
    tool = {"type": "function", "function": {"name": "look"}}
    for more in (
        {"tools": [tool]},
        {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "look"}}},
    ):
        error = error_of(api.post(CHAT, json=ask(**more)), 400)
        assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    processor = load_processor(model)
    processor.chat_template = "{{ tools | tojson }}" + helpers.CHAT_TEMPLATE
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}], "tools": [tool]}
    assert engine.finisher(processor, 40, greedy=True)(body)["tools"] == [tool]
    processor.chat_template = "{{ 'a' + messages | length }}"
    with pytest.raises(ApiError, match="make no prompt"):
        engine.finisher(processor, 40, greedy=True)(body)


def test_the_schema_of_an_answer_counts_as_text(model, stubbed):
    with served(model, limits=Limits(text_characters=300)) as (api, _):
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"title": "x" * 300}}}
        error = error_of(api.post(CHAT, json=ask(response_format=schema)), 400)
        assert error["code"] == "context_length_exceeded"


def test_streams_pass_with_and_without_usage_and_are_counted(api):
    before = metric(api, 'llava_fa_tokens_total{kind="completion"}')
    events = events_of(api.post(CHAT, json=ask("say a b c", stream=True)))
    assert [json.loads(one)["choices"][0]["delta"]["content"] for one in events[:-1]] == ["a", "b", "c"]
    assert events[-1] == "[DONE]"
    assert not any("usage" in one for one in events)
    assert metric(api, 'llava_fa_tokens_total{kind="completion"}') == before + 3
    told = events_of(api.post(CHAT, json=ask("say a b", stream=True, stream_options={"include_usage": True})))
    assert json.loads(told[-2]) == {
        "object": "chat.completion.chunk",
        "choices": [],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }
    assert [("usage" in one) for one in told] == [False, False, True, False]


def test_errors_of_vllm_are_openais_and_those_of_the_server_say_nothing(api, caplog):
    error = error_of(api.post(CHAT, json=ask("long")), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert error["message"].startswith("This model's maximum context length is 512")
    assert error_of(api.post(CHAT, json=ask("fail")), 500) == from_server()
    assert "/home/secret" in caplog.text
    events = events_of(api.post(CHAT, json=ask("say a fail!", stream=True)))
    assert json.loads(events[-1]) == {"error": from_server()}
    assert len(events) == 2


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("request_", [ask("slow"), ask("dawdle a b", stream=True)], ids=["whole", "stream"])
def test_a_client_that_leaves_ends_the_request_at_vllm(server, request_):
    api, log = server
    before = log.getvalue().count("aborted")
    whole = {"type": "http.request", "body": json.dumps(request_).encode(), "more_body": False}
    drive(api.app, [(0, whole), (0.5, {"type": "http.disconnect"})], 20)
    assert wait_for(lambda: log.getvalue().count("aborted") == before + 1)
    assert metric(api, 'llava_fa_requests_total{status="disconnected"}') >= 1


def test_a_late_answer_is_ended_at_vllm_too(model, stubbed):
    with served(model, limits=Limits(seconds=1)) as (api, log):
        assert error_of(api.post(CHAT, json=ask("slow")), 504)["code"] == "timeout"
        assert wait_for(lambda: "aborted" in log.getvalue())


def test_one_that_ends_while_it_starts_is_one_error_with_the_cause(model, stubbed):
    with pytest.raises(FourierError) as caught, served(model, "--fails"):
        pass
    assert str(caught.value) == (
        "vLLM ended while it started (exit code 1): FourierError: model.layers.0: no such layer / RuntimeError: Engine "
        "core initialization failed. See root cause above. Its whole log is above"
    )
    with (
        pytest.raises(FourierError, match=r"exit code 2.*unrecognized arguments: --no-such"),
        served(model, "--no-such"),
    ):
        pass


@pytest.mark.parametrize("last", [ask("die"), ask("say a die!", stream=True)], ids=["whole", "stream"])
def test_one_that_dies_later_is_told(model, stubbed, last):
    with served(model) as (api, _):
        assert api.get("/health").json() == {"status": "ok"}
        response = api.post(CHAT, json=last)
        error = json.loads(events_of(response)[-1])["error"] if "stream" in last else error_of(response, 503)
        assert (error["code"], error["type"]) == ("engine_unavailable", "server_error")
        assert wait_for(lambda: api.get("/health").status_code == 503)
        assert error_of(api.post(CHAT, json=ask()), 503)["code"] == "engine_unavailable"
        assert 'llava_fa_requests_total{status="503"}' in api.get("/metrics").text


def test_nothing_is_left_behind(model, stubbed):
    before = set(psutil.Process().children())
    with served(model) as (_, log):
        home = Path(json.loads(log.getvalue().split("stub ", 1)[1].rpartition("}")[0] + "}")["uds"]).parent
        (child,) = set(psutil.Process().children()) - before
        assert home.is_dir()
    assert not home.exists()
    assert not child.is_running()


@pytest.fixture
def short_path():
    """A folder for temporary ones; pytest's are too deep for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


PARENT = """
import sys, time
from pathlib import Path
from llava_fa.serve import vllm_engine
vllm_engine.MODULE = "stub_vllm"
with vllm_engine.vllm_server(Path(sys.argv[1]), name="stub") as (socket, child):
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_it_ends_with_a_parent_that_is_killed(model, stubbed, short_path):
    line = [sys.executable, "-c", PARENT, str(model)]
    given = {**os.environ, "TMPDIR": str(short_path)}  # nobody is left to remove the socket's folder
    parent = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=given)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.send_signal(signal.SIGKILL)
    parent.wait(20)
    parent.stdout.close()
    assert wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 20)


COMMAND = """
import sys
from llava_fa.cli.main import app
from llava_fa.serve import vllm_engine
from llava_fa.vllm import support
vllm_engine.MODULE = "stub_vllm"
support.vllm_version = lambda: "0.32.0"
support.architectures = lambda: {"LlavaForConditionalGeneration"}
app(["serve", sys.argv[1], "--port", "0", "--json", "--engine-arg=--tensor-parallel-size=1"])
"""


def test_a_temporary_folder_may_be_deep(monkeypatch, tmp_path, short_path):
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    for folder, taken in ((deep, Path("/tmp")), (short_path, short_path)):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with engine.private_folder() as home:
            assert Path(home).parent == taken
            assert len(os.fsencode(home)) + len("/vllm.sock") < 107


def test_the_command_serves_and_ends_it(model, stubbed, short_path):
    line, given = [sys.executable, "-c", COMMAND, str(model)], {**os.environ, "TMPDIR": str(short_path)}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)
    try:
        said = ""
        while not said.endswith("}\n"):
            said += process.stdout.readline()
            assert process.poll() is None
        told = json.loads(said)
        assert (told["model"], told["engine"]) == ("llava", "vllm")
        assert len(list(short_path.iterdir())) == 1
        (child,) = psutil.Process(process.pid).children()
        reply = httpx.post(f"{told['url']}/chat/completions", json={**ask(), "model": "llava"})
        assert reply.json()["usage"]["completion_tokens"] == 3
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()  # where the test failed
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "engine: vllm (vLLM 0.32.0 is installed and serves it)" in errors
    assert errors.rstrip().endswith("stopped")
    assert not child.is_running()
    assert list(short_path.iterdir()) == []


def test_visual_tokens_of_the_server_and_of_a_request(stubbed, tmp_path):
    made, processor = helpers.random_llava(), helpers.processor()
    attach_visual_tokens(made, processor, 4).save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    with served(tmp_path / "m", visual_tokens=4) as (api, log):
        assert json.dumps({"visual_tokens": {"kind": "fmvr", "tokens": 4}}).replace('"', '\\"') in log.getvalue()
        for count in (16, 4, 1):
            wanted = {"visual_tokens": count}
            assert received(api, mm_processor_kwargs=wanted)["mm_processor_kwargs"] == wanted
        for wrong in (
            {"visual_tokens": 5},
            {"visual_tokens": 4.5},
            {"visual_tokens": "4"},
            {"visual_tokens": True},
            {"visual_tokens": 4, "size": 1},
            {},
            4,
        ):
            error = error_of(api.post(CHAT, json=ask(mm_processor_kwargs=wrong)), 400)
            assert (error["param"], error["code"]) == ("mm_processor_kwargs", "invalid_value")
    with pytest.raises(FourierError, match="cannot give 5 visual tokens"), served(tmp_path / "m", visual_tokens=5):
        pass
