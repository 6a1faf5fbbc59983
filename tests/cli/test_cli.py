"""The command line: what is printed where, exit codes, and nothing slow before it is needed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
from PIL import Image
from typer.testing import CliRunner

import llava_fa
from llava_fa import FourierError
from llava_fa.cli import output
from llava_fa.cli.main import app

QUICK = ["--bits", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return helpers.save_llava(tmp_path_factory.mktemp("cli") / "llava", dtype=helpers.torch.bfloat16)


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    """(folder, JSON) of a compression through the command line."""
    out = tmp_path_factory.mktemp("cli") / "small"
    result = run("compress", model, out, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def command(*args, **more):
    """The command in a process of its own."""
    line = [sys.executable, "-m", "llava_fa.cli.main", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **more)


def test_help_and_version_need_no_torch():
    code = "import sys; from llava_fa.cli.main import app\ntry: app(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules), 'slow'"
    for args, text in (
        (["--help"], "compress"),
        (["--version"], "0.1.0"),
        (["compress", "--help"], "--calibration"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert text in done.stdout


def test_compress_json_is_one_object_with_every_field(small):
    _, values = small
    expected = {
        "bits_per_weight",
        "compression_ratio",
        "layers",
        "not_compressed",
        "seconds",
        "peak_rss_bytes",
    }
    assert expected <= set(values)
    assert 2 < values["bits_per_weight"] < 3.2
    assert len(values["layers"]) == 28


def test_inspect_json(small):
    result = run("inspect", small[0], "--json")
    values = json.loads(result.stdout)
    for key in ("bits_per_weight", "compression_ratio", "layers", "not_compressed"):
        assert values[key] == small[1][key]


def test_inspect_for_people(small, model):
    result = run("inspect", small[0], "--layers")
    assert result.exit_code == 0
    assert "language_model.layers.1.mlp.down_proj" in result.stdout
    assert "x smaller" in result.stdout
    assert "kept: lm_head.weight, 28.8 kB (output embedding)" in result.stdout
    assert "16.000 bits per weight in 28 layers" in run("inspect", model).stdout


def test_codes_are_chosen_and_shown(model, tmp_path):
    result = run("compress", model, tmp_path / "out", *QUICK, "--codes", "auto", "--only", "*.mlp.*_proj")
    assert result.exit_code == 0, result.output
    shown = run("inspect", tmp_path / "out", "--layers").stdout.splitlines()
    kinds = {line.split()[0].rpartition(".")[2]: line.split()[2] for line in shown if ".mlp." in line}
    assert kinds == {"gate_proj": "rings", "up_proj": "rings", "down_proj": "trellis"}  # 48 and 96 inputs


def test_compress_for_people(model, tmp_path):
    result = run("compress", model, tmp_path / "out", *QUICK, "--skip", "*.mlp.*", "--only", "language_model")
    assert result.exit_code == 0
    assert "bits per weight in 8 layers" in result.stdout
    assert "compressing 8 layers" in result.stderr
    assert "only: model.language_model.layers.0.self_attn.q_proj" in result.stderr
    assert "skipped: model.vision_tower.encoder.layers.0.mlp.fc1" in result.stderr
    assert "done 8/8" in result.stderr
    assert "peak" in result.stderr


def test_stdout_is_pure_json_even_with_all_libraries_talking(model, tmp_path):
    helpers.picture().save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    calibration = ("--calibration", tmp_path / "data.json", "--samples", 1, "--only", "*.layers.0.self_attn")
    done = command("compress", model, tmp_path / "out", *QUICK, *calibration, "--json")
    assert done.returncode == 0, done.stderr
    assert all(layer["output_error"] > 0 for layer in json.loads(done.stdout)["layers"])
    assert "Traceback" not in done.stderr
    assert "torchvision" not in done.stderr
    assert "Loading weights" not in done.stderr


def test_world_calibration(model, tmp_path, monkeypatch):
    import llava_fa.world

    def samples(n, seed):
        assert (n, seed) == (2, 7)
        return [(helpers.picture(i), "what?", "that") for i in range(n)]

    monkeypatch.setattr(llava_fa.world, "calibration_samples", samples, raising=False)
    source = ("--calibration", "world", "--samples", 2, "--seed", 7, "--only", "*.layers.0.self_attn")
    result = run("compress", model, tmp_path / "out", *QUICK, *source, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["layers"][0]["output_error"] is not None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bits", "5"], "bits is 5.0"),
        (["--bits", "0.7"], "--bits"),
        (["--bits", "1.3", "--method", "paper"], "not for method 'paper'"),
        (["--bits", "nan"], "--bits"),
        (["--bits", "2.3", "--method", "paper"], "not for method 'paper'"),
        (["--bits", "2", "--size", "1GB"], "exclude each other"),
        (["--size", "a lot"], "a budget of size 'a lot'"),
        (["--mixed"], "--mixed goes with --bits"),
        (["--bits", "two"], "valid"),
        (["--method", "magic"], "method is 'magic'"),
        (["--rank", "-1"], "--rank"),
        (["--codes", "vq"], "codes is 'vq'. Choose one of rings, trellis, auto"),
        (["--method", "paper", "--codes", "trellis"], "belong to method 'best'"),
        (["--amplitude-bits", "4"], "belong to method 'paper'"),
        (["--method", "paper", "--amplitude-bits", "4"], "come together"),
        (
            ["--method", "paper", "--bits", "4", "--amplitude-bits", "4", "--phase-bits", "4"],
            "exclude each other",
        ),
        (["--casp-auto"], "No such option"),
        (["--casp-keep", "0.5"], "goes with --casp"),
        (["--casp", "--casp-keep", "2"], "--casp-keep"),
        (["--casp", "--casp-keep", "0"], "keep is 0.0"),
        (["--images", "."], "goes with --calibration"),
        (["--skip-bad-rows"], "goes with --calibration"),
        (["--calibration", "world", "--images", "."], "not with"),
        (["--samples", "0"], "--samples"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_wrong_usage_is_2(model, tmp_path, args, message):
    result = run("compress", model, tmp_path / "out", *args)
    assert result.exit_code == 2
    assert " ".join(message.split()) in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--bits", "3.3"], "budget 3.3 bits per weight"),
        (["--bits", "3.5", "--mixed"], "budget 3.5 bits per weight"),
        (["--size", "118 kB"], "budget 118.0 kB"),
    ],
)
def test_a_budget_is_spent_and_explained(model, tmp_path, args, told):
    result = run("compress", model, tmp_path / "out", *args)
    assert result.exit_code == 0, result.output
    assert " layers 2.5" in result.stderr.split("\nbits: ")[1]
    assert "with the same bits everywhere" in result.stderr
    seen = run("inspect", tmp_path / "out", "--layers")
    for stdout in (result.stdout, seen.stdout):
        assert told in stdout
        assert "relative, without data" in stdout
        assert "sensitivity" in stdout
    values = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert values["budget"]["predicted_loss"] <= values["budget"]["uniform_loss"]
    assert values["bits_per_weight"] <= 3.5
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) <= 124_000


def test_arguments_left_out_are_2():
    assert run("compress").exit_code == 2
    assert run().exit_code in (0, 2)  # the help: 0 or 2 by click's version
    assert run("nonsense").exit_code == 2


def test_failure_is_1_with_one_message(model, small, tmp_path):
    for args, message in (
        (("compress", tmp_path / "none", tmp_path / "out"), "no such folder"),
        (("compress", model, small[0]), "it exists already"),
        (("compress", small[0], tmp_path / "out"), "already compressed by llava-fa"),
        (("compress", model, tmp_path / "out", "--skip", "nothing_like_it"), "matches no module"),
        (("compress", model, tmp_path / "out", "--rank", "30"), "rank 30 is larger than min"),
        (("inspect", tmp_path), "there is no config.json"),
        (("chat", model, "what?", "--image", tmp_path / "none.png"), "does not exist"),
    ):
        result = run(*args)
        assert result.exit_code == 1, args
        assert result.stdout == ""
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_failure_under_json_is_an_object_too(tmp_path):
    result = run("inspect", tmp_path, "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["what"] == "there is no config.json: this is not a model folder"
    assert error["where"] == str(tmp_path)
    assert error["remedy"]


def test_killed_from_outside_resumes(model, small, tmp_path):
    """SIGKILL to the real command, in the middle; then the same command again."""
    out = tmp_path / "out"
    line = [sys.executable, "-m", "llava_fa.cli.main", "compress", str(model), str(out), *QUICK]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out.partial" / "parts"
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if parts.is_dir() and len(os.listdir(parts)) >= 3:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    result = run("compress", model, out, *QUICK)
    assert result.exit_code == 0, result.stderr
    for path in small[0].iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.fixture
def interrupted(model, tmp_path, monkeypatch):
    """(output folder, result) of a compression stopped by Ctrl-C when all layers were done."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("llava_fa.hub.compress.assemble", interrupt)
        result = run("compress", model, tmp_path / "out", *QUICK)
    assert result.exit_code == 1
    return tmp_path / "out", result


