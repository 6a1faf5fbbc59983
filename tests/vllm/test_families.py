"""Families compressed: vLLM's greedy tokens are those of transformers' `generate` on the same folder.

No family needs another reference: where vLLM runs the uncompressed model, its answers are transformers', too. (Gemma 3
it does not load under the names that transformers gives the vision tower's weights now; compressed it does.)
"""

from __future__ import annotations

import fnmatch
import logging
from pathlib import Path
from typing import Any

import helpers
import pytest
import small_models
import torch
from engines import Answer, Prompt, from_transformers, from_vllm

import llava_fa
from llava_fa import FourierConfig
from llava_fa.hub.checkpoint import read_metadata
from llava_fa.hub.loading import load
from llava_fa.hub.visual_tokens import attach_visual_tokens, grid_of, set_visual_tokens, visual_tokens_of
from llava_fa.nn.visual_tokens import VisualTokens
from llava_fa.vllm.store import Store

pytestmark = pytest.mark.slow

COUNT = 24
"""Tokens of an answer."""
TOLERANCE = 1e-4
"""Of a token's log-probability, in float32: orders of summation differ; a mistaken layer changes a tenth and more."""
SIZES = ((270, 180),), ((120, 210), (190, 190)), ()
"""Width and height of each prompt's pictures."""
DENSE = {"qwen2_5_vl": ["model.visual.patch_embed.proj"]}
"""Family → packed layers that are no linear layers in vLLM's model, and are held dense there."""
UNUSED = {"llava_next": ["model.vision_tower.encoder.layers.1.*"]}
"""Family → packed layers that vLLM does not build, because no answer depends on them."""
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"config": FourierConfig(bits=2, codes="trellis", skip=("*k_proj",))},
    "qwen3_vl": {"config": FourierConfig(bits=4, rank=8), "embeddings": 4},
    "qwen3_vl_moe": {"config": FourierConfig(bits=3, rank=4)},
    "llava_next": {"config": FourierConfig(bits=4, inner_rank=64)},
    "llava_onevision": {"config": FourierConfig(bits=4, method="paper", rank=4)},
    "gemma3": {"config": FourierConfig(bits=4), "embeddings": 4},
    "internvl": {"config": FourierConfig(bits=3, codes="trellis", rank=4), "embeddings": 4},
    "mistral3": {"config": FourierConfig(bits=3, skip=("*o_proj", "*up_proj"))},
}
"""Family → another way of compressing it, so that each kind of packed layer is met."""


@pytest.fixture(scope="module", params=list(small_models.FAMILIES))
def family(request, tmp_path_factory) -> tuple[str, Path]:
    """The name of a family, and the folder of a small random model."""
    return request.param, small_models.save(request.param, tmp_path_factory.mktemp(request.param) / "model")


def prompts(name: str) -> list[Prompt]:
    """One picture, two of different sizes, none."""
    made = []
    for sizes in SIZES:
        pictures = [helpers.picture(seed, max(size)).crop((0, 0, *size)) for seed, size in enumerate(sizes)]
        shown = "".join(f"{small_models.FAMILIES[name][1]} and " for _ in sizes)
        made.append(Prompt(f"What color is {shown}the large circle?", tuple(pictures)))
    return made


def held(model: Any) -> set[str]:
    """The packed layers that modules of vLLM's hold packed."""
    stores = [getattr(getattr(module, "quant_method", None), "store", None) for module in model.modules()]
    return next(set(store.claimed) for store in stores if isinstance(store, Store))


def matching(names: set[str], patterns: list[str]) -> set[str]:
    """The names that one of the patterns matches; each matches some."""
    found = [set(fnmatch.filter(names, pattern)) for pattern in patterns]
    assert all(found)
    return set().union(*found)


def same(got: list[Answer], want: list[Answer]) -> None:
    """The prompts' tokens and the answers' are equal, and as likely."""
    assert [answer.asked for answer in got] == [answer.asked for answer in want]
    assert [answer.tokens for answer in got] == [answer.tokens for answer in want]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.log_probabilities == pytest.approx(theirs.log_probabilities, abs=TOLERANCE)


@pytest.mark.parametrize("way", ["usual", "other"])
def test_vllm_answers_as_transformers(family, way, tmp_path, exact_activations, caplog):
    name, folder = family
    given = OTHERS[name] if way == "other" else {"config": FourierConfig(bits=4)}
    out = tmp_path / "out"
    llava_fa.compress(folder, out, **given)
    asked = prompts(name)

    want = from_transformers(out, asked, COUNT)
    assert len({tuple(answer.tokens) for answer in want}) == len(want), "an answer to each prompt"
    caplog.set_level(logging.INFO, logger="llava_fa.vllm")
    got, packed = from_vllm(out, asked, COUNT, look=held)

    same(got, want)

    layers = set(read_metadata(out).layers)
    dense, unused = matching(layers, DENSE.get(name, [])), matching(layers, UNUSED.get(name, []))
    assert packed == layers - dense - unused
    told = [record.getMessage() for record in caplog.records if "held dense" in record.getMessage()]
    assert [int(line.split()[0]) for line in told] == ([len(dense)] if dense else [])


@pytest.mark.parametrize("name", ["gemma3", "internvl"])
def test_two_ranks_answer_as_transformers(name, tmp_path, monkeypatch, exact_activations):
    """Of layers that vLLM asks nobody about: its own are split by rows, torch's are whole on both ranks."""
    llava_fa.compress(small_models.save(name, tmp_path / "in"), tmp_path / "out", FourierConfig(bits=4))
    asked = prompts(name)
    want = from_transformers(tmp_path / "out", asked, COUNT)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    same(from_vllm(tmp_path / "out", asked, COUNT, tensor_parallel_size=2)[0], want)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_elastic_visual_tokens_of_tiles(name, tmp_path, exact_activations):
    """As saved, and as a request asks: tiles, unpadding and new lines of a smaller grid."""
    folder = small_models.save(name, tmp_path / "model")
    model, processor = load(folder, "cpu", torch.float32)
    counts = sorted(VisualTokens(grid_of(model.config), 1).counts)[:-1]
    assert len(counts) > 1
    torch.manual_seed(0)
    attach_visual_tokens(model, processor, counts[0])
    for parameter in visual_tokens_of(model).parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    folders = {}
    for count in counts:
        set_visual_tokens(model, count, processor)
        folders[count] = tmp_path / str(count)
        model.save_pretrained(folders[count])
        processor.save_pretrained(folders[count])
    asked = prompts(name)[:2]
    by_request = [
        Prompt(one.text, one.pictures, {"visual_tokens": count} if count != counts[0] else {})
        for count in counts
        for one in asked
    ]
    want = [answer for count in counts for answer in from_transformers(folders[count], asked, COUNT)]
    got, _ = from_vllm(folders[counts[0]], by_request, COUNT, together=True)
    assert [len(answer.asked) for answer in got] == [len(answer.asked) for answer in want]
    assert [answer.tokens for answer in got] == [answer.tokens for answer in want]
