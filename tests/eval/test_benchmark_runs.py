"""Runs from official files to scores: the embedded model end to end, resuming, comparing, errors."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import official_files
import pytest
import torch
from PIL import Image

from llava_fa import FourierError
from llava_fa.eval import answerers
from llava_fa.eval.answerers import Loaded
from llava_fa.eval.benchmarks import WHERE, benchmark, kind_of
from llava_fa.eval.benchmarks.base import Item, open_picture
from llava_fa.eval.benchmarks.run import run
from llava_fa.hub.loading import load


@pytest.fixture(scope="module")
def tiny():
    return Loaded(*load("tiny", "cpu", torch.float32))


@pytest.fixture
def scripted(monkeypatch):
    """Answers without a model: what is asked for is logged, what is said comes from a dict of prompt → answer."""

    class Script:
        def __init__(self):
            self.asked, self.seen, self.said, self.die_after = [], [], {}, None

        def answer(self, model, processor, pairs, *, progress=None, **options):
            if self.die_after is not None and len(self.asked) >= self.die_after:
                raise KeyboardInterrupt
            self.asked += [prompt for _, prompt in pairs]
            self.seen += [picture for pictures, _ in pairs for picture in pictures]
            return [self.said.get(prompt, "Yes") for _, prompt in pairs]

    script = Script()
    monkeypatch.setattr(answerers, "answer", script.answer)
    return script


class Named:
    chat_template = "x"


def no_model():
    return Loaded(None, Named())


def files(name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    official_files.WRITERS[name](folder)
    return folder


@pytest.mark.parametrize("name", sorted(official_files.WRITERS))
def test_the_embedded_model_on_official_files(name, tiny, tmp_path):
    bench = benchmark(name, files(name, tmp_path / "data"))
    bench.max_new_tokens = 8  # the embedded model does not know these prompts: it need not ramble
    seen = []
    result = run(bench, lambda: tiny, model="tiny", out=tmp_path / "out", progress=lambda *now: seen.append(now))
    assert result["questions"] == len(bench.read()) == seen[-1][0] == seen[-1][1]
    assert 0 <= result["interval"][0] <= result["score"] <= result["interval"][1]
    for part in result["tasks"].values():
        assert 0 <= part["interval"][0] <= part["score"] <= part["interval"][1] <= 1
    assert sum(part["questions"] for part in result["tasks"].values()) in (0, result["questions"], 3, 2)
    rows = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert all(0 <= row["score"] <= 1 for row in rows)
    assert all(tmp_path / "data" in Path(p).parents for row in rows for p in row["pictures"])
    assert result["submission"]
    assert all(Path(path).stat().st_size > 0 for path in result["submission"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["score"] == result["score"]


def test_the_embedded_model_is_right_where_it_knows_the_question(tiny, tmp_path):
    """The world's own wording on GQA's files: seeing beats not seeing, by a paired test."""
    data = tmp_path / "data"
    data.mkdir()
    official_files.gqa(data, 24)
    results = []
    for blank in (False, True):
        bench = benchmark("gqa", data)
        bench.max_new_tokens = 4
        items = bench.read()
        plain = [type(i)(**{**vars(i), "prompt": i.prompt.split("\n")[0]}) for i in items]
        bench.read = lambda plain=plain: plain
        results.append(run(
            bench, lambda: tiny, model="tiny", out=tmp_path / f"out{blank}", blank=blank,
            against=tmp_path / "outFalse" if blank else None,
        ))  # fmt: skip
    assert results[0]["score"] > 0.8
    told = results[1]["against"]
    assert told["difference"] < -0.4
    assert told["p"] < 0.01
    assert told["test"] == "McNemar, exact"
    changes = json.loads((tmp_path / "outTrue" / "changes.json").read_text())
    assert len(changes) == told["lost"] + told["gained"]
    assert changes[0]["change"] == "lost"
    assert changes[0]["before"]["score"] == 1


def test_a_killed_run_goes_on(scripted, tmp_path):
    data, out = files("pope", tmp_path / "data"), tmp_path / "out"
    scripted.die_after = 8
    with pytest.raises(KeyboardInterrupt):
        run(benchmark("pope", data), no_model, model="m", out=out, batch_size=1)
    assert len(scripted.asked) == 8  # two rounds of four batches
    with (out / "predictions.jsonl").open("a") as stream:
        stream.write('{"id": "random/9", "que')  # killed in the middle of a line
    with (out / "predictions.jsonl").open("ab") as stream:
        stream.write("ü".encode()[:1])  # and of a letter
    scripted.die_after = None
    result = run(benchmark("pope", data), no_model, model="m", out=out, batch_size=1)
    assert result["resumed"] == 8
    assert len(scripted.asked) == result["questions"] == 18
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 18
    assert not list(out.rglob("*.new"))

    def never():
        raise AssertionError("a finished run needs no model")

    again = run(benchmark("pope", data), never, model="m", out=out, batch_size=5)
    assert (again["score"], again["resumed"]) == (result["score"], 18)


def test_a_folder_never_mixes_runs(scripted, tmp_path):
    data, out = files("pope", tmp_path / "data"), tmp_path / "out"
    run(benchmark("pope", data), no_model, model="m", out=out)
    with pytest.raises(FourierError, match="it holds another run: model was 'm', is 'other'"):
        run(benchmark("pope", data), no_model, model="other", out=out)
    with pytest.raises(FourierError, match="limit was None, is 6"):
        run(benchmark("pope", data), no_model, model="m", out=out, limit=6)
    path = data / "coco_pope_random.json"
    path.write_text(path.read_text().replace("Is there", "Do you see"))
    with pytest.raises(FourierError, match="question random/1 is not what it was"):
        run(benchmark("pope", data), no_model, model="m", out=out)
    with pytest.raises(FourierError, match="it is not empty, and no run"):
        run(benchmark("pope", data), no_model, model="m", out=data)


def test_a_limit_keeps_units_whole(scripted, tmp_path):
    data = files("mmbench", tmp_path / "data")
    result = run(benchmark("mmbench", data), no_model, model="m", limit=4)
    assert result["questions"] == 4  # two of three questions, two options each
    assert result["tasks"]["attribute"]["questions"] == 2
    assert result["out"] is None


def test_comparing_wants_the_same_questions(scripted, tmp_path):
    data = files("pope", tmp_path / "data")
    run(benchmark("pope", data), no_model, model="m", out=tmp_path / "few", limit=6)
    with pytest.raises(FourierError, match="12 of these 18 questions are not in it"):
        run(benchmark("pope", data), no_model, model="n", out=tmp_path / "all", against=tmp_path / "few")
    other = files("gqa", tmp_path / "gqa")
    with pytest.raises(FourierError, match="it is a run of pope"):
        run(benchmark("gqa", other), no_model, model="n", out=tmp_path / "x", against=tmp_path / "few")
    with pytest.raises(FourierError, match="it is no run"):
        run(benchmark("pope", data), no_model, model="n", out=tmp_path / "y", against=data)
    scripted.said = {item.prompt: "No" for item in benchmark("pope", data).read()}
    run(benchmark("pope", data), no_model, model="n", out=tmp_path / "all")
    # a part of the questions is compared with the run that has all
    told = run(benchmark("pope", data), no_model, model="o", out=tmp_path / "z", limit=6, against=tmp_path / "all")
    assert told["against"]["difference"] == 0
    assert told["against"]["answers_that_differ"] == 0


def test_ocr_prompts_are_taken_as_they_stand(tmp_path):
    data = files("textvqa", tmp_path)
    items = benchmark("textvqa", data).read()
    rows = [
        {
            "question_id": item.row["image_id"],
            "text": f"{item.prompt.splitlines()[0]}\nReference OCR token: X, Y\nAnswer",
        }
        for item in items
    ]
    (data / "llava_textvqa_val_v051_ocr.jsonl").write_text(official_files.lines(rows))
    told = benchmark("textvqa", data).read()
    assert [item.prompt for item in told] == [row["text"] for row in rows]
    assert benchmark("textvqa", data).score(told, ["x"] * len(told)).figures["ocr_tokens"] is True
    (data / "llava_textvqa_val_v051_ocr.jsonl").write_text(official_files.lines(rows[1:]))
    with pytest.raises(FourierError, match="it has no prompt for question 34602"):
        benchmark("textvqa", data).read()


def test_questions_begin_with_their_only_capital_as_in_llavas_files(tmp_path):
    for name, file in (("textvqa", "TextVQA_0.5.1_val.json"), ("vizwiz", "val.json")):
        path = files(name, tmp_path / name) / file
        content = json.loads(path.read_text())
        rows = content["data"] if name == "textvqa" else content
        rows[0]["question"], rows[1]["question"] = "is this denny's?", "How long do I bake this? Thanks. "
        path.write_text(json.dumps(content))
        told = [item.prompt.split("\n")[0] for item in benchmark(name, path.parent).read()[:2]]
        assert told == ["Is this denny's?", "How long do i bake this? thanks. "]


def test_prompts_are_llavas(tmp_path):
    told = {name: benchmark(name, files(name, tmp_path / name)).read()[0].prompt for name in official_files.WRITERS}
    short = "\nAnswer the question using a single word or phrase."
    for name in ("pope", "textvqa", "vizwiz", "gqa", "mme"):
        assert told[name].endswith(short), name
    assert "Please answer yes or no" not in told["mme"]
    unanswerable = "When the provided information is insufficient, respond with 'Unanswerable'."
    assert told["vizwiz"].splitlines()[1] == unanswerable
    assert told["scienceqa"].startswith("Context: look\n")
    assert told["scienceqa"].splitlines()[-2:] == [
        "B. nothing",
        "Answer with the option's letter from the given choices directly.",
    ]


BROKEN = {
    "pope": ("coco_pope_random.json", r"it is not JSON \(line 3, column \d+: .*\)\. It seems to be cut short"),
    "textvqa": ("TextVQA_0.5.1_val.json", "it is not JSON"),
    "vizwiz": ("val.json", "it is not JSON"),
    "gqa": ("testdev_balanced_questions.json", "it is not JSON"),
    "scienceqa": ("problems.json", "it is not JSON"),
    "mme": ("existence/00000.txt", "it has 1 questions, not 2"),
    "mmbench": ("mmbench_dev_20230712.tsv", "has not as many cells as the header"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_file_that_was_cut_short_is_named(name, tmp_path):
    data = files(name, tmp_path)
    file, message = BROKEN[name]
    text = (data / file).read_text()
    cut = text.index("\n") + 1 if name == "mme" else len(text) // 2
    (data / file).write_text(text[: cut if name != "pope" else text.index("\n", text.index("\n") + 1) + 20])
    with pytest.raises(FourierError, match=message) as caught:
        benchmark(name, data).read()
    assert file.rpartition("/")[2].partition(".")[0] in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", sorted(official_files.WRITERS))
def test_files_with_a_byte_order_mark_are_the_same_files(scripted, name, encoding, tmp_path):
    """As editors and spreadsheets write them."""
    data = files(name, tmp_path / "data")
    run(benchmark(name, data), no_model, model="m", out=tmp_path / "a")
    for path in data.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".txt", ".tsv"):
            path.write_bytes(path.read_text().replace("\n", "\r\n").encode(encoding))
    run(benchmark(name, data), no_model, model="m", out=tmp_path / "b")
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file() and path.name != "results.json":
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
            assert b"\xef\xbb\xbf" not in path.read_bytes()


@pytest.mark.parametrize("name", sorted(official_files.WRITERS))
def test_files_in_another_encoding_are_named(name, tmp_path):
    data = files(name, tmp_path)
    for path in data.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".txt", ".tsv"):
            path.write_bytes(path.read_bytes() + b"\xe9")
    with pytest.raises(FourierError, match=r"it is not UTF-8: byte 0xe9 at offset \d+ \(line \d+\)\. Convert it"):
        benchmark(name, data).read()


def test_pictures_are_upright_and_of_eight_bits(scripted, tmp_path):
    data = files("gqa", tmp_path / "data")
    whole = Image.open(data / "images" / "n0.jpg").convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    whole.transpose(Image.Transpose.ROTATE_90).save(data / "images" / "n0.jpg", "PNG", exif=exif)
    Image.fromarray(np.asarray(whole).astype(np.uint16) * 256).save(data / "images" / "n1.jpg", "PNG")
    run(benchmark("gqa", data), no_model, model="m", batch_size=1)
    assert [picture.tobytes() for picture in scripted.seen[:2]] == [whole.convert("RGB").tobytes()] * 2
    mark = io.BytesIO()
    Image.open(data / "images" / "n0.jpg").save(mark, "PNG", exif=exif)
    item = Item("0", "q", (base64.b64encode(mark.getvalue()).decode(),))
    assert open_picture(item.pictures[0], "").tobytes() == whole.convert("RGB").tobytes()
    with pytest.raises(FourierError, match=r"question 0: 'not.* is no picture in base64"):
        open_picture("not base64!" * 1000, "question 0")


@pytest.mark.parametrize("name", sorted(official_files.WRITERS))
def test_missing_files_are_named_with_what_belongs_there(name, tmp_path):
    with pytest.raises(FourierError) as caught:
        benchmark(name, tmp_path).read()
    assert kind_of(name).files in caught.value.remedy
    with pytest.raises(FourierError, match="no such folder"):
        benchmark(name, tmp_path / "nowhere")


def test_missing_and_broken_pictures_are_named(scripted, tmp_path):
    data = files("gqa", tmp_path / "data")
    (data / "images" / "n3.jpg").write_bytes(b"no picture")
    with pytest.raises(FourierError, match=r"question 20003: image .*n3\.jpg cannot be read"):
        run(benchmark("gqa", data), no_model, model="m")
    (data / "images" / "n3.jpg").unlink()
    with pytest.raises(FourierError, match=r"1 pictures are missing, the first is .*n3\.jpg"):
        run(benchmark("gqa", data), no_model, model="m")


def test_every_task_is_named_as_it_calls_itself():
    assert all(kind_of(name).name == name for name in WHERE)
    with pytest.raises(FourierError, match="there is no task 'gta'"):
        kind_of("gta")
