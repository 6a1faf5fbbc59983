"""Whatever stands in a file or a row: what can be used, or one short error; never anything else."""

import io
import json
import random
from pathlib import Path

import helpers
import numpy as np
import pytest
from PIL import Image

from llava_fa import FourierError
from llava_fa.data.pictures import film_frames, open_picture
from llava_fa.data.samples import chat_messages, sample_of
from llava_fa.data.textfiles import read_json, read_log, read_rows, read_table

pytestmark = pytest.mark.slow

PICTURE = helpers.picture(0, 24)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pictures():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 1.5
    plain = [encoded(PICTURE, kind, exif=exif) for kind in ("PNG", "JPEG", "TIFF", "WEBP")]
    plain += [encoded(PICTURE, kind) for kind in ("BMP", "PPM")] + [encoded(PICTURE.convert("CMYK"), "JPEG")]
    films = [encoded(PICTURE, kind, save_all=True, append_images=[helpers.picture(1, 24)]) for kind in ("GIF", "PNG")]
    deep = Image.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24))
    others = [encoded(deep, "PNG"), encoded(Image.fromarray(np.ones((9, 9), dtype=np.float32)), "TIFF")]
    return [*plain, *films, *others, encoded(PICTURE.quantize(8), "PNG")]


def mutated(data, draw):
    data = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        data[draw.randrange(min(len(data), draw.choice((64, 200, len(data)))))] = draw.randrange(256)
    return bytes(data[: draw.randrange(len(data) + 1)] if draw.random() < 0.25 else data)


def outcome(read, *args):
    """Whether it could be read; fails on any other error, and on one that repeats what it was given."""
    try:
        return read(*args) is not None
    except FourierError as error:
        length = len(str(error))
    assert length < 800
    return False


def test_pictures(tmp_path, capfd):
    draw, seeds, path = random.Random(0), pictures(), tmp_path / "picture"
    read = 0
    for number in range(15_000):
        data = mutated(draw.choice(seeds), draw)
        read += outcome(open_picture, data)
        if number % 10 == 0:
            path.write_bytes(data)
            outcome(film_frames, path, lambda total: range(min(total, 3)))
    assert 1000 < read < 14_000
    capfd.readouterr()  # libtiff prints what it thinks of such files


def test_text_files(tmp_path):
    rows = [{"image": "a", "conversations": [{"from": "human", "value": "q\u2028ü"}]}] * 2
    texts = [json.dumps(rows, ensure_ascii=False), '{"a": 1}\n{"a": 2}\r\n', 'index\tq\n1\t"a\nb"\n']
    draw, path, read = random.Random(0), tmp_path / "file", 0
    for _ in range(20_000):
        path.write_bytes(mutated(draw.choice(texts).encode(draw.choice(["utf-8", "utf-8-sig", "utf-16"])), draw))
        read += sum([outcome(way, path) for way in (read_rows, read_json, read_table, read_log)])
    assert 1000 < read < 79_000


CELLS = [None, 0, 0.0, False, "", "x", "<image>", "<image> a <image>", float("nan"), b"", b"abc", [], {}, PICTURE, 1j]
CELLS += [{"bytes": None, "path": None}, {"bytes": encoded(PICTURE, "PNG"), "path": "a"}, "y" * 5000, (1, 2)]
CELLS += [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}, {"user": "q", "assistant": 0}]
COLUMNS = [
    "image",
    "images",
    "image_1",
    "image2",
    "conversations",
    "texts",
    "question",
    "questions",
    "answer",
    "answers",
]
COLUMNS += ["label", "photo", "id", "caption"]
KEYS = ["from", "value", "bytes", "path", "answer", "user", "assistant", 1, "z"]


def cell(draw, depth=0):
    kind = 0 if depth > 2 else draw.random()
    if kind < 0.6:
        return draw.choice(CELLS)
    some = [cell(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    return some if kind < 0.85 else dict(zip(draw.sample(KEYS, len(some)), some, strict=True))


def test_rows():
    draw, read = random.Random(0), 0

    def use(row):
        messages, images = chat_messages(sample_of(row, Path("/nowhere"), "a row"), "a row")
        assert messages
        assert all(message["content"] for message in messages)
        assert len(images) == sum(part["type"] == "image" for m in messages for part in m["content"])
        return messages

    for _ in range(60_000):
        read += outcome(use, {draw.choice(COLUMNS): cell(draw) for _ in range(draw.randint(0, 5))})
    assert 1000 < read < 59_000
