"""`--ray`: with an address and without, and where Ray is not installed."""

import sys

import pytest
from typer.testing import CliRunner

from llava_fa import FourierError
from llava_fa.cli import compress, options
from llava_fa.cli.main import app


@pytest.fixture
def asked(monkeypatch):
    """What the command asks Ray for, in the end."""
    seen = []

    def crew(ray, gpus):
        seen.append((ray, gpus))
        raise FourierError("no further")

    monkeypatch.setattr(compress, "_crew", crew)
    return seen


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tiny", "out", "--ray"], ("auto", None)),
        (["tiny", "out", "--ray", "--bits", "2"], ("auto", None)),
        (["--ray", "tiny", "out"], ("auto", None)),
        (["tiny", "out", "--ray", "head:6379", "--ray-gpus", "0.5"], ("head:6379", 0.5)),
        (["--ray", "10.0.0.1:6379", "tiny", "out"], ("10.0.0.1:6379", None)),
        (["tiny", "out", "--ray", "[fd00::1]:6379"], ("[fd00::1]:6379", None)),
        (["tiny", "out", "--ray=head:6379"], ("head:6379", None)),
        (["tiny", "out", "--ray", "auto"], ("auto", None)),
        (["tiny", "out"], (None, None)),
    ],
)
def test_the_address_may_be_left_out(asked, words, expected):
    result = CliRunner().invoke(app, ["compress", *words])
    assert result.exit_code == 1
    assert asked == [expected]


def test_auto_is_the_cluster_that_is_found():
    assert options.address("auto") is None
    assert options.address("head:6379") == "head:6379"


@pytest.mark.parametrize("command", ["compress", "eval"])
def test_gpus_without_ray_are_wrong_usage(command):
    words = ["tiny", "out"] if command == "compress" else ["tiny"]
    result = CliRunner().invoke(app, [command, *words, "--ray-gpus", "1"])
    assert result.exit_code == 2
    assert "goes with --ray" in result.output.replace("\n", " ").replace("│", "").replace("  ", " ")


@pytest.mark.parametrize("words", [["--endpoint", "http://localhost:1/v1"], ["--engine", "vllm"]])
def test_a_server_is_not_asked_by_a_cluster(words):
    result = CliRunner().invoke(app, ["eval", "tiny", "--ray", *words])
    assert result.exit_code == 2
    assert "--ray" in result.output


@pytest.mark.parametrize("words", [["compress", "tiny", "out", "--ray"], ["eval", "tiny", "--ray", "--limit", "9"]])
def test_without_ray_the_extra_is_named(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in [name for name in sys.modules if name.startswith("llava_fa.cluster.")]:
        monkeypatch.delitem(sys.modules, name)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "pip install 'llava-fa[ray]'" in result.output
    assert not list(tmp_path.iterdir())
