"""Real datasets of the package `datasets`, from parquet files and from disk (`make test-harness` has the package)."""

import io
import warnings

import helpers
import numpy as np
import pytest
from PIL import Image

from llava_fa import FourierError
from llava_fa.data.rows import Rows, SampleSource
from llava_fa.data.samples import chat_messages

datasets = pytest.importorskip("datasets", reason="needs the package `datasets`")

pytestmark = pytest.mark.filterwarnings("ignore")
"""What it and its dependencies warn of is theirs."""

TEXT, WHOLE, IMAGE = (datasets.Value("string"), datasets.Value("int64"), datasets.Image())
STRUCT = {"bytes": datasets.Value("binary"), "path": TEXT}


def png(i):
    buffer = io.BytesIO()
    helpers.picture(i).save(buffer, "PNG")
    return buffer.getvalue()


def turns(i, mark="<image>\n"):
    return [{"from": "human", "value": f"{mark}q{i}"}, {"from": "gpt", "value": f"a{i}"}]


KINDS = {
    "LLaVA-OneVision": (
        [
            {"image": None if i == 2 else helpers.picture(i), "conversations": turns(i, "<image>\n" * (i != 2))}
            for i in range(4)
        ],
        {"image": IMAGE, "conversations": [{"from": TEXT, "value": TEXT}]},
        [["picture 0", "q0", "a0"], ["picture 1", "q1", "a1"], ["q2", "a2"], ["picture 3", "q3", "a3"]],
    ),
    "the_cauldron": (
        [{"images": [helpers.picture(0), helpers.picture(1)], "texts": [{"user": "q", "assistant": "a"}] * 2}],
        {"images": [IMAGE], "texts": [{"user": TEXT, "assistant": TEXT}]},
        [["picture 0", "picture 1", "q", "a", "q", "a"]],
    ),
    "bytes and path without the feature": (
        [{"image": {"bytes": png(i), "path": "a.png"}, "question": "q", "answer": 0} for i in range(2)],
        {"image": STRUCT, "question": TEXT, "answer": WHOLE},
        [["picture 0", "q", "0"], ["picture 1", "q", "0"]],
    ),
    "VQA": (
        [{"image": helpers.picture(0), "question": "q", "answers": [{"answer": a, "id": 1} for a in "xyy"]}],
        {"image": IMAGE, "question": TEXT, "answers": [{"answer": TEXT, "id": WHOLE}]},
        [["picture 0", "q", "y"]],
    ),
}


@pytest.fixture(params=["parquet", "disk"])
def saved(request, tmp_path, monkeypatch):
    """A function: rows, features → the name of the dataset that holds them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(rows, features):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
            folder = tmp_path / "data"
            if request.param == "parquet":
                folder.mkdir()
                made.to_parquet(str(folder / "train.parquet"))
            else:
                made.save_to_disk(str(folder))
        return str(folder)

    return save


def said(sample):
    pictures = {helpers.picture(i).tobytes(): f"picture {i}" for i in range(4)}
    messages, images = chat_messages(sample, "")
    names = iter([pictures[image.tobytes()] for image in images])
    return [next(names) if p["type"] == "image" else p["text"] for m in messages for p in m["content"]]


@pytest.mark.parametrize(("rows", "features", "expected"), KINDS.values(), ids=KINDS)
def test_the_same_samples_for_calibration_and_training(saved, rows, features, expected):
    name = saved(rows, features)
    assert sorted(map(said, SampleSource(name))) == sorted(map(said, Rows(name))) == sorted(expected)


def test_pictures_in_memory_are_treated_as_files_are(saved):
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = helpers.picture(0).resize((20, 10)).convert("L")
    lying, deep = io.BytesIO(), io.BytesIO()
    whole.transpose(Image.Transpose.ROTATE_90).save(lying, "PNG", exif=exif)
    Image.fromarray(np.asarray(whole).astype(np.uint16) * 256).save(deep, "PNG")
    rows = [{"image": {"bytes": data.getvalue(), "path": None}, "question": "q"} for data in (lying, deep)]
    name = saved(rows, {"image": IMAGE, "question": TEXT})
    for samples in (SampleSource(name), Rows(name)):
        pictures = [chat_messages(sample, "")[1][0] for sample in samples]
        assert [picture.tobytes() for picture in pictures] == [whole.convert("RGB").tobytes()] * 2


def test_a_picture_that_cannot_be_decoded_has_its_row(saved):
    rows = [
        {"image": {"bytes": data, "path": None}, "question": "q", "answer": "a"} for data in (png(0), b"no picture")
    ]
    name = saved(rows, {"image": IMAGE, "question": TEXT, "answer": TEXT})
    for read in (SampleSource, Rows):
        with pytest.raises(FourierError, match=r"(row|sample) \d: the dataset cannot be read \(UnidentifiedImageError"):
            list(read(name))
