"""Rows of any shape become the same chat messages; the order of pictures and text is kept."""

import base64
import io
from pathlib import Path

import helpers
import pytest

from llava_fa import FourierError
from llava_fa.data.samples import chat_messages, sample_of

PICTURES = [helpers.picture(seed) for seed in range(3)]
NAMES = {picture.tobytes(): f"picture {number}" for number, picture in enumerate(PICTURES)}


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def said(sample):
    """Every turn as (role, parts), pictures by their number."""
    messages, images = chat_messages(sample, "here")
    names = iter([NAMES[image.tobytes()] for image in images])
    return [
        (m["role"], [next(names) if part["type"] == "image" else part["text"] for part in m["content"]])
        for m in messages
    ]


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def read(row):
    return said(sample_of(row, Path(), "row 5"))


CONVERSATIONS = {
    "first": (1, turns("<image>\nwhat?", "that"), [["picture 0", "what?"], ["that"]]),
    "last": (1, turns("what is this?\n<image>", "that"), [["what is this?", "picture 0"], ["that"]]),
    "between": (
        2,
        turns("Before: <image> After: <image>", "one fell"),
        [["Before:", "picture 0", "After:", "picture 1"], ["one fell"]],
    ),
    "side by side": (2, turns("<image><image>\nsame?", "no"), [["picture 0", "picture 1", "same?"], ["no"]]),
    "on lines": (2, turns("<image>\n<image>\nsame?", "no"), [["picture 0", "picture 1", "same?"], ["no"]]),
    "later turns": (
        3,
        turns("<image> one?", "1", "now <image> and <image>?", "2"),
        [["picture 0", "one?"], ["1"], ["now", "picture 1", "and", "picture 2", "?"], ["2"]],
    ),
    "unmarked": (
        2,
        turns("same?", "no", "sure?", "yes"),
        [["picture 0", "picture 1", "same?"], ["no"], ["sure?"], ["yes"]],
    ),
    "some unmarked": (2, turns("and this? <image>", "no"), [["picture 0", "and this?", "picture 1"], ["no"]]),
    "the mark alone": (1, turns("<image>", "a cat"), [["picture 0"], ["a cat"]]),
    "no picture": (0, turns("hello", "hi"), [["hello"], ["hi"]]),
    "an empty turn": (0, turns("", "hi"), [[""], ["hi"]]),
}