def test_control_c_says_how_to_go_on(model, interrupted):
    out, result = interrupted
    assert "the same command resumes" in result.stderr
    assert run("compress", model, out, *QUICK).exit_code == 0


def test_fresh(model, interrupted):
    out, _ = interrupted
    refused = run("compress", model, out, "--bits", "3")
    assert refused.exit_code == 1
    assert "--fresh" in refused.stderr
    assert run("compress", model, out, "--bits", "1", "--fresh").exit_code == 0


@pytest.mark.parametrize("which", ["model", "small"])
def test_chat_answers(request, tmp_path, which):
    folder = request.getfixturevalue(which)
    folder = folder[0] if isinstance(folder, tuple) else folder
    helpers.picture().save(tmp_path / "a.png")
    result = run("chat", folder, "what is it?", "--image", tmp_path / "a.png", "--max-new-tokens", 5)
    assert result.exit_code == 0, result.stderr
    again = run("chat", folder, "what is it?", "--image", tmp_path / "a.png", "--max-new-tokens", 5, "--json")
    values = json.loads(again.stdout)
    assert set(values) == {"answer", "tokens", "seconds"}
    assert 1 <= values["tokens"] <= 5
    assert result.stdout.strip() == values["answer"]


@pytest.mark.parametrize("command", ["chat", "explain"])
def test_pictures_of_commands_are_upright(model, tmp_path, monkeypatch, command):
    from llava_fa.eval import explain, runner

    seen = []

    def look(loaded, processor, pictures, *_):
        seen.extend(pictures[0] if isinstance(pictures, list) else [pictures])
        raise FourierError("seen enough")

    monkeypatch.setattr(runner, "inputs_of", look)
    monkeypatch.setattr(explain, "compare_restoration", look)
    exif = Image.Exif()
    exif[0x0112] = 8
    whole = helpers.picture().resize((30, 20))
    whole.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "a.png", exif=exif)
    words = ("chat", model, "what?") if command == "chat" else ("explain", model, "--question", "what?")
    result = run(*words, "--image", tmp_path / "a.png")
    assert "seen enough" in result.stderr
    assert [picture.tobytes() for picture in seen] == [whole.tobytes()]


