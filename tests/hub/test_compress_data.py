"""Calibration sources: LLaVA JSON, datasets, iterables; and what the model is given."""

import json
import sys
import types

import helpers
import pytest
import torch

from llava_fa import FourierError
from llava_fa.hub.calibration_data import fingerprint, prepare, read_samples


@pytest.fixture
def llava_json(tmp_path):
    """Ten rows in the LLaVA format with pictures in a subfolder, one row without a picture."""
    (tmp_path / "pictures").mkdir()
    rows = []
    for i in range(10):
        helpers.picture(i).save(tmp_path / "pictures" / f"{i}.png")
        turns = [
            {"from": "human", "value": f"<image>\nquestion {i}?"},
            {"from": "gpt", "value": f"answer {i}"},
        ]
        rows.append({"id": i, "image": f"pictures/{i}.png", "conversations": turns})
    rows.append({"id": 10, "conversations": [{"from": "human", "value": "no picture"}]})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data.json"


def change(path, function):
    rows = json.loads(path.read_text())
    function(rows)
    path.write_text(json.dumps(rows))


def test_llava_json(llava_json):
    samples = read_samples(str(llava_json), count=4, seed=1)
    assert len(samples) == 4
    user, assistant = samples[0]
    assert user["role"] == "user"
    assert assistant["role"] == "assistant"
    picture, text = user["content"]
    number = int(text["text"].removeprefix("question ").rstrip("?"))
    assert picture["image"].tobytes() == helpers.picture(number).tobytes()
    assert assistant["content"][0]["text"] == f"answer {number}"


def test_the_draw_is_seeded_and_never_takes_more_than_there_are(llava_json):
    def texts(seed, count=5):
        return [sample[0]["content"][-1]["text"] for sample in read_samples(str(llava_json), count=count, seed=seed)]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)
    assert len(texts(0, count=99)) == 10


def test_json_lines_and_an_image_folder_elsewhere(llava_json, tmp_path):
    lines = tmp_path / "lines.jsonl"
    rows = json.loads(llava_json.read_text())
    for row in rows[:10]:
        row["image"] = row["image"].removeprefix("pictures/")
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    assert len(read_samples(str(lines), images=tmp_path / "pictures", count=10)) == 10


def test_several_turns_and_an_unmarked_image(llava_json):
    def edit(rows):
        rows[0]["conversations"] = [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "first?"},
            {"from": "gpt", "value": "1"},
            {"from": "human", "value": "second?"},
            {"from": "gpt", "value": "2"},
        ]
        del rows[1:]

    change(llava_json, edit)
    (sample,) = read_samples(str(llava_json))
    assert [message["role"] for message in sample] == ["system", "user", "assistant", "user", "assistant"]
    kinds = [part["type"] for message in sample for part in message["content"]]
    assert kinds.count("image") == 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda rows: rows[3].update(image="gone.png"),
            r"data\.json row 3: image .*gone\.png does not exist",
        ),
        (
            lambda rows: rows[3].update(image="data.json"),
            r"data\.json row 3: image .*data\.json cannot be read",
        ),
        (lambda rows: rows[3].pop("conversations"), 'row 3: it has no "conversations"'),
        (lambda rows: rows[3].update(conversations=[{"value": "?"}]), "row 3: a turn is"),
        (lambda rows: rows[3].update(conversations=["text"]), "row 3: a turn is 'text'"),
        (
            lambda rows: rows[3].update(conversations=[{"from": "human", "value": "<image><image>"}]),
            "row 3: it has more <image> marks than images",
        ),
        (lambda rows: [row.pop("image", None) for row in rows], "no row has an image"),
        (lambda rows: rows.append(1), "it is not a list of objects"),
    ],
)
def test_bad_rows_are_named(llava_json, edit, message):
    change(llava_json, edit)
    with pytest.raises(FourierError, match=message):
        read_samples(str(llava_json), count=100)