@pytest.mark.parametrize(("count", "conversation", "expected"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_pictures_stand_where_their_marks_are(count, conversation, expected):
    for given in ({"image": PICTURES[:count]}, {"images": PICTURES[:count], "image": None}):
        assert [parts for _, parts in read({**given, "conversations": conversation})] == expected


def test_unmarked_pictures_come_before_the_first_question_not_before_the_system():
    conversation = [{"from": "system", "value": "be brief"}, *turns("what?", "that")]
    assert read({"image": PICTURES[0], "conversations": conversation}) == [
        ("system", ["be brief"]),
        ("user", ["picture 0", "what?"]),
        ("assistant", ["that"]),
    ]
    with pytest.raises(FourierError, match="row 5: it has images, and nobody asks about them"):
        read({"image": PICTURES[0], "conversations": [{"from": "gpt", "value": "that"}]})


GIVEN = {
    "in memory": PICTURES[1],
    "in a list": [PICTURES[1]],
    "bytes": png(PICTURES[1]),
    "bytes and a path": {"bytes": png(PICTURES[1]), "path": "1.png"},
    "a list of these": [{"bytes": png(PICTURES[1]), "path": None}],
    "a path": "one.png",
    "a path alone": {"bytes": None, "path": "one.png"},
    "after an empty cell": [None, PICTURES[1]],
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_pictures_however_a_dataset_keeps_them(tmp_path, given):
    PICTURES[1].save(tmp_path / "one.png")
    row = {"image": given, "conversations": turns("<image>\nwhat?", "that")}
    assert said(sample_of(row, tmp_path, "row 5")) == [("user", ["picture 1", "what?"]), ("assistant", ["that"])]


COLUMNS = {
    "question and answer": ({"question": "q", "answer": "a"}, [["q"], ["a"]]),
    "the most frequent answer": ({"question": "q", "answers": ["x", "a", "a"]}, [["q"], ["a"]]),
    "the first of equal ones": ({"question": "q", "answers": ["a", "b"]}, [["q"], ["a"]]),
    "annotated": ({"question": "q", "answers": [{"answer": "b"}, {"answer": "a"}, {"answer": "a"}]}, [["q"], ["a"]]),
    "annotated, in lists": ({"question": "q", "answers": {"answer": ["b", "a", "a"], "id": [1, 2, 3]}}, [["q"], ["a"]]),
    "an empty answer first": ({"question": "q", "answer": None, "answers": ["", "a"]}, [["q"], ["a"]]),
    "0": ({"question": "q", "answer": 0}, [["q"], ["0"]]),
    "0.0": ({"question": "q", "label": 0.0}, [["q"], ["0.0"]]),
    "False": ({"question": "q", "answer": False}, [["q"], ["False"]]),
    "zeros": ({"question": "q", "answers": [0, 0, 1]}, [["q"], ["0"]]),
    "no answer": ({"question": "q", "answer": None, "answers": [None, float("nan")]}, [["q"]]),
    "several": ({"questions": ["q", "r"], "answers": ["a", 0]}, [["q"], ["a"], ["r"], ["0"]]),
    "the_cauldron": (
        {"texts": [{"user": "q", "assistant": "a", "source": "s"}, {"user": "r", "assistant": "b"}]},
        [["q"], ["a"], ["r"], ["b"]],
    ),
    "the_cauldron, in lists": ({"texts": {"user": ["q", "r"], "assistant": ["a", "b"]}}, [["q"], ["a"], ["r"], ["b"]]),
    "conversations, in lists": (
        {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}},
        [["q"], ["a"]],
    ),
}


@pytest.mark.parametrize(("row", "expected"), COLUMNS.values(), ids=COLUMNS)
def test_columns_with_and_without_pictures(row, expected):
    assert [parts for _, parts in read(row)] == expected
    assert [parts for _, parts in read({"image": None, **row})] == expected
    first, *others = expected
    for given in ({"images": PICTURES}, {"image_2": PICTURES[1], "image_10": PICTURES[2], "image_1": PICTURES[0]}):
        assert [parts for _, parts in read({**row, **given})] == [
            ["picture 0", "picture 1", "picture 2", *first],
            *others,
        ]


def test_a_picture_with_a_caption_is_described():
    assert read({"image": PICTURES[0], "caption": "a cat"}) == [
        ("user", ["picture 0", "Describe the image."]),
        ("assistant", ["a cat"]),
    ]


BAD = {
    "text alone": ({"text": "only"}, r'it has no "conversations" and no question \(its columns are \[.text.\]\)'),
    "a picture alone": ({"image": PICTURES[0], "id": 1}, r'it has no "conversations" .* columns are \[.id., .image.\]'),
    "a picture elsewhere": ({"photo": PICTURES[0], "question": "q"}, "its pictures are in photo, which is not where"),
    "bytes elsewhere": (
        {"jpg": b"0", "x": {"bytes": b"0", "path": None}, "question": "q"},
        "its pictures are in jpg, x",
    ),
    "marks": ({"conversations": turns("<image>", "x")}, "it has more <image> marks than images"),
    "a turn": ({"conversations": ["text"]}, "a turn is 'text'"),
    "a role": ({"conversations": [{"from": "tool", "value": "x"}]}, "a turn is {'from': 'tool', 'value': 'x'}"),
    "no list": ({"conversations": "a text"}, "a turn is 'a text'"),
    "unequal lists": ({"conversations": {"from": ["human"], "value": []}}, "its turns are {'from'"),
    "unequal answers": ({"questions": ["q", "r"], "answers": ["a"]}, "it has 2 questions and 1 answers"),
    "no turns": ({"conversations": {"from": [], "value": []}, "texts": []}, 'it has no "conversations"'),
    "an object for a question": ({"question": {"a": 1}}, "{'a': 1} is no text"),
    "a picture for an answer": ({"question": "q", "answer": {"answer": b"x"}}, "1 bytes is no text"),
    "a number": ({"image": 7, "question": "q"}, "7 is no picture"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_rows_that_cannot_be_used(row, message):
    with pytest.raises(FourierError, match=f"row 5: {message}"):
        read(row)


def test_errors_never_hold_a_picture():
    data = png(helpers.picture(0, 200))
    text = base64.b64encode(data).decode()
    for row in (
        {"image": text, "question": "q"},
        {"image": [{"bytes": data[:-900], "path": "x"}], "question": "q"},
        {"conversations": [{"from": "human", "value": {"bytes": data}}]},
        {"conversations": [{"from": text, "value": text}]},
        {"conversations": text},
        {"conversations": {"from": [text], "value": [data, data]}},
        {"image": {"data": data}, "question": "q"},
    ):
        with pytest.raises(FourierError) as caught:
            read(row)
        assert len(str(caught.value)) < 500
        assert text[100:200] not in str(caught.value)
    with pytest.raises(FourierError, match="here: it is str, not") as caught:
        chat_messages(text, "here")
    assert len(str(caught.value)) < 200
