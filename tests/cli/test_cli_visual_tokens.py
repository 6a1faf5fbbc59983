"""--visual-tokens in compress, eval and chat; explain and flops."""

import json

import helpers
import pytest
from PIL import Image
from typer.testing import CliRunner

from llava_fa.cli.main import app
from llava_fa.hub.visual_tokens import attach_visual_tokens


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def elastic(tmp_path_factory):
    """A random model with FMVR, saved with 16 tokens."""
    model = attach_visual_tokens(helpers.random_llava())
    return helpers.save_llava(tmp_path_factory.mktemp("elastic") / "model", model=model)


@pytest.fixture
def photo(tmp_path):
    helpers.picture().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_chat_with_a_number_frames_and_auto(elastic, photo):
    options = ("--image", photo, "--max-new-tokens", 2, "--device", "cpu", "--json")
    few = run("chat", elastic, "what is it?", *options, "--visual-tokens", 4)
    assert few.exit_code == 0, few.output
    assert {"answer", "tokens", "seconds"} == set(json.loads(few.stdout))
    frames = run("chat", elastic, "what moves?", "--image", photo, *options)
    assert frames.exit_code == 0, frames.output
    auto = json.loads(run("chat", elastic, "what is it?", *options, "--visual-tokens", "auto").stdout)
    assert auto["visual_tokens"] in (1, 4, 16)
    assert auto["flops_share"] > 0
    spoken = run("chat", elastic, "what is it?", *options[:-1], "--visual-tokens", "auto")
    assert "visual tokens a picture were enough" in spoken.output


def test_eval_with_a_number_and_auto():
    few = json.loads(run("eval", "tiny", "--limit", 9, "--json", "--visual-tokens", 16).stdout)
    assert few["questions"] >= 9
    plain = run("eval", "tiny", "--limit", 9, "--json", "--visual-tokens", "auto")
    assert plain.exit_code == 1
    assert "always uses all its visual tokens" in json.loads(plain.stdout)["error"]["message"]


def test_eval_of_clips():
    result = json.loads(
        run("eval", "tiny", "--task", "world-video", "--limit", 9, "--json", "--visual-tokens", 4).stdout
    )
    assert {task: row["questions"] for task, row in result["tasks"].items()} == {"motion": 3, "order": 3, "count": 3}


def test_a_number_that_cannot_be(elastic, photo, tmp_path):
    for command in (
        ("chat", elastic, "what?", "--image", photo),
        ("eval", elastic, "--limit", 9),
        ("compress", elastic, tmp_path / "out"),
        ("explain", elastic, "--image", photo, "--question", "what?", "--out", tmp_path / "x.png"),
    ):
        result = run(*command, "--visual-tokens", 5, "--json")
        assert result.exit_code == 1, result.output
        assert "It can give 16, 4, 1" in json.loads(result.stdout)["error"]["remedy"]
    assert run("chat", elastic, "what?", "--image", photo, "--visual-tokens", "few").exit_code == 2


def test_compress_writes_the_number(elastic, tmp_path):
    result = run("compress", elastic, tmp_path / "out", "--bits", 2, "--visual-tokens", 4, "--json")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["visual_tokens"] == {"kind": "fmvr", "tokens": 4}
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text())["patch_size"] == 14


def test_explain_draws(elastic, photo, tmp_path):
    out = tmp_path / "saliency.png"
    result = run(
        "explain", elastic, "--image", photo, "--question", "what?", "--visual-tokens", 4, "--out", out, "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["explanations"]
    assert list(found) == ["with FMVR", "without FMVR"]
    assert len(found["with FMVR"]["saliency"]) == 4
    assert Image.open(out).size == (3 * 336 + 16, 336)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    spoken = run("explain", elastic, "--image", photo, "--question", "what?", "--out", out)
    assert "left to right" in spoken.output
    bad = run("explain", elastic, "--image", photo, "--question", "what?", "--out", tmp_path / "no" / "x.png", "--json")
    assert bad.exit_code == 1
    assert "writable" in bad.stdout


def test_flops_from_a_config_alone(elastic, tmp_path):
    (tmp_path / "config.json").write_text((elastic / "config.json").read_text())
    values = json.loads(run("flops", tmp_path, "--text", 20, "--json").stdout)
    assert set(values["visual_tokens"]) == {"16", "4", "1"}
    assert values["visual_tokens"]["4"]["sequence"] == 24
    assert "language model" in run("flops", "tiny").output
