"""Object-HalBench by hand, questions about clips, and both from files to scores."""

import base64
import io
import json

import pytest
import torch
from PIL import Image

from llava_fa import FourierError
from llava_fa.eval.answerers import Loaded
from llava_fa.eval.benchmarks import benchmark
from llava_fa.eval.benchmarks.base import open_picture
from llava_fa.eval.benchmarks.captions import Synonyms
from llava_fa.eval.benchmarks.run import run
from llava_fa.eval.benchmarks.video import _even
from llava_fa.hub.loading import load
from llava_fa.world.samples import samples
from llava_fa.world.video import video_samples

TABLE = """person, man, woman, child, rider
bird, duck
dog, puppy
hot dog
chair, seat
toilet
knife
bus
dining table, table
train
tie, bow tie
wine glass
"""


@pytest.fixture
def synonyms(tmp_path):
    (tmp_path / "synonyms.txt").write_text(TABLE)
    return Synonyms(tmp_path / "synonyms.txt")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A man rides past two ducks.", ["person", "bird"]),
        ("Women and children, knives and buses", ["person", "person", "knife", "bus"]),
        ("a hot dog, not the dog's hot dogs", ["hot dog", "dog", "hot dog"]),
        ("a baby bird", ["bird"]),
        ("a child bird", ["person", "bird"]),
        ("the seat of the toilet", ["toilet"]),
        ("a toilet seat and a chair", ["toilet", "chair"]),
        ("a passenger train on the train tracks at home plate", ["train"]),
        ("wine glasses on a dining table", ["wine glass", "dining table"]),
        ("a man in a bow tie", ["person", "tie"]),
        ("nothing of the kind", []),
    ],
)
def test_mentions_follow_chairs_rules(synonyms, text, named):
    assert synonyms.mentions(text) == named