def test_rows_left_out_are_listed(model, tmp_path):
    helpers.picture().save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    rows = [{"image": name, "conversations": turns} for name in ("a.png", "gone.png", "a.png")]
    (tmp_path / "rows.json").write_bytes(json.dumps(rows).encode("utf-8-sig"))
    words = ("compress", model, tmp_path / "out", "--bits", 2, "--only", "*.layers.0.self_attn")
    result = run(*words, "--calibration", tmp_path / "rows.json")
    assert result.exit_code == 1
    assert re.search(r"rows\.json row 1: image .*gone\.png does not exist.*or give --skip-bad-rows", result.stderr)
    result = run(*words, "--calibration", tmp_path / "rows.json", "--skip-bad-rows")
    assert result.exit_code == 0, result.stderr
    assert "left out: rows.json row 1" in result.stdout


def test_a_question_that_is_no_text_is_wrong_usage(model, tmp_path):
    helpers.picture().save(tmp_path / "a.png")
    question = "what \udcff"  # a byte that is not UTF-8, as Python hands it on
    for line in (["chat", model, question], ["explain", model, "--question", question]):
        result = run(*line, "--image", tmp_path / "a.png")
        assert result.exit_code == 2
        assert "not UTF-8" in result.stderr


def test_a_question_longer_than_the_context_is_refused(tmp_path):
    helpers.picture().save(tmp_path / "a.png")
    for line in (["chat", "tiny", "red " * 3000], ["explain", "tiny", "--question", "red " * 3000]):
        result = run(*line, "--image", tmp_path / "a.png")
        assert (result.exit_code, type(result.exception)) == (1, SystemExit)
        assert "tokens, the model takes 1024 with its answer" in " ".join(result.stderr.split())


