"""`llava-fa serve` before it serves: what is missing, taken or wrong."""

import socket
import sys

import pytest
from typer.testing import CliRunner

from llava_fa.cli.main import app


def run(*args, **more):
    return CliRunner().invoke(app, ["serve", *map(str, args)], **more)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "llava_fa.serve.server", raising=False)
    monkeypatch.delattr("llava_fa.serve.server", raising=False)  # where another test has imported it
    result = run("tiny")
    assert result.exit_code == 1
    assert "the server's packages are not here" in result.stderr
    assert "pip install 'llava-fa[serve]'" in result.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--api-key", ""], "--api-key"),
        (["--api-key", "two words"], "--api-key"),
        (["--allow-image-folder", "/no/such/folder"], "--allow-image-folder"),
        (["--max-pixels", "0"], "--max-pixels"),
        (["--engine", "tgi"], "--engine"),
    ],
)
def test_wrong_usage(options, text):
    result = run("tiny", *options)
    assert result.exit_code == 2
    assert text in result.stderr


def test_a_port_that_is_taken_is_an_error_before_the_model_is_loaded():
    pytest.importorskip("uvicorn", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
    pytest.importorskip("prometheus_client", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("no/such/folder/at/all", "--port", port)
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--engine", "vllm"], "vLLM cannot serve it: vLLM is not installed. `pip install 'llava-fa[vllm]'`"),
        (["--engine-arg=--seed=1"], "--engine-arg is an argument of vLLM's: vLLM is not installed"),
    ],
)
def test_what_needs_vllm_says_so(options, text, monkeypatch):
    pytest.importorskip("uvicorn", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
    pytest.importorskip("prometheus_client", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
    from llava_fa.vllm import support

    monkeypatch.setattr(support, "vllm_version", lambda: None)
    result = run("tiny", "--port", "0", *options)
    assert result.exit_code == 1
    assert text in result.stderr


def test_the_end_of_a_reply_does_not_wait_for_its_beginning_to_be_confirmed():
    pytest.importorskip("uvicorn", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
    pytest.importorskip("prometheus_client", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
    from llava_fa.serve.server import bind

    with bind("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
