"""The page as a server: what it serves, to whom, and that it fetches nothing for anybody."""

import io
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

if find_spec("gradio") is None:
    pytest.skip("needs the extra [web]: `make test-web`", allow_module_level=True)

import httpx

META = {"_type": "gradio.FileData"}


@pytest.fixture(scope="module")
def client(page):
    with httpx.Client(base_url=page, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def asking(client):
    """Number of the event that asks both models."""
    config = client.get("/config").json()
    button = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "ask")
    return next(d["id"] for d in config["dependencies"] if [button, "click"] in [list(t) for t in d["targets"]])


def encoded(size=(40, 30), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


def upload(client, data):
    return client.post("/gradio_api/upload", files={"files": ("picture.png", data)})


def join(client, asking, picture, question, session="visitor"):
    body = {"data": [picture, question, 24, False, 3, 3], "fn_index": asking, "session_hash": session}
    return client.post("/gradio_api/queue/join", json=body)


def ask(client, asking, path, question, session="visitor"):
    """Everything that the page was told, as one text."""
    assert join(client, asking, path and {"path": path, "meta": META}, question, session).status_code == 200
    said = []
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as reply:
        for line in reply.iter_lines():
            if line.startswith("data:"):
                said.append(json.loads(line[5:]))
                if said[-1]["msg"] in ("process_completed", "close_stream"):
                    break
    return json.dumps(said)


def test_a_question_is_answered(client, asking):
    path = upload(client, encoded()).json()[0]
    said = ask(client, asking, path, "What color is the square?")
    assert "Both gave the same answer." in said
    assert "tokens/s" in said


@pytest.mark.parametrize(
    ("size", "question", "text"),
    [
        ((40, 30), "", "There is no question. Type one."),
        ((40, 30), "what " * 1500, "Ask a shorter question"),
        ((210, 210), "what?", "more than 40000 pixels"),
        (None, "what?", "There is no picture. Upload one, or pick an example."),
    ],
)
def test_errors_are_in_plain_words(client, asking, size, question, text):
    path = None if size is None else upload(client, encoded(size)).json()[0]
    said = ask(client, asking, path, question)
    assert text in said
    assert "Traceback" not in said


def test_an_upload_has_a_size(client):
    assert upload(client, bytes(50_000)).status_code == 200
    assert upload(client, bytes(50_001)).status_code == 413


@pytest.mark.parametrize(
    "picture",
    [
        {"path": "/etc/passwd"},
        {"path": "{uploads}/../../../etc/passwd"},
        {"path": "https://example.com/picture.png"},
        {"path": "{uploads}", "url": "https://example.com/picture.png"},
        {"path": None, "url": "data:image/png;base64,AAAA"},
        {"url": "file:///etc/passwd"},
        {"path": ["/etc/passwd"]},
    ],
)
def test_no_file_and_no_address_is_read_for_a_visitor(client, asking, picture):
    path = upload(client, encoded()).json()[0]
    uploads = str(Path(path).parent)
    given = {key: value.format(uploads=uploads) if isinstance(value, str) else value for key, value in picture.items()}
    given["meta"] = META
    for data in (given, [given], {"value": {"deeper": given}}):
        reply = join(client, asking, data, "what?")
        assert reply.status_code == 400
        assert reply.text == "Pictures are uploaded here, not fetched from elsewhere"
    # nor in place of anything else
    body = {"data": [None, given, 24, False, given, 3], "fn_index": asking, "session_hash": "visitor"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 400


def test_files_of_this_machine_are_not_served(client, tmp_path):
    (tmp_path / "private.png").write_bytes(encoded())
    for path in (tmp_path / "private.png", "/etc/passwd"):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_bodies_have_a_size(client):
    many = [("files", (f"{i}.png", bytes(40_000))) for i in range(4)]
    assert client.post("/gradio_api/upload", files=many).status_code == 413
    assert client.post("/gradio_api/queue/join", content=b" " * (32 * 2**20 + 1)).status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/info",
        "/gradio_api/run/predict",
        "/gradio_api/call/predict",
        "/gradio_api/component_server",
        "/gradio_api/proxy=https://example.hf.space/",
        "/gradio_api/runs",
        "/gradio_api/deep_link",
        "/gradio_api/vibe-edit",
        "/gradio_api/process_recording",
        "/gradio_api/dev/reload",
        "/gradio_api/reset",
        "/monitoring",
        "/login",
        "/docs",
        "/openapi.json",
    ],
)
def test_what_the_page_does_not_need_is_not_served(client, path):
    assert client.get(path).status_code == 404
    assert client.post(path, json={}).status_code == 404


def test_the_browser_may_ask_nobody_else(client):
    for path in ("/", "/config", "/nothing/of/the/kind"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http" not in policy
    page = client.get("/").text
    assert "<script" in page
    assert "fonts.googleapis" not in page
    assert "cdnjs" not in page
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False


def test_only_this_machine_is_talked_to(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/").status_code == 200
