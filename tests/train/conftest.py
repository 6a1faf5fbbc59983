"""What the tests of training share: a random LLaVA, compressed, and a small LLaVA-format file."""

import json
from pathlib import Path

import helpers
import pytest

import llava_fa


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    return helpers.save_llava(tmp_path_factory.mktemp("train") / "original", dtype=helpers.torch.bfloat16)


@pytest.fixture(scope="session")
def compressed(original, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("train") / "compressed"
    llava_fa.compress(original, out, llava_fa.FourierConfig(bits=2))
    return out


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """A LLaVA-format file with twelve rows; beside it their pictures."""
    folder = tmp_path_factory.mktemp("rows")
    found = []
    for i in range(12):
        helpers.picture(i).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\nwhat is {i}?"}, {"from": "gpt", "value": f"picture {i}"}]
        found.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(found))
    return folder / "data.json"
