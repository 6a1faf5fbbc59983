"""`llava-fa compare` before it opens a page: what is missing, taken or wrong."""

import json
import socket
import sys
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from llava_fa.cli.main import app

needs_web = pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra [web]: `make test-web`")


def run(*args):
    return CliRunner().invoke(app, ["compare", *map(str, args)])


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = run("tiny", "tiny", "--json")
    assert result.exit_code == 1
    assert "the page's packages are not here" in result.stderr
    assert "pip install 'llava-fa[web]'" in result.stderr
    assert "pip install 'llava-fa[web]'" in json.loads(result.stdout)["error"]["remedy"]


def test_two_models_are_needed():
    assert run("tiny").exit_code == 2


@needs_web
@pytest.mark.parametrize(("original", "compressed"), [("tiny", "no/such/folder/at/all"), ("no/such/folder", "tiny")])
def test_a_model_that_is_not_there(original, compressed):
    result = run(original, compressed, "--port", 0)
    assert result.exit_code == 1
    assert "no such folder" in result.stderr


@needs_web
def test_a_port_that_is_taken_is_an_error_before_models_are_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("no/such/folder/at/all", "tiny", "--port", port)
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
