"""A model whose weights stay on the disk: the same as a loaded one, and the same bytes of a compression."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
import transformers
from transformers import AutoProcessor

import llava_fa
from llava_fa import Budget, FourierConfig, FourierError
from llava_fa.hub import calibrated_model, memory, model_sensitivity
from llava_fa.hub import compress as whole
from llava_fa.hub import shelf as shelf_module
from llava_fa.hub.absent import Absent, Promised
from llava_fa.hub.architecture import empty_model
from llava_fa.hub.blocks import forward
from llava_fa.hub.calibrated import part_names
from llava_fa.hub.calibration_data import prepare
from llava_fa.hub.complete import arranged, loaded_source
from llava_fa.hub.course import passes
from llava_fa.hub.memory import Need
from llava_fa.hub.plan import make_plan
from llava_fa.hub.source import open_source
from llava_fa.hub.streamed import streamed_model
from llava_fa.hub.weights import Weights
from llava_fa.nn.experts import unfuse

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

CPU = torch.device("cpu")
SOME = ("llava", "qwen2_5_vl", "gemma3", "qwen3_vl_moe")


@pytest.fixture
def streamed(monkeypatch):
    """A function: from here on models are streamed, or not; hidden states beyond so many bytes go to the disk."""

    def choose(streams=True, limit=0):
        monkeypatch.setattr(Need, "streams", lambda *_: streams)
        monkeypatch.setattr(Need, "limit", lambda *_: limit)
        monkeypatch.setattr(shelf_module, "_LEAST", 0)

    return choose


def both(folder: Path, dtype):
    """The model streamed, and loaded."""
    source = open_source(folder)
    plan = make_plan(empty_model(source.home, len(source.entries)), source, FourierConfig())
    tables = [name for name, module in _modules(folder) if isinstance(module, torch.nn.Embedding)]
    names = [*part_names(empty_model(source.home, len(source.entries)), plan), *tables]
    model = streamed_model(source, arranged(source), dtype, CPU, names)
    loaded = loaded_source(source, dtype=dtype)
    unfuse(loaded)
    return model, loaded


def _modules(folder):
    source = open_source(folder)
    return empty_model(source.home, len(source.entries)).named_modules()


def assert_equal(model, loaded):
    """Every parameter and buffer, inside of parts and outside, to the bit, in its order of elements."""
    weights, seen = Weights.of(model), set()

    def compare(name, value):
        expected = loaded.get_parameter(name) if name in parameters else loaded.get_buffer(name)
        assert type(value.data) is torch.Tensor
        assert torch.equal(value, expected), name
        assert (value.dtype, value.stride()) == (expected.dtype, expected.stride()), name
        seen.add(name)

    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    for path, part in weights.parts.items():
        with weights.entered(path):
            for name, value in part.named_parameters():
                compare(f"{path}.{name}", value)
        assert any(isinstance(value, Absent) for value in part.parameters())
    for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        assert not isinstance(value, Promised), name
        if not isinstance(value, Absent):
            compare(name, value)
    tied = set(getattr(loaded, "all_tied_weights_keys", None) or ())
    assert parameters.keys() | dict(loaded.named_buffers()).keys() <= seen | tied
    assert model.training == loaded.training


DOZEN = (
    *("llava_next", "qwen3_vl", "internvl", "paligemma", "smolvlm", "mistral3", "glm4v", "molmo2", "qwen3_5"),
    *("llava_onevision", "idefics2", "mllama", "llama4", "deepseek_vl", "aria", "kimi_k25", "gemma4"),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*SOME, *(pytest.param(family, marks=pytest.mark.slow) for family in DOZEN)])
@pytest.mark.filterwarnings("ignore:Casting complex values")  # Llama 4's rotation, where the model is made
@torch.no_grad()
def test_a_streamed_model_is_the_loaded_one(family, dtype, tmp_path):
    """Weights, buffers and answers, those of several samples side by side."""
    import families
    from made_up import with_picture, words
    from shrunken import shake, small_config

    if family not in families.mapping():
        pytest.skip("this transformers does not have it")
    torch.manual_seed(0)
    model = getattr(transformers, families.mapping()[family])(small_config(family)).eval()
    shake(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    streamed, loaded = both(tmp_path, dtype)
    assert_equal(streamed, loaded)
    inputs = [with_picture(loaded), words(loaded), with_picture(loaded, seed=1)]
    inputs = [sample for sample in inputs if sample is not None]
    expected = [forward(loaded, sample, 0).logits for sample in inputs]
    found = passes(streamed, [functools.partial(forward, streamed, sample, 0) for sample in inputs])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.logits, other)
    assert torch.equal(forward(streamed, inputs[0], 0).logits, expected[0])  # without anyone who brings the weights
    assert_equal(streamed, loaded)


@torch.no_grad()
def test_every_weight_is_read_once_for_all_samples(checkpoint, samples):
    model, _ = both(checkpoint, torch.float32)
    weights, read = Weights.of(model), []
    true = weights._read
    weights._read = lambda names: (read.extend(names), true(names))[1]
    inputs = list(prepare(samples, AutoProcessor.from_pretrained(checkpoint)))
    passes(model, [functools.partial(forward, model, sample, 0) for sample in inputs])
    assert len(read) == len(set(read)) > 50


@torch.no_grad()
def test_a_weight_that_is_read_elsewhere_is_fetched(checkpoint):
    model, loaded = both(checkpoint, torch.float32)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    weight, expected = model.get_parameter(name), loaded.get_parameter(name)
    x = torch.randn(2, weight.shape[1])
    assert (weight.device, weight.dtype, weight.shape) == (expected.device, expected.dtype, expected.shape)
    assert torch.equal(torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, expected))
    assert torch.equal(weight[2:3], expected[2:3])
    Weights.of(model).set(name, lambda: 2 * expected)
    assert torch.equal(weight[2:3], 2 * expected[2:3])


KINDS = {
    "plain": {},
    "weights": {"config": FourierConfig(bits=2, refine_passes=0, target="weights")},
    "budget": {"config": FourierConfig(bits=4, refine_passes=0), "budget": Budget(bits=3.3)},
    "embeddings": {"embeddings": 4},
}


def test_progress_tells_the_part_whose_weights_are_read(checkpoint, quick, samples, tmp_path, streamed):
    streamed()
    told = []
    llava_fa.compress(checkpoint, tmp_path / "out", config=quick, calibration=samples, progress=told.append)
    for stage in ("following the samples", "compressing"):
        names = [progress.name for progress in told if progress.stage == stage]
        assert "model.language_model.layers.1" in names, stage
        assert len(set(names)) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_as_in_memory(kind, checkpoint, quick, samples, tmp_path, digest, streamed, monkeypatch):
    written = []
    true = shelf_module.Shelf._written
    monkeypatch.setattr(shelf_module.Shelf, "_written", lambda self, x: (written.append(1), true(self, x))[1])
    options = {"config": quick, **KINDS[kind]}
    streamed(False)
    llava_fa.compress(checkpoint, tmp_path / "whole", calibration=samples, **options)
    written.clear()
    streamed()
    loads = []
    monkeypatch.setattr(calibrated_model, "_load", lambda *_: loads.append(1))
    llava_fa.compress(checkpoint, tmp_path / "streamed", calibration=samples, **options)
    assert digest(tmp_path / "streamed") == digest(tmp_path / "whole")
    assert written
    assert not loads
    assert not (tmp_path / "streamed.partial").exists()


@pytest.mark.parametrize("at", [1, 9, 20])
def test_killed_and_resumed_either_way(
    at, checkpoint, quick, samples, calibrated, tmp_path, digest, streamed, monkeypatch
):
    """Begun streamed and ended in memory, or the other way round."""
    for first in (True, False):
        out, left, true = tmp_path / str(first), [at], whole.WorkFolder.save

        def save(self, *args, left=left, true=true):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            true(self, *args)

        streamed(first)
        with monkeypatch.context() as patch:
            patch.setattr(whole.WorkFolder, "save", save)
            with pytest.raises(KeyboardInterrupt):
                llava_fa.compress(checkpoint, out, quick, samples)
        streamed(not first)
        llava_fa.compress(checkpoint, out, quick, samples)
        assert digest(out) == digest(calibrated[0])


def test_memory_that_is_too_little_is_refused_with_what_it_takes(checkpoint, quick, samples, tmp_path):
    with pytest.raises(FourierError, match=r"calibration takes about .* and 100\.0 MB are allowed.*Give --memory \d"):
        llava_fa.compress(checkpoint, tmp_path / "out", quick, samples, memory="100MB")
    told = []
    report = llava_fa.compress(
        checkpoint, tmp_path / "out", quick, samples, memory="100GB", on_plan=lambda plan: told.append(plan.memory)
    )
    assert report.layers
    assert told[0] == ""
    assert "the whole model in it" in told[1]
    with pytest.raises(FourierError, match="memory of size"):
        llava_fa.compress(checkpoint, tmp_path / "other", quick, samples, memory="much")


def test_the_choice_between_the_two():
    need = Need(base=100, model=1000, outside=10, part=50, fitting=40, held=5, shelved=7)
    assert need.whole == 100 + 1000 + 40 + 13  # 15 % more than 5 + 7: malloc's holes
    assert need.streamed == 100 + 10 + 50 + 13
    assert not need.streams(1153, CPU)
    assert need.streams(1152, CPU)
    assert need.streams(173, CPU)
    with pytest.raises(FourierError):
        need.streams(172, CPU)


def test_what_is_told_of_hidden_states_leaves_room_for_the_holes_between_them():
    need = Need(base=0, model=1 << 40, outside=0, part=0, fitting=0, held=0, shelved=500 << 20, kept=1 << 30)
    memory = 1 << 30
    limit = need.limit(memory, True, CPU)
    assert 1.15 * limit + need.streamed <= memory
    assert limit > 0.8 * memory
    assert "996.6 MB of memory, the model block by block" in need.told(memory, True, CPU)


def test_on_a_gpu_both_memories_count(monkeypatch):
    need = Need(base=100, model=1000, outside=10, part=50, fitting=40, held=5, shelved=7)
    gpu, machine = torch.device("cuda"), SimpleNamespace(available=1000)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2000, 5000))
    assert not need.streams(None, gpu)
    assert not need.streams(1100, gpu)  # it is loaded here; what it is worked on with is there
    assert need.streams(1099, gpu)
    assert need.streams(163, gpu)
    with pytest.raises(FourierError):
        need.streams(162, gpu)
    assert "1.1 kB of memory, the whole model on the GPU" in need.told(1100, False, gpu)
    assert "163 B of memory, the model block by block" in need.told(163, True, gpu)
    assert need.limit(1 << 30, False, gpu) == int(((1 << 30) - 163) / 1.15)
    assert need.limit(1 << 30, False, CPU) == int(((1 << 30) - 1153) / 1.15)
    machine.available = 999
    assert need.streams(None, gpu)
    machine.available = 1000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1999, 5000))
    assert need.streams(None, gpu)
    assert need.streams(1 << 40, gpu)


def test_helpers_model_has_several_shards(checkpoint):
    """So that weights come from more than one file."""
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    assert helpers.save_llava


def by_autograd(model, name, directions, inputs, answers, seed):
    """`fisher` of one layer, one whole backward pass after the other."""
    generator, layer = torch.Generator().manual_seed(seed), model.get_submodule(name)
    seen, total, tokens = [], 0.0, 0
    hook = layer.register_forward_hook(lambda _, args, y: seen.append((args[0].detach(), y)))
    for sample, start in zip(inputs, answers, strict=True):
        seen.clear()
        logits = model(**sample).logits[0, start - 1 : -1] / model_sensitivity.TEMPERATURE
        p = logits.detach().softmax(-1)
        for _ in range(2):
            noise = torch.randn(p.shape, generator=generator) * p.sqrt()
            aim = (logits * (noise - p * noise.sum(-1, keepdim=True))).sum()
            gradients = torch.autograd.grad(aim, [y for _, y in seen], retain_graph=True)
            m = sum(g.flatten(0, -2).T @ x.flatten(0, -2) for g, (x, _) in zip(gradients, seen, strict=True))
            total = total + (m @ directions).square().sum(1).double()
        tokens += len(p)
    hook.remove()
    return total / (2 * tokens)


def test_gradients_part_by_part_are_those_of_whole_passes(checkpoint, samples, monkeypatch):
    """Streamed, what is called again from the disk, or in memory."""
    monkeypatch.setattr(shelf_module, "_LEAST", 0)
    model, loaded = both(checkpoint, torch.float32)
    inputs = list(prepare(samples, AutoProcessor.from_pretrained(checkpoint)))
    names = (
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.multi_modal_projector.linear_1",
        "model.language_model.layers.1.mlp.down_proj",
    )
    directions = {name: torch.randn(loaded.get_submodule(name).in_features, 8) for name in names}
    found = [model_sensitivity.fisher(one, directions, inputs, [9, 8, 7], 3) for one in (loaded, model)]
    for name in names:
        assert torch.equal(found[0][name], found[1][name])
        expected = by_autograd(loaded, name, directions[name], inputs, [9, 8, 7], 3)
        torch.testing.assert_close(found[0][name], expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    assert all(isinstance(value, Absent) for part in Weights.of(model).parts.values() for value in part.parameters())