def test_chat_without_a_template(model, tmp_path):
    shutil.copytree(model, tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").unlink()
    helpers.picture().save(tmp_path / "a.png")
    result = run("chat", tmp_path / "in", "what?", "--image", tmp_path / "a.png")
    assert result.exit_code == 1
    assert "no chat template" in result.stderr


@pytest.mark.parametrize("which", ["model", "small"])
def test_chat_with_a_damaged_model(request, tmp_path, which):
    folder = request.getfixturevalue(which)
    shutil.copytree(folder[0] if isinstance(folder, tuple) else folder, tmp_path / "in")
    weights = tmp_path / "in" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    helpers.picture().save(tmp_path / "a.png")
    result = run("chat", tmp_path / "in", "what?", "--image", tmp_path / "a.png")
    assert result.exit_code == 1
    assert "model.safetensors: the file is cut short" in result.stderr
    result = run("chat", tmp_path / "in", "what?", "--image", tmp_path / "a.png", "--device", "gpu")
    assert "'gpu' is not a device" in result.stderr


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (185, "3:05"), (3729, "1:02:09")])
def test_durations(seconds, text):
    assert output.duration(seconds) == text


def test_the_public_names_are_there():
    assert callable(llava_fa.compress)
    assert callable(llava_fa.approximate)
    assert set(llava_fa.__all__) <= set(dir(llava_fa))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        llava_fa.nonsense  # noqa: B018


