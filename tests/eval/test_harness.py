"""The adapter for lmms-eval, run by lmms-eval itself on local tasks of the world, without a network.

`make test-harness` installs lmms-eval in an environment of its own; elsewhere they are skipped.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_fa import FourierConfig, FourierError, compress
from llava_fa.eval.answerers import Loaded
from llava_fa.eval.benchmarks import benchmark
from llava_fa.eval.benchmarks.run import run
from llava_fa.eval.likelihood import log_likelihood
from llava_fa.eval.runner import answer
from llava_fa.hub.loading import load
from llava_fa.world.samples import held_out_samples
from llava_fa.world.video import video_samples

TASKS = ("attributes", "relations", "counting", "reading", "unanswerable")
"""Those whose score is a mean over questions: a harness knows no pairs and rotations."""
LIMIT = 90
FRAMES = 4
"""All that a clip of the world has."""
with_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: make test-harness"
)

UTILS = """
import glob
from llava_fa.eval.metrics import exact_match

def pictures(doc):
    return [doc["image"].convert("RGB")] if doc["image"] is not None else [doc["clip"]]

def score(doc, results):
    return {doc["task"]: exact_match([results[0]], [doc["answer"]])}

def expected(doc, results):
    ((value, greedy),) = results  # lmms-eval's own reading of it fails: it forgets that there is one
    return {"perplexity": value, "acc": greedy}