def test_bad_files(tmp_path, llava_json):
    with pytest.raises(FourierError, match="no such file"):
        read_samples(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FourierError, match="it is not JSON"):
        read_samples(str(tmp_path / "bad.json"))
    with pytest.raises(FourierError, match="no such image folder"):
        read_samples(str(llava_json), images=tmp_path / "nowhere")
    with pytest.raises(FourierError, match="0 calibration samples"):
        read_samples(str(llava_json), count=0)


def test_a_picture_cut_short_is_named(llava_json):
    picture = llava_json.parent / "pictures" / "5.png"
    picture.write_bytes(picture.read_bytes()[:900])
    with pytest.raises(FourierError, match=r"row 5: image .*5\.png cannot be read"):
        read_samples(str(llava_json), count=100)


def test_a_dataset_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FourierError, match=r"needs the package `datasets`\. `pip install datasets`"):
        read_samples("someone/some-vqa")
    with pytest.raises(FourierError, match="an image folder goes with a LLaVA JSON file"):
        read_samples("someone/some-vqa", images="x")


class Stream(list):
    """What `datasets` gives for one split, as far as it is used."""

    def shuffle(self, **_):
        return self


@pytest.mark.parametrize(
    "row",
    [
        {"image": helpers.picture(), "question": "q?", "answer": "a"},
        {"image": helpers.picture(), "query": "q?", "label": ["a", "b"]},
        {"image": helpers.picture(), "question": "q?", "answers": [{"answer": "a"}]},
        {"images": [helpers.picture()], "texts": [{"user": "q?", "assistant": "a"}]},
    ],
)
def test_columns_of_datasets(monkeypatch, row):
    stub = types.SimpleNamespace(load_dataset=lambda name, streaming: {"train": Stream([row] * 3)})
    monkeypatch.setitem(sys.modules, "datasets", stub)
    samples = read_samples("someone/some-vqa", count=2)
    assert [sample[1:] for sample in samples] == [("q?", "a")] * 2


def test_a_dataset_that_fails(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    with pytest.raises(FourierError, match=r"the dataset cannot be read \(ConnectionError: no network\)"):
        read_samples("someone/some-vqa")
    stub = types.SimpleNamespace(load_dataset=lambda name, streaming: {"train": Stream([{"text": "only"}])})
    monkeypatch.setitem(sys.modules, "datasets", stub)
    with pytest.raises(FourierError, match=r"sample 0: no image with a question or answer.*\['text'\]"):
        read_samples("someone/some-vqa")


def test_a_picture_that_a_dataset_cannot_decode_is_counted(monkeypatch):
    class Broken(Stream):
        def __iter__(self):
            yield {"image": helpers.picture(), "question": "q?", "answer": "a"}
            raise OSError("cannot identify image file")

    stub = types.SimpleNamespace(load_dataset=lambda name, streaming: {"train": Broken()})
    monkeypatch.setitem(sys.modules, "datasets", stub)
    with pytest.raises(FourierError, match=r"someone/some-vqa sample 1: the dataset cannot be read \(OSError"):
        read_samples("someone/some-vqa")


def test_what_the_model_is_given():
    processor = helpers.processor()
    sample = (helpers.picture(), "what?", "that")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": helpers.picture()}, {"type": "text", "text": "what?"}],
        },
        {"role": "assistant", "content": "that"},
    ]
    (ours,), (theirs,) = list(prepare([sample], processor)), list(prepare([messages], processor))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    text = processor.tokenizer.decode(ours["input_ids"][0])
    assert text == "USER: " + "<image>" * 16 + "\nwhat?\nASSISTANT: that\n"
    assert ours["pixel_values"].shape == (1, 3, 28, 28)


def test_without_a_chat_template_the_llava_form_is_used():
    processor = helpers.processor()
    processor.chat_template = None
    (inputs,) = prepare([(helpers.picture(), "what?", "that")], processor)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text == "USER: " + "<image>" * 16 + "\nwhat? ASSISTANT: that"


def test_fingerprints_tell_samples_apart():
    processor = helpers.processor()

    def of(seed, answer):
        return fingerprint(prepare([(helpers.picture(seed), "what?", answer)], processor))

    assert of(0, "a") == of(0, "a")
    assert len({of(0, "a"), of(1, "a"), of(0, "b")}) == 3