def test_casp_is_told_and_shown(model, tmp_path):
    flags = ["--only", "*.self_attn", "--casp", "--casp-keep", "0.5"]
    result = run("compress", model, tmp_path / "out", *QUICK, *flags, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["budget"]["casp"] == {"keep": 0.5, "auto": False}
    widths = [layer["inner_rank"] for layer in report["layers"] if layer["name"].endswith("q_proj")]
    assert sorted(widths) == [0, 0, 12, 12]  # the language model's
    assert "12 L R" in run("inspect", tmp_path / "out", "--layers").stdout


def test_doctor_tells_what_runs_and_checks_it(monkeypatch):
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"]
    assert found["layer"]["float64"]["implementation"] == "pytorch"
    assert {check["level"] for check in found["checks"]} == set(found["kernels"]["available"])
    assert "float32" in run("doctor").stdout
    from llava_fa.kernels import doctor

    monkeypatch.setattr(doctor, "_EXACT", 0.0)
    result = run("doctor")
    if found["checks"]:
        assert result.exit_code == 1
        assert "WRONG: portable, rings 2, exact" in result.stdout


def test_doctor_fits_layers_on_a_gpu(monkeypatch):
    from llava_fa.kernels import doctor
    from llava_fa.solver import check

    gpu = {"device": "a GPU", "triton": "3", "implementation": "triton", "reason": "it is here"}
    known = doctor.diagnose() | {"gpu": gpu}
    monkeypatch.setattr(doctor, "diagnose", lambda: known | {"checks": list(known["checks"])})
    wrong = {"codes": "rings 6, without data", "level": "triton", "activations": "fitting", "error": 0.1, "ok": False}
    for row in (wrong, wrong | {"ok": True}):
        monkeypatch.setattr(check, "fitting_checks", lambda device, row=row: [row] if device.type == "cuda" else [])
        result = run("doctor")
        assert result.exit_code == (0 if row["ok"] else 1)
        assert ("WRONG: triton, rings 6, without data, fitting" in result.stdout) is not row["ok"]
        assert "1.0e-01 fitting" in result.stdout


def test_doctor_tells_what_would_serve_a_model(monkeypatch):
    from llava_fa.kernels import doctor
    from llava_fa.vllm import support

    monkeypatch.setattr(doctor, "diagnose", lambda: {"ok": True, "gpu": {"implementation": None}})
    told = []
    for version in (None, "0.31.0", "0.32.0"):
        monkeypatch.setattr(support, "vllm_version", lambda version=version: version)
        told.append(json.loads(run("doctor", "--json").stdout)["serving"])
    assert [one["auto"] for one in told] == ["transformers", "transformers", "vllm"]
    assert [one["vllm"]["version"] for one in told] == [None, "0.31.0", "0.32.0"]
    assert [one["vllm"]["supported"] for one in told] == [False, False, True]
    assert told[0]["reason"] == "vLLM is not installed"
    assert told[2] == {
        "vllm": {"version": "0.32.0", "supported": True},
        "auto": "vllm",
        "reason": "vLLM 0.32.0 is installed",
    }


def test_a_model_without_eyes_is_trained_on_the_worlds_texts(tmp_path):
    folder = helpers.save_text_model(tmp_path / "in")
    calibrated = ["--calibration", "world", "--samples", "2", "--device", "cpu"]
    result = run("compress", folder, tmp_path / "out", "--bits", "2", *calibrated, "--recover", "1")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == 1
    result = run("report", tmp_path / "out", "--out", tmp_path / "r.html")
    assert result.exit_code == 1
    assert "Ask none: --limit 0" in result.stderr
    assert run("report", tmp_path / "out", "--out", tmp_path / "r.html", "--limit", "0").exit_code == 0


def test_train(model, small, tmp_path):
    rows = [
        {
            "image": "p.png",
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}],
        }
    ]
    helpers.picture().save(tmp_path / "p.png")
    (tmp_path / "data.json").write_text(json.dumps(rows * 3))
    common = ["train", small[0], tmp_path / "out", "--data", tmp_path / "data.json", "--steps", "2", "--batch", "1"]
    for bad, message in (
        (["--data", "world", "--images", tmp_path], "LLaVA JSON file"),
        (["--lr", "0"], "rate is 0.0"),
    ):
        refused = run(*common, *bad)
        assert refused.exit_code == 2
        assert message in refused.output
    done = run(*common, "--teacher", model, "--rank", "2", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["steps"] == 2
    assert 0 < told["share"] < 1
    shown = run("inspect", tmp_path / "out")
    assert "trained: 2 steps" in shown.stdout
    again = run(*common)
    assert again.exit_code == 1
    assert "exists already" in again.output
    text = run(*["train", small[0], tmp_path / "text", *common[3:], "--kl", "0", "--ce", "1"])
    assert text.exit_code == 0, text.output
    assert "bits per weight" in text.stdout
