"""Samples become inputs and labels; what cannot be used is named."""

import json
import shutil

import helpers
import pytest
import torch

from llava_fa import FourierError
from llava_fa.data.rows import Rows
from llava_fa.train.data import ROWS_LEFT_OUT, Collator, Conversations
from llava_fa.train.loss import IGNORED


@pytest.fixture(scope="module")
def processor():
    return helpers.processor()


def learnt(processor, item):
    """The text that the labels teach, answers separated by a bar."""
    labels, parts, last = item["labels"][0].tolist(), [], None
    for place, label in enumerate(labels):
        if label != IGNORED:
            assert label == item["input_ids"][0, place]
            if last != place - 1:
                parts.append([])
            parts[-1].append(label)
            last = place
    return "|".join(processor.tokenizer.decode(part) for part in parts)


def changed(rows, tmp_path, **change):
    """A copy of the file whose row 3 differs."""
    folder = tmp_path / "rows"
    shutil.copytree(rows.parent, folder)
    found = json.loads((folder / "data.json").read_text())
    found[3] |= change
    (folder / "data.json").write_text(json.dumps(found))
    return folder / "data.json"


def test_answers_are_learnt_and_nothing_else(rows, processor):
    item = Conversations(Rows(str(rows)), processor, max_length=256)[5]
    assert learnt(processor, item) == "picture 5<end>"
    assert (item["input_ids"] == processor.image_token_id).sum() == 16
    assert item["pixel_values"].shape == (1, 3, 28, 28)
    assert item[ROWS_LEFT_OUT] == []


def test_every_turn_of_a_conversation_is_learnt(processor):
    turns = [
        {"role": "user", "content": [{"type": "image", "image": helpers.picture()}, {"type": "text", "text": "one?"}]},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": "two?"}, {"type": "image", "image": helpers.picture(1)}]},
        {"role": "assistant", "content": "second"},
    ]
    item = Conversations([turns], processor, max_length=256)[0]
    assert learnt(processor, item) == "first\n|second<end>"
    assert item["pixel_values"].shape[0] == 2


def test_labels_line_up_where_pictures_stand_between_words(processor, tmp_path):
    for i in range(3):
        helpers.picture(i).save(tmp_path / f"{i}.png")
    turns = [
        {"from": "human", "value": "Before: <image> After: <image>"},
        {"from": "gpt", "value": "one fell"},
        {"from": "human", "value": "and in <image>?"},
        {"from": "gpt", "value": "both"},
    ]
    row = {"image": [f"{i}.png" for i in range(3)], "conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    item = Conversations(Rows(str(tmp_path / "data.json")), processor, max_length=256)[0]
    assert learnt(processor, item) == "one fell\n|both<end>"
    picture = "<image>" * 16
    text = processor.tokenizer.decode(item["input_ids"][0])
    start = f"USER: Before:{picture}\nAfter:{picture}\n\nASSISTANT: one fell\nUSER: and in{picture}\n?\n"
    assert text == f"{start}ASSISTANT: both<end>"
    given = {"images": [helpers.picture(i) for i in range(3)]}
    assert torch.equal(
        item["pixel_values"], processor(text="<image>" * 3, **given, return_tensors="pt")["pixel_values"]
    )


def test_a_dataset_row_without_an_answer_teaches_nothing(processor, tmp_path):
    helpers.picture(0).save(tmp_path / "0.png")
    (tmp_path / "data.json").write_text(json.dumps([{"image": "0.png", "question": "q", "answer": None}]))
    with pytest.raises(FourierError, match=r"data\.json row 0: it has no answer"):
        Conversations(Rows(str(tmp_path / "data.json")), processor, max_length=256)[0]


def test_text_alone_is_a_sample_too(rows, processor, tmp_path):
    turns = [{"from": "human", "value": "hello?"}, {"from": "gpt", "value": "hi"}]
    file = changed(rows, tmp_path, image=None, conversations=turns)
    data = Conversations(Rows(str(file)), processor, max_length=256)
    assert learnt(processor, data[3]) == "hi<end>"
    assert "pixel_values" not in data[3]
    batch = Collator(0)([data[2], data[3]])
    assert batch["pixel_values"].shape[0] == 1


BAD = {
    "missing": ({"image": "none.png"}, r"data.json row 3: image .*none.png does not exist.*--skip-bad-rows"),
    "no picture": ({"image": "data.json"}, r"row 3: image .*data.json cannot be read"),
    "no image": ({"image": None}, r"row 3: it has more <image> marks than images"),
    "long": (
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a" * 300}]},
        r"row 3: it has \d+ tokens, and there is room for 256",
    ),
    "no answer": ({"conversations": [{"from": "human", "value": "<image>"}]}, r"row 3: it has no answer"),
    "no turns": ({"conversations": []}, r"row 3: it has no \"conversations\" .*--skip-bad-rows"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_row_that_cannot_be_used(rows, processor, tmp_path, change, message):
    file = changed(rows, tmp_path, **change)
    data = Conversations(Rows(str(file)), processor, max_length=256)
    assert learnt(processor, data[2]) == "picture 2<end>"
    with pytest.raises(FourierError, match=message):
        data[3]
    lenient = Conversations(Rows(str(file)), processor, max_length=256, skip_bad_rows=True)
    assert learnt(processor, lenient[3]) == "picture 4<end>"
    assert Collator(0)([lenient[2], lenient[3]])[ROWS_LEFT_OUT] == [3]


def test_no_row_can_be_used(rows, processor):
    data = Conversations(Rows(str(rows)), processor, max_length=5, skip_bad_rows=True)
    with pytest.raises(FourierError, match="no row can be used"):
        data[0]


def test_a_draw_keeps_the_rows_numbers(rows):
    drawn = Rows(str(rows), count=4, seed=1)
    assert len(drawn) == 4
    assert drawn.where(3) != "data.json row 3"
    with pytest.raises(FourierError, match="goes with a LLaVA JSON"):
        Rows("some/dataset", images=rows.parent)


def test_batches_are_padded_on_the_right(rows, processor):
    data = Conversations(Rows(str(rows)), processor, max_length=256)
    short, long = data[1], data[11]
    batch = Collator(7)([short, long])
    length = short["input_ids"].shape[1]
    assert batch["input_ids"].shape == (2, length + 2)
    assert batch["input_ids"][0, length:].tolist() == [7, 7]
    assert batch["labels"][0, length:].tolist() == [IGNORED, IGNORED]
    assert batch["attention_mask"][0, length:].tolist() == [0, 0]
    assert batch["pixel_values"].shape == (2, 3, 28, 28)


def test_masks_of_who_sees_whom_become_additive():
    items = [
        {"input_ids": torch.arange(n), "labels": torch.arange(n), "attention_mask": torch.ones(n, n).tril().bool()}
        for n in (2, 3)
    ]
    mask = Collator(0)(items)["attention_mask"]
    assert mask.shape == (2, 1, 3, 3)
    assert (mask[1, 0] == 0).tolist() == torch.ones(3, 3).tril().bool().tolist()
    assert (mask[0, 0] == 0).tolist() == [[True, False, False], [True, True, False], [False, False, True]]