def halbench(folder, answers_about=(("dog", "a man with a dog"), ("bus", "a bus"), ("tie", "a tie"))):
    """A picture of the world a row; COCO's files say what the test wants to be there."""
    folder.mkdir(exist_ok=True)
    (folder / "synonyms_refine.txt").write_text(TABLE)
    rows, segments, captions = [], [], []
    names = ["dog", "bus", "tie"]
    for number, (name, caption) in enumerate(answers_about):
        png = io.BytesIO()
        samples("test", 1, 3, ("caption",))[number].image.save(png, "PNG")
        image = base64.b64encode(png.getvalue()).decode()
        rows.append({"image_id": 100 + number, "question": "Describe the image.", "image": image})
        segments.append({"image_id": 100 + number, "category_id": names.index(name)})
        captions += [{"image_id": 100 + number, "caption": caption}, {"image_id": 7, "caption": "a train"}]
    (folder / "obj_halbench_300_with_image.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "annotations").mkdir(exist_ok=True)
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    write = {"instances": {"categories": categories, "annotations": segments}, "captions": {"annotations": captions}}
    for kind, content in write.items():
        (folder / "annotations" / f"{kind}_val2014.json").write_text(json.dumps(content))
    return folder


def test_chair_by_hand(tmp_path):
    bench = benchmark("object-halbench", halbench(tmp_path))
    items = bench.read()
    assert [item.expected for item in items] == [["dog", "person"], ["bus"], ["tie"]]
    answers = ["A man, a puppy and a train. Another train.", "A bus stops.", "Nothing."]
    scored = bench.score(items, answers)
    assert scored.figures == {
        "response": 0.5, "mention": 2 / 5, "recall": 3 / 4, "silent": pytest.approx(1 / 3), "words": 13 / 3,
    }  # fmt: skip
    assert scored.correct == {"0/100": 0.0, "1/101": 1.0, "2/102": None}
    assert scored.read["0/100"] == {"absent": ["train", "train"], "named": ["dog", "person"]}
    assert bench.headline(scored.statistics.sum(0)) == 0.5
    (path,) = bench.submission(items, answers, tmp_path)
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {"image_id": 100, "question": "Describe the image.", "answer": answers[0]}


def test_object_halbench_says_what_is_missing(tmp_path):
    folder = halbench(tmp_path)
    (folder / "synonyms_refine.txt").write_text("person\n")
    with pytest.raises(FourierError, match="'dog' is not in the table of synonyms"):
        benchmark("object-halbench", folder).read()
    halbench(tmp_path)
    (folder / "annotations" / "instances_val2014.json").write_text('{"categories": [], "annotations": []}')
    (folder / "annotations" / "captions_val2014.json").write_text('{"annotations": []}')
    with pytest.raises(FourierError, match="COCO's files say nothing of picture 100"):
        benchmark("object-halbench", folder).read()
    (folder / "annotations" / "captions_val2014.json").unlink()
    with pytest.raises(FourierError, match="no such file") as caught:
        benchmark("object-halbench", folder).read()
    assert "captions_val2014.json" in caught.value.where


def test_frames_are_evenly_spaced():
    assert _even(3, 8) == [0, 1, 2]
    assert _even(8, 4) == [1, 3, 5, 7]
    assert _even(100, 1) == [50]


def clips(folder):
    rows = []
    for number, s in enumerate(video_samples("test", 0, 1)):
        if number % 2:
            s.frames[0].save(folder / f"{number}.gif", save_all=True, append_images=s.frames[1:], duration=100)
        else:
            (folder / str(number)).mkdir()
            for place, frame in enumerate(s.frames):
                frame.save(folder / str(number) / f"{place:03}.png")
        name = f"{number}.gif" if number % 2 else str(number)
        rows.append({"video": name, "question": s.question.text, "answer": s.question.answer, "task": s.question.task})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_clips_and_descriptions_from_files_to_scores(tmp_path):
    tiny = Loaded(*load("tiny", "cpu", torch.float32))
    data = tmp_path / "clips"
    data.mkdir()
    bench = benchmark("video", clips(data), frames=2)
    assert [len(item.pictures) for item in bench.read()] == [2, 2, 2]
    bench.max_new_tokens = 4
    result = run(bench, lambda: tiny, model="tiny", out=tmp_path / "a")
    assert set(result["tasks"]) == {"motion", "order", "count"}
    bench = benchmark("object-halbench", halbench(tmp_path / "hal"))
    bench.max_new_tokens = 40
    first = run(bench, lambda: tiny, model="tiny", out=tmp_path / "b")
    assert first["figures"]["silent"] == 1.0  # it knows circles and stars, no dogs
    assert json.loads((tmp_path / "b" / "answers.json").read_text())[0]["answer"]


def test_clips_by_hand_and_broken_ones(tmp_path):
    (tmp_path / "a").mkdir()
    samples("test", 0, 1, ("caption",))[0].image.save(tmp_path / "a" / "1.png")
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"video": "a", "question": "q", "answer": ["Left", "west"]}) + "\n")
    bench = benchmark("video", tmp_path, frames=4)
    items = bench.read()
    assert [bench.score(items, [text]).figures["accuracy"] for text in ("the left.", "WEST", "right")] == [1, 1, 0]
    for row, message in (
        ({"video": "b", "question": "q"}, "b does not exist"),
        ({"question": "q"}, "it has no 'video'"),
    ):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(FourierError, match=message):
            benchmark("video", tmp_path, frames=4).read()
    (tmp_path / "c.mp4").write_bytes(b"no film")
    path.write_text(json.dumps({"video": "c.mp4", "question": "q"}) + "\n")
    with pytest.raises(FourierError, match="cannot be read") as caught:
        benchmark("video", tmp_path, frames=4).read()
    assert "ffmpeg" in caught.value.remedy


def test_an_answer_of_0_and_clips_that_lie_on_their_side(tmp_path):
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "a" / "1.png", exif=exif)
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("green", "red")]
    frames[0].save(tmp_path / "b.webp", save_all=True, append_images=frames[1:], exif=exif)
    rows = [{"video": "a", "question": "q", "answer": 0}, {"video": "b.webp", "question": "q", "answer": [1, "one"]}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench = benchmark("video", tmp_path, frames=4)
    items = bench.read()
    assert bench.score(items, ["0", "one."]).figures["accuracy"] == 1
    assert bench.score(items, ["1", "0"]).figures["accuracy"] == 0
    assert [open_picture(picture, "").size for item in items for picture in item.pictures] == [(4, 6)] * 3


def test_a_table_of_synonyms_with_a_mark_and_odd_signs(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_bytes("dog, puppy\u2028small\r\ncat, kitten\r\n".encode("utf-8-sig"))
    assert Synonyms(path).names == {"dog": "dog", "puppy\u2028small": "dog", "cat": "cat", "kitten": "cat"}
