"""Questions put to a server: what is sent, what comes back, and the same answers as from the model itself."""

import base64
import io
import json
import os
import threading
import time
from pathlib import Path

import helpers
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("httpx", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")

import httpx
from PIL import Image

from llava_fa import FourierError
from llava_fa.cli.main import app as command
from llava_fa.eval import endpoint
from llava_fa.eval.answerers import Loaded
from llava_fa.eval.endpoint import Endpoint, client, connect, parts, settings_of
from llava_fa.hub.loading import load
from llava_fa.world.samples import held_out_samples


def reply(text, **more):
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}]}, **more)


class Server:
    """Answers by a function of the request, whose bodies it keeps."""

    def __init__(self, answer, models=("m",)):
        self.answer, self.models, self.asked, self.headers = answer, models, [], []

    def __call__(self, request):
        self.headers.append(request.headers)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": name} for name in self.models]})
        assert request.url.path == "/v1/chat/completions"
        self.asked.append(json.loads(request.content))
        return self.answer(self.asked[-1])

    def endpoint(self, model=None):
        return Endpoint(client("http://here/v1", {}, httpx.MockTransport(self)), model)


def question_of(body):
    return body["messages"][0]["content"][-1]["text"]


@pytest.fixture
def waited(monkeypatch):
    """The seconds that were to be waited for, which are not."""
    seconds = []
    monkeypatch.setattr(endpoint.time, "sleep", seconds.append)
    return seconds


def test_answers_come_in_the_order_of_the_questions():
    def late(body):
        time.sleep(0.02 * (9 - int(question_of(body))))
        return reply(f" {question_of(body)} \n")

    seen, server = [], Server(late)
    rows = server.endpoint().answer([((), str(i)) for i in range(9)], batch_size=9, progress=lambda *n: seen.append(n))
    assert rows == [{"answer": str(i)} for i in range(9)]
    assert seen == [(i, 9) for i in range(1, 10)]
    assert {body["model"] for body in server.asked} == {"m"}
    assert server.endpoint().answer([], batch_size=4) == []


def test_no_more_requests_are_in_flight_than_allowed():
    lock, now, most = threading.Lock(), 0, 0

    def counting(body):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return reply("a")

    Server(counting).endpoint().answer([((), "q")] * 12, batch_size=3)
    assert most == 3


def test_pictures_are_sent_as_they_are_where_the_prompt_has_them():
    first, second = helpers.picture(0), helpers.picture(1, 9)
    content = parts([first, second], "a <image> b <image> c")
    assert [part.get("text") for part in content] == ["a", None, "b", None, "c"]
    for part, picture in zip((content[1], content[3]), (first, second), strict=True):
        kind, _, data = part["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == picture.tobytes()
    assert [part["type"] for part in parts([first, second], "what?")] == ["image_url", "image_url", "text"]


def test_options_of_generate_become_fields():
    assert settings_of(8, (), {}) == {"max_tokens": 8, "temperature": 0}
    assert settings_of(8, list("abcde"), {"do_sample": False, "top_p": 0.5})["stop"] == list("abcd")
    drawn = settings_of(8, (), {"do_sample": True, "top_p": 0.9, "seed": 3})
    assert drawn == {"max_tokens": 8, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    with pytest.raises(FourierError, match="a server is not told num_beams"):
        settings_of(8, (), {"num_beams": 4})
    server = Server(lambda body: reply("one. two; three"))
    until = ["x", "x", "x", "x", ";"]  # OpenAI takes four
    assert server.endpoint().answer([((), "q")], until=until) == [{"answer": "one. two"}]


def test_a_busy_server_is_asked_again(waited):
    answers = [httpx.Response(429, headers={"retry-after": "5"}), httpx.Response(503), reply("a")]
    assert Server(lambda body: answers.pop(0)).endpoint("m").answer([((), "q")]) == [{"answer": "a"}]
    assert waited == [5, 2]


def test_a_server_that_is_not_reached_is_given_up_at_last(waited):
    def gone(body):
        raise httpx.ConnectError("refused")

    server = Server(gone)
    with pytest.raises(FourierError, match=r"http://here/v1/: it is not reached \(refused\)"):
        server.endpoint("m").answer([((), "q")])
    assert (len(server.asked), waited) == (7, [1, 2, 4, 8, 16, 32])
    with pytest.raises(FourierError, match="it is busy \\(status 503\\)"):
        Server(lambda body: httpx.Response(503)).endpoint("m").answer([((), "q")])


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            httpx.Response(400, json={"error": {"message": "too long", "code": "x"}}),
            r"refuses \(status 400\): 'too long'",
        ),
        (httpx.Response(401, text="no"), "status 401.*Set LLAVA_FA_API_KEY or OPENAI_API_KEY"),
        (httpx.Response(200, text="<html>"), "answers in another form: '<html>'"),
        (httpx.Response(200, json={"choices": []}), "answers in another form"),
    ],
)
def test_what_will_not_get_better_is_one_error(answer, text, waited):
    server = Server(lambda body: answer)
    with pytest.raises(FourierError, match=text):
        server.endpoint("m").answer([((), "q")] * 50, batch_size=1)
    assert waited == []
    assert len(server.asked) < 50