"""
TASK = """
task: {name}
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: {split}
output_type: {kind}
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
"""
GENERATED = """
process_results: !function utils.score
generation_kwargs: {{max_new_tokens: 48, temperature: 0, until: ["\\n\\n"]}}
metric_list:
{metrics}
"""


def write_tasks(folder: Path) -> None:
    """Three local tasks: answers to questions and clips, options to choose from, right answers to expect."""
    import datasets

    names = ("image", "clip", "question", "answer", "task")
    rows = [
        (s.image, None, s.question.text, s.question.answer, s.question.task)
        for s in held_out_samples(LIMIT)
        if s.question.task in TASKS
    ]
    asked = [(*row[:4], "yes") for row in rows if row[3] in ("yes", "no")]
    asked += [
        (s.image, None, s.question.text, s.question.answer, "yes")
        for s in held_out_samples(LIMIT)
        if s.question.task in ("existence", "paired")
    ]
    films = []
    for number, sample in enumerate(clips()):
        place = folder / "clips" / f"{number:02}"
        place.mkdir(parents=True)
        for index, frame in enumerate(sample.frames):
            frame.save(place / f"{index:02}.png")
        films.append((None, str(place), sample.question.text, sample.question.answer, "video"))
    features = datasets.Features(
        {name: datasets.Image() if name == "image" else datasets.Value("string") for name in names}
    )
    splits = {
        name: datasets.Dataset.from_dict(dict(zip(names, zip(*some, strict=True), strict=True)), features=features)
        for name, some in (("asked", rows), ("chosen", asked), ("filmed", films))
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder / "data"))
    (folder / "utils.py").write_text(UTILS)

    def write(name: str, split: str, kind: str, target: str, more: str) -> None:
        told = TASK.format(name=name, data=folder / "data", split=split, kind=kind, target=target, more=more)
        (folder / f"{name}.yaml").write_text(told)

    def generated(tasks: tuple[str, ...]) -> str:
        lines = (f"- {{metric: {task}, aggregation: mean, higher_is_better: true}}" for task in tasks)
        return GENERATED.format(metrics="\n".join(lines))

    write("llava_fa_asked", "asked", "generate_until", '"{{answer}}"', generated(TASKS))
    write("llava_fa_filmed", "filmed", "generate_until", '"{{answer}}"', generated(("video",)))
    chosen = 'doc_to_choice: ["yes", "no"]\nmetric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}'
    write("llava_fa_chosen", "chosen", "multiple_choice", "\"{{['yes', 'no'].index(answer)}}\"", chosen)
    expected = (
        "process_results: !function utils.expected\n"
        "metric_list:\n- {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
        "- {metric: acc, aggregation: mean, higher_is_better: true}"
    )
    write("llava_fa_expected", "asked", "loglikelihood", '"{{answer}}"', expected)


def clips():
    return video_samples("test", 0, 2)


def lmms_eval(folder: Path, out: Path, model_args: str, *tasks: str) -> tuple[dict, dict]:
    """(results by task, logged samples by task) of lmms-eval's own command."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    options = {
        "--model": "llava_fa",
        "--model_args": model_args,
        "--tasks": ",".join(tasks),
        "--include_path": str(folder),
        "--batch_size": "8",
        "--output_path": str(out),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *(word for pair in options.items() for word in pair), "--log_samples"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
        check=False,
    )
    told = ended.stdout[-3000:] + ended.stderr[-6000:]
    assert ended.returncode == 0, told
    (results,) = list(out.rglob("*results.json")) or [told]  # it exits with 0 after errors too
    assert isinstance(results, Path), told
    samples = {}
    for task in tasks:
        (path,) = out.rglob(f"*samples_{task}.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        samples[task] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(results.read_text())["results"], samples


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@with_lmms_eval
@pytest.mark.slow
def test_lmms_eval_comes_to_our_scores_on_the_same_questions(tasks, tmp_path):
    names = ["llava_fa_asked", "llava_fa_filmed", "llava_fa_chosen", "llava_fa_expected"]
    results, samples = lmms_eval(tasks, tmp_path, f"pretrained=tiny,dtype=float32,max_frames_num={FRAMES}", *names)

    model, processor = load("tiny", "cpu", torch.float32)
    ours = run(benchmark("world", limit=LIMIT, seed=0), lambda: Loaded(model, processor), model="tiny")
    for task in TASKS:
        assert results["llava_fa_asked"][f"{task},none"] == pytest.approx(ours["tasks"][task]["score"])
    assert 0 < sum(ours["tasks"][task]["score"] for task in TASKS) < len(TASKS)
    asked = [s for s in held_out_samples(LIMIT) if s.question.task in TASKS]
    told = answer(model, processor, [(s.image, s.question.text) for s in asked])
    assert [row["filtered_resps"] for row in samples["llava_fa_asked"]] == told

    shown = [(s.frames, s.question.text) for s in clips()]
    told = answer(model, processor, shown)
    assert [row["filtered_resps"] for row in samples["llava_fa_filmed"]] == told

    chosen = [s for s in held_out_samples(LIMIT) if s.question.answer in ("yes", "no")]
    chosen = sorted(chosen, key=lambda s: s.question.task not in TASKS)
    right = 0
    for sample, row in zip(chosen, samples["llava_fa_chosen"], strict=True):
        triples = [(sample.image, sample.question.text, option) for option in ("yes", "no")]
        yes, no = (value for value, _ in log_likelihood(model, processor, triples))
        right += ("yes" if yes > no else "no") == sample.question.answer
        assert [float(value[0]) for value in row["filtered_resps"]] == pytest.approx([-yes, -no], abs=1e-3)
    assert results["llava_fa_chosen"]["acc,none"] == pytest.approx(right / len(chosen))
    assert right / len(chosen) > 0.6  # were the sign wrong, it would be below a half

    logs = log_likelihood(model, processor, [(s.image, s.question.text, s.question.answer) for s in asked])
    mean = sum(value for value, _ in logs) / len(logs)
    assert results["llava_fa_expected"]["perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-3)
    assert results["llava_fa_expected"]["acc,none"] == pytest.approx(sum(greedy for _, greedy in logs) / len(logs))


@with_lmms_eval
@pytest.mark.slow
def test_a_compressed_model_with_fewer_visual_tokens(tasks, tmp_path):
    compress("tiny", tmp_path / "small", FourierConfig(bits=3.0))
    arguments = f"pretrained={tmp_path / 'small'},visual_tokens=16,dtype=float32"
    _, samples = lmms_eval(tasks, tmp_path / "out", arguments, "llava_fa_asked")
    model, processor = load(tmp_path / "small", "cpu", torch.float32, visual_tokens=16)
    asked = [(s.image, s.question.text) for s in held_out_samples(LIMIT) if s.question.task in TASKS]
    told = answer(model, processor, asked)
    assert [row["filtered_resps"] for row in samples["llava_fa_asked"]] == told
    whole, processor = load("tiny", "cpu", torch.float32)
    assert told != answer(whole, processor, asked)


@with_lmms_eval
@pytest.mark.filterwarnings("ignore")  # lmms-eval's own
class TestAdapter:
    """What lmms-eval's command does not show: settings, errors, films."""

    @pytest.fixture(scope="class")
    def adapter(self):
        from llava_fa.eval.harness.model import LlavaFA

        return LlavaFA(pretrained="tiny", device="cpu", batch_size="2", max_frames_num=3)

    def test_settings_of_tasks(self):
        from llava_fa.eval.harness.model import settings

        greedy = {"until": [], "max_new_tokens": 1024, "sampling": {"do_sample": False}}
        assert settings({}) == greedy
        assert settings({"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False})["sampling"] == {
            "do_sample": False,
            "num_beams": 1,
        }
        assert settings({"do_sample": True, "temperature": 0}) == greedy
        assert settings({"do_sample": False, "temperature": 0.7}) == greedy
        assert settings({"temperature": 0.7, "top_p": 0.9, "until": "\n", "max_new_tokens": 5}) == {
            "until": ["\n"],
            "max_new_tokens": 5,
            "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        }
        assert settings({"max_gen_toks": 7, "image_aspect_ratio": "pad"})["max_new_tokens"] == 7
        with pytest.raises(FourierError, match="does not know the setting best_of"):
            settings({"best_of": 3})

    def test_arguments_that_cannot_be(self):
        from llava_fa.eval.harness.model import LlavaFA

        with pytest.raises(FourierError, match="--model_args: llava_fa does not know conv_template"):
            LlavaFA(pretrained="tiny", conv_template="vicuna_v1")
        with pytest.raises(FourierError, match="batch_size is 'auto'"):
            LlavaFA(pretrained="tiny", batch_size="auto")
        with pytest.raises(FourierError, match="visual_tokens is 0"):
            LlavaFA(pretrained="tiny", visual_tokens=0)
        with pytest.raises(FourierError, match="dtype 'int4'"):
            LlavaFA(pretrained="tiny", dtype="int4")
        with pytest.raises(FourierError, match="no such folder"):
            LlavaFA(pretrained="./nowhere")

    def test_requests_that_it_cannot_answer(self, adapter):
        from lmms_eval.api.instance import Instance

        metadata = {"task": "talk", "doc_id": 0, "repeats": 1}
        with pytest.raises(FourierError, match=r"task talk: .* this task is a conversation"):
            adapter.generate_until_multi_round([Instance("generate_until_multi_round", (), 0, metadata)])
        with pytest.raises(FourierError, match=r"task talk: .* without its question"):
            adapter.loglikelihood([Instance("loglikelihood", ("", "red"), 0, metadata)])

    def test_films_pictures_and_what_is_neither(self, adapter, tmp_path):
        import av

        frames = video_samples("test", 0, 1)[0].frames
        with av.open(str(tmp_path / "film.mp4"), "w") as film:
            stream = film.add_stream("mpeg4", rate=4)
            stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
            for frame in frames:
                film.mux(stream.encode(av.VideoFrame.from_image(frame)))
            film.mux(stream.encode())
        frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / "still.png")
        docs = [
            {"seen": [str(tmp_path / "film.mp4")]},
            {"seen": [str(tmp_path / "film.gif"), frames[0]]},
            {"seen": [str(tmp_path / "still.png"), list(frames)]},
            {"seen": [{"array": [0.1], "sampling_rate": 16000}]},
            {"seen": None},
            {"seen": [str(tmp_path / "lost.mp4")]},
        ]
        adapter.task_dict["films"] = {"test": docs}
        seen = [adapter._seen(lambda doc: doc["seen"], i, "films", "test") for i in (0, 1, 2, 4)]
        assert [len(some) for some in seen] == [min(3, len(frames)), min(3, len(frames)) + 1, 1 + len(frames), 0]
        assert all(picture.size == frames[0].size and picture.mode == "RGB" for some in seen for picture in some)
        assert seen[2][0].tobytes() == frames[0].convert("RGB").tobytes()
        with pytest.raises(FourierError, match="task films, document 3: it shows a dict"):
            adapter._seen(lambda doc: doc["seen"], 3, "films", "test")
        with pytest.raises(FourierError, match=r"document 5: .*lost\.mp4 cannot be read"):
            adapter._seen(lambda doc: doc["seen"], 5, "films", "test")
