"""Where samples come from: the same rows for calibration and for training."""

import json
import sys
import types

import helpers
import pytest

from llava_fa import FourierError
from llava_fa.data.rows import Rows, SampleSource, candidates
from llava_fa.data.samples import chat_messages


def taken(samples):
    """Comparable: what is said, and the pictures' bytes."""
    return [
        (messages, [image.tobytes() for image in images])
        for messages, images in (chat_messages(sample, "") for sample in samples)
    ]


def read_samples(source, **options):
    return list(SampleSource(str(source), **options))


@pytest.fixture
def llava_json(tmp_path):
    """Ten rows in the LLaVA format with pictures in a subfolder, and one without a picture."""
    (tmp_path / "pictures").mkdir()
    rows = []
    for i in range(10):
        helpers.picture(i).save(tmp_path / "pictures" / f"{i}.png")
        turns = [
            {"from": "human", "value": f"<image>\nquestion {i}?"},
            {"from": "gpt", "value": f"answer {i}"},
        ]
        rows.append({"id": i, "image": f"pictures/{i}.png", "conversations": turns})
    turns = [{"from": "human", "value": "question 10?"}, {"from": "gpt", "value": "answer 10"}]
    rows.append({"id": 10, "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data.json"


def change(path, function):
    rows = json.loads(path.read_text())
    function(rows)
    path.write_text(json.dumps(rows))


def test_llava_json(llava_json):
    samples = read_samples(llava_json, count=4, seed=1)
    assert len(samples) == 4
    user, assistant = samples[0]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    picture, text = user["content"]
    number = int(text["text"].removeprefix("question ").rstrip("?"))
    assert picture["image"].tobytes() == helpers.picture(number).tobytes()
    assert assistant["content"][0]["text"] == f"answer {number}"


def test_the_draw_is_seeded_and_never_takes_more_than_there_are(llava_json):
    def texts(seed, count=5):
        return [sample[0]["content"][-1]["text"] for sample in read_samples(llava_json, count=count, seed=seed)]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)
    assert texts(0, count=99) == [f"question {i}?" for i in range(11)]


def test_training_reads_what_calibration_reads(llava_json):
    for count in (4, 11):
        rows = Rows(str(llava_json), count=count, seed=3)
        assert taken(rows) == taken(read_samples(llava_json, count=count, seed=3))
        drawn = [candidate.where for candidate in SampleSource(str(llava_json), count=count, seed=3).candidates()]
        assert [rows.where(i) for i in range(count)] == drawn[:count]
        assert sorted(drawn) == sorted(f"data.json row {i}" for i in range(11))
    assert len(Rows(str(llava_json))) == 11


def test_question_and_answer_in_a_json(llava_json):
    def plain(rows):
        rows[2] = {"image": "pictures/2.png", "question": "what?", "answer": 0}

    change(llava_json, plain)
    for samples in (Rows(str(llava_json)), read_samples(llava_json)):
        messages, (picture,) = chat_messages(samples[2], "")
        assert picture.tobytes() == helpers.picture(2).tobytes()
        assert messages[1]["content"] == [{"type": "text", "text": "0"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_lines_with_odd_signs_and_an_image_folder_elsewhere(llava_json, tmp_path, encoding):
    lines = tmp_path / "lines.jsonl"
    rows = json.loads(llava_json.read_text())
    for row in rows[:10]:
        row["image"] = row["image"].removeprefix("pictures/")
        row["conversations"][1]["value"] = "one\u2028two\u0085three"
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    lines.write_bytes(text.encode(encoding))
    samples = read_samples(lines, images=tmp_path / "pictures")
    assert len(samples) == 11
    assert samples[0][1]["content"][0]["text"] == "one\u2028two\u0085three"
    assert taken(samples) == taken(Rows(str(lines), images=tmp_path / "pictures"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows[3].update(image="gone.png"), r"data\.json row 3: image .*gone\.png does not exist"),
        (lambda rows: rows[3].update(image="data.json"), r"data\.json row 3: image .*data\.json cannot be read"),
        (lambda rows: rows[3].pop("conversations"), 'row 3: it has no "conversations"'),
        (lambda rows: rows[3].update(conversations=[{"value": "?"}]), "row 3: a turn is"),
        (lambda rows: rows[3].pop("image"), "row 3: it has more <image> marks than images"),
        (lambda rows: rows.append(1), r"it is not a list of objects \(row 11 is of type int\)"),
    ],
)
def test_bad_rows_are_named(llava_json, edit, message):
    change(llava_json, edit)
    for read in (read_samples, lambda path: list(Rows(str(path)))):
        with pytest.raises(FourierError, match=message):
            read(llava_json)


def test_bad_files(tmp_path, llava_json):
    for read in (read_samples, lambda path, **options: list(Rows(str(path), **options))):
        with pytest.raises(FourierError, match="no such file"):
            read(tmp_path / "none.json")
        (tmp_path / "bad.json").write_text("{")
        with pytest.raises(FourierError, match=r"bad\.json: it is not JSON \(line 1, column 2"):
            read(tmp_path / "bad.json")
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(FourierError, match="it has no rows"):
            read(tmp_path / "empty.jsonl")
        with pytest.raises(FourierError, match="no such image folder"):
            read(llava_json, images=tmp_path / "nowhere")
        with pytest.raises(FourierError, match="an image folder goes with a LLaVA JSON file"):
            read("someone/some-vqa", images=tmp_path)
    with pytest.raises(FourierError, match=r"0 samples\. Give at least 1"):
        SampleSource("x.json", count=0)


def test_candidates_of_samples_in_memory():
    found = list(candidates([("a", "b", "c"), ("d", "e", "f")]))
    assert [candidate.where for candidate in found] == ["calibration sample 0", "calibration sample 1"]
    assert [candidate.open() for candidate in found] == [("a", "b", "c"), ("d", "e", "f")]


def test_a_dataset_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FourierError, match=r"needs the package `datasets`\. `pip install datasets`"):
        read_samples("someone/some-vqa")


class Stream:
    """What `datasets` gives for one split that is streamed, as far as it is used."""

    def __init__(self, *rows):
        self.rows = rows

    def __getitem__(self, index):  # as torch's base class of both kinds of dataset has it
        raise NotImplementedError

    def shuffle(self, **_):
        return iter(self.rows) if not callable(self.rows[0]) else self.rows[0]()


def streamed(monkeypatch, *rows):
    stub = types.SimpleNamespace(load_dataset=lambda name, streaming: {"test": Stream(), "train": Stream(*rows)})
    monkeypatch.setitem(sys.modules, "datasets", stub)


def test_a_stream_gives_what_is_asked_for(monkeypatch):
    streamed(monkeypatch, *({"image": helpers.picture(i), "question": f"{i}?", "answer": i} for i in range(5)))
    samples = read_samples("someone/some-vqa", count=3)
    assert [sample[1]["content"][0]["text"] for sample in samples] == ["0", "1", "2"]
    streamed(monkeypatch, lambda: iter(()))
    with pytest.raises(FourierError, match="someone/some-vqa: it has no rows"):
        read_samples("someone/some-vqa")


def test_a_dataset_that_fails(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no network " + 4000 * "x")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    for read in (read_samples, Rows):
        with pytest.raises(FourierError, match=r"the dataset cannot be read \(ConnectionError: no network") as caught:
            read("someone/some-vqa")
        assert len(str(caught.value)) < 700


def test_a_picture_that_a_stream_cannot_decode_is_counted(monkeypatch):
    def rows():
        yield {"image": helpers.picture(), "question": "q?", "answer": "a"}
        raise OSError("cannot identify image file")

    streamed(monkeypatch, rows)
    with pytest.raises(FourierError, match=r"someone/some-vqa sample 1: the dataset cannot be read \(OSError"):
        read_samples("someone/some-vqa")


def test_a_picture_that_a_dataset_cannot_decode_has_its_row(monkeypatch):
    class Table:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise OSError("cannot identify image file")
            return {"image": helpers.picture(), "question": "q?", "answer": "a"}

    stub = types.SimpleNamespace(load_dataset=lambda name, streaming: {"train": Table()})
    monkeypatch.setitem(sys.modules, "datasets", stub)
    rows = Rows("someone/some-vqa")
    assert len(rows[2]) == 2
    with pytest.raises(FourierError, match=r"someone/some-vqa row 1: the dataset cannot be read \(OSError"):
        rows[1]
