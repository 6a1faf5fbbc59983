"""eval, world and demo on the embedded model."""

import io
import json
from pathlib import Path

import official_files
import pytest
from rich.console import Console
from typer.testing import CliRunner

from llava_fa.cli.demo import table
from llava_fa.cli.main import app
from llava_fa.world.questions import TASKS


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_eval_json_is_one_object(tmp_path):
    result = run("eval", "tiny", "--limit", "18", "--json", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert set(values["tasks"]) == set(TASKS)
    assert (
        values["score"]
        == values["figures"]["accuracy"]
        == pytest.approx(sum(t["score"] for t in values["tasks"].values()) / len(TASKS))
    )
    rows = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert values["questions"] == len(rows) == sum(t["questions"] for t in values["tasks"].values())
    assert {"id", "task", "question", "pictures", "expected", "answer", "score"} == set(rows[0])


def test_eval_without_pictures_knows_less():
    seen, blank = (
        json.loads(run("eval", "tiny", "--limit", "54", "--json", *more).stdout)["score"] for more in ([], ["--blank"])
    )
    assert seen > blank + 0.25


def test_eval_refuses_an_unknown_task_and_a_missing_model(tmp_path):
    assert run("eval", "tiny", "--task", "gta").exit_code == 2
    assert run("eval", "tiny", "--task", "gqa").exit_code == 2  # needs --data
    assert run("eval", "tiny", "--task", "gqa", "--data", tmp_path).exit_code == 2  # and --out
    assert run("eval", "tiny", "--data", tmp_path).exit_code == 2  # the world needs none
    assert run("eval", "tiny", "--task", "gqa", "--data", tmp_path, "--out", tmp_path, "--seed", 1).exit_code == 2
    missing = run("eval", "./nowhere", "--json")
    assert missing.exit_code == 1
    assert "no such folder" in json.loads(missing.stdout)["error"]["message"]


def test_eval_names_an_out_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "no").write_text("")
    result = run("eval", "tiny", "--limit", "9", "--json", "--out", tmp_path / "no" / "run")
    assert result.exit_code == 1
    assert str(tmp_path / "no") in json.loads(result.stdout)["error"]["where"]


def test_eval_of_official_files_compares_two_runs(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    official_files.pope(data, 4)
    options = ("--task", "pope", "--data", data, "--batch-size", 6, "--json")
    first = run("eval", "tiny", *options, "--out", tmp_path / "seen")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["questions"] == 12
    second = run("eval", "tiny", *options[:-1], "--out", tmp_path / "blank", "--blank", "--against", tmp_path / "seen")
    assert second.exit_code == 0, second.output
    shown = " ".join(second.stdout.split())
    assert "F1, mean of the categories" in shown
    assert "questions lost" in shown
    assert "adversarial" in shown
    assert (tmp_path / "blank" / "changes.json").is_file()
    other = run("eval", "tiny", *options, "--out", tmp_path / "seen", "--blank")
    assert other.exit_code == 1
    assert "it holds another run: blank was False, is True" in json.loads(other.stdout)["error"]["message"]
    nothing = run("eval", "tiny", *options, "--out", tmp_path / "x", "--data", tmp_path / "seen")
    assert "pope needs coco_pope_random.json" in json.loads(nothing.stdout)["error"]["remedy"]


def test_world_sample_writes_what_it_says(tmp_path):
    result = run("world", "sample", tmp_path, "--count", "18", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    rows = json.loads(Path(values["file"]).read_text())
    assert len(rows) == values["questions"] >= 18
    assert all((tmp_path / row["image"]).is_file() for row in rows)
    assert rows[0]["conversations"][0]["value"].startswith("<image>\n")
    assert Path(values["overview"]).stat().st_size > 10_000
    assert run("world", "sample", tmp_path, "--split", "exam").exit_code == 2
    assert run("world", "train", tmp_path / "new", "--visual-tokens", "nan").exit_code == 2
    assert not (tmp_path / "new").exists()


def test_world_samples_serve_as_calibration_data(tmp_path):
    """The LLaVA-format JSON that `world sample` writes is what `compress --calibration` reads."""
    run("world", "sample", tmp_path / "world", "--count", "9", "--split", "train")
    out = tmp_path / "small"
    result = run(
        "compress", "tiny", out, "--bits", "4", "--calibration", tmp_path / "world" / "questions.json",
        "--samples", "3", "--only", "model.multi_modal_projector", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    layers = json.loads(result.stdout)["layers"]
    assert len(layers) == 2
    assert all(0 < layer["output_error"] < 0.2 for layer in layers)


def test_world_train_refuses_a_place_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("world", "train", tmp_path / "file" / "run", "--json")
    assert result.exit_code == 1
    assert "file" in json.loads(result.stdout)["error"]["where"]


def test_the_demo_table_has_a_column_a_model_and_fits_80_columns():
    tasks = {task: {"score": 0.5} for task in TASKS}
    row = {"name": "original", "bits_per_weight": 16.0, "bytes": 12e6, "accuracy": 0.5, "tasks": tasks, "questions": 9}
    shown = table(
        [
            row,
            *(
                {**row, "name": f"best-{bits}bit", "bytes": 3.4e6, "bits_per_weight": 4.12}
                for bits in (4, 3, 2, 4, 3, 2)
            ),
        ]
    )
    assert [column.header for column in shown.columns][:3] == ["", "original", "best\n4bit"]
    assert shown.row_count == 3 + len(TASKS)
    console = Console(width=80, file=io.StringIO())
    console.print(shown)
    text = console.file.getvalue()
    assert "…" not in text
    assert all(task in text for task in TASKS)


@pytest.mark.slow
def test_demo_runs_twice_in_the_same_folder(tmp_path):
    for _ in range(2):
        result = run("demo", "--out", tmp_path, "--limit", "9", "--samples", "2", "--json")
        assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [row["name"] for row in values["rows"]] == [
        "original",
        *(f"{method}-{bits}bit" for method in ("best", "paper") for bits in (4, 3, 2)),
    ]
    assert values == json.loads((tmp_path / "demo.json").read_text())
    bits = [row["bits_per_weight"] for row in values["rows"]]
    assert bits[1] > bits[2] > bits[3] > 2