def test_the_only_model_is_taken(waited):
    assert Server(None, ["one"]).endpoint().model == "one"
    with pytest.raises(FourierError, match=r"it has 2 models .*'one', 'two'.*--endpoint-model"):
        Server(None, ["one", "two"]).endpoint()
    assert Server(None, ["one", "two"]).endpoint("two").model == "two"


def test_the_key_comes_from_the_environment(monkeypatch):
    for name in endpoint.KEYS:
        monkeypatch.delenv(name, raising=False)
    with connect("http://here/v1") as server:
        assert "authorization" not in server.headers
    monkeypatch.setenv("OPENAI_API_KEY", "b")
    monkeypatch.setenv("LLAVA_FA_API_KEY", "a")
    with connect("http://here/v1/") as server:
        assert server.headers["authorization"] == "Bearer a"
        assert str(server.base_url) == "http://here/v1/"
    with pytest.raises(FourierError, match="no web address"):
        connect("here:80")


@pytest.fixture(scope="module")
def served():
    """(The embedded model, the URL at which transformers serve has the same.)"""
    pytest.importorskip("openai", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
    uvicorn = pytest.importorskip("uvicorn", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
    pytest.importorskip("prometheus_client", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
    from llava_fa.serve.engine import chat_app
    from llava_fa.serve.guard import guarded
    from llava_fa.serve.server import bind

    model, processor = load("tiny", "cpu", torch.float32)
    app = guarded(chat_app("tiny", model, processor, 1024), model="tiny", vocabulary=453)
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield Loaded(model, processor), f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(30)
    listening.close()


def test_a_server_gives_the_answers_of_its_model(served):
    samples = held_out_samples(45)
    questions = [(sample.image, sample.question.text) for sample in samples]
    options = {"batch_size": 8, "max_new_tokens": 48, "progress": lambda done, total: None}
    with connect(served[1]) as server:
        answered = Endpoint(server).answer(questions, **options)
    assert len(questions) > 40
    assert answered == served[0].answer(questions, **options)
    assert len({row["answer"] for row in answered}) > 10


def evaluate(*arguments):
    return CliRunner().invoke(command, ["eval", *map(str, arguments)])


def test_a_run_through_an_endpoint_goes_on_with_the_same_alone(served, tmp_path):
    line = ("tiny", "--limit", 18, "--out", tmp_path / "run", "--endpoint", served[1], "--json")
    done = evaluate(*line)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["endpoint"], result["endpoint_model"]) == (served[1], None)
    assert result["score"] > 0.7
    assert json.loads(evaluate(*line).stdout)["resumed"] == result["questions"]
    other = evaluate("tiny", "--limit", 18, "--out", tmp_path / "run")
    assert other.exit_code == 1
    assert f"endpoint was '{served[1]}', is None" in other.stderr


def test_vllm_is_started_for_a_run(monkeypatch, tmp_path):
    pytest.importorskip("uvicorn", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
    from llava_fa.serve import vllm_engine
    from llava_fa.vllm import support

    monkeypatch.setattr(vllm_engine, "MODULE", "stub_vllm")
    place = Path(__file__).parent.parent / "serve"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(support, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(support, "architectures", lambda: {"LlavaForConditionalGeneration"})
    helpers.save_llava(tmp_path / "model")
    line = (tmp_path / "model", "--limit", 9, "--engine", "vllm", "--out", tmp_path / "run")
    done = evaluate(*line, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["engine"] == "vllm"
    asked = [json.loads(row["answer"]) for row in json.loads((tmp_path / "run" / "answers.json").read_text())]
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in asked} == {
        (str(tmp_path / "model"), 0, 48)
    }
    assert [part["type"] for part in asked[0]["messages"][0]["content"]] == ["image_url", "text"]
    assert "engine was 'vllm', is None" in evaluate(tmp_path / "model", "--limit", 9, "--out", tmp_path / "run").stderr
    monkeypatch.setattr(support, "vllm_version", lambda: None)
    again = evaluate(tmp_path / "model", "--limit", 9, "--engine", "vllm")
    assert "vLLM cannot serve it: vLLM is not installed" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--engine", "auto"], "--engine"),
        (["--engine-arg=-tp=2"], "--engine-arg"),
        (["--endpoint-model", "m"], "--endpoint-model"),
        (["--endpoint", "http://x", "--engine", "vllm"], "--engine"),
        (["--endpoint", "http://x", "--device", "cpu"], "--device"),
        (["--endpoint", "http://x", "--visual-tokens", "auto"], "--visual-tokens"),
        (["--endpoint", "http://x", "--visual-tokens", "4"], "--visual-tokens"),
        (["--engine", "vllm", "--visual-tokens", "auto"], "--visual-tokens"),
        (["--engine", "vllm", "--device", "cuda"], "--device"),
    ],
)
def test_what_a_server_cannot_be_asked_for_is_wrong_usage(arguments, option):
    result = evaluate("tiny", *arguments)
    assert result.exit_code == 2
    assert f"Invalid value for {option}:" in result.stderr.replace("\n", " ")
