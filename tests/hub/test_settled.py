"""What settled layers gave is given again, and only where it would come again."""

import gc
import types
import weakref

import helpers
import pytest
import torch
import transformers
from torch import nn

import llava_fa
from llava_fa.hub.blocks import Call, Unit
from llava_fa.hub.settled import Settled
from llava_fa.hub.shelf import Shelf
from llava_fa.hub.weights import Weights
from llava_fa.nn.experts import unfuse


class Block(nn.Module):
    """Three layers, the last of which changes what the first one gave in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(128, 128) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        z = self.second(y)
        y += z
        return self.third(y) + self.first(y)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().requires_grad_(False)


def test_settled_layers_multiply_once(block):
    layers = dict(block.named_children())
    multiplied = {name: [] for name in layers}
    for name, layer in layers.items():
        own = layer.forward
        layer.forward = lambda x, name=name, own=own: multiplied[name].append(1) or own(x)
    settled = Settled(layers, Shelf())
    inputs = [torch.randn(200, 128), torch.randn(300, 128)]
    want = [block(x) for x in inputs]
    before = {name: layer.__dict__["forward"] for name, layer in layers.items()}
    for names in ((), ("first",), ("first", "second")):
        settled.add(names)
        for _ in range(2):
            for number, x in enumerate(inputs):
                with settled.call(number):
                    assert torch.equal(block(x), want[number])
    assert {name: layer.__dict__["forward"] for name, layer in layers.items()} == before
    # By round, of two inputs each: the wanted; nothing settled; first; first and second. first runs twice, the second
    # time behind a layer that is not settled.
    assert len(multiplied["first"]) == 4 + 8 + (2 + 4) + 4
    assert len(multiplied["second"]) == 2 + 4 + 4 + 2
    assert len(multiplied["third"]) == 2 + 4 + 4 + 4


def test_what_was_kept_before_a_layer_changed_is_not_behind_it(block):
    layers = dict(block.named_children())
    settled, x = Settled(layers, Shelf()), torch.randn(8, 128)
    settled.add(["first", "third"])
    with settled.call(0):
        block(x)
    block.second.weight = nn.Parameter(torch.randn(128, 128), requires_grad=False)
    with settled.call(0):
        found = block(x)
    assert torch.equal(found, block(x))


def test_a_run_that_fails_leaves_the_layers_as_they_were(block):
    layers = dict(block.named_children())
    with pytest.raises(RuntimeError), Settled(layers, Shelf()).call(0):
        block(torch.randn(3))
    assert not any("forward" in layer.__dict__ for layer in layers.values())


@pytest.mark.parametrize("kind", ["llava", "mixture"])
def test_a_compression_has_the_bytes_that_it_has_without(
    kind, checkpoint, quick, samples, tmp_path, digest, monkeypatch
):
    folder, kept = checkpoint, []
    if kind == "mixture":
        folder = helpers.save_text_model(tmp_path / "mixture")
        config = transformers.AutoConfig.from_pretrained(folder).to_dict() | {"num_local_experts": 4}
        config = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
        transformers.MixtralForCausalLM(transformers.MixtralConfig(**config)).save_pretrained(folder)
        said = ["what is this", "who said that, and why", "tell me of it"]
        samples = [[{"role": "user", "content": x}, {"role": "assistant", "content": "that"}] for x in said]
    true = Settled.call

    def call(self, one):
        kept.append(len(self._names))
        return true(self, one)

    monkeypatch.setattr(Settled, "call", call)
    llava_fa.compress(folder, tmp_path / "kept", config=quick, calibration=samples)
    assert max(kept) > 3
    monkeypatch.setattr(Unit, "settle", lambda *_: None)
    llava_fa.compress(folder, tmp_path / "run", config=quick, calibration=samples)
    assert digest(tmp_path / "kept") == digest(tmp_path / "run")


def test_what_memory_has_no_room_for_is_computed_again(block, tmp_path):
    layers, inputs = dict(block.named_children()), [torch.randn(100, 128), torch.randn(100, 128)]
    shelf = Shelf(100_000, tmp_path / "hidden")  # for one output of 51 kB
    settled, want = Settled(layers, shelf), [block(x) for x in inputs]
    settled.add(layers)
    for _ in range(3):
        for call, (x, y) in enumerate(zip(inputs, want, strict=True)):
            with settled.call(call):
                assert torch.equal(block(x), y)
    assert sum(len(kept) for _, kept in settled._kept.values()) == 1
    assert not (tmp_path / "hidden").exists()
    settled.close()
    assert shelf.reserve(100_000)


def test_one_module_by_two_names(block):
    layers = {"first": block.first, "same": block.first, "second": block.second}
    settled, x = Settled(layers, Shelf()), torch.randn(8, 128)
    want = block(x)
    settled.add(["first"])
    for _ in range(2):
        with settled.call(0):
            assert torch.equal(block(x), want)
    assert not any("forward" in layer.__dict__ for layer in layers.values())


def test_a_follower_keeps_nothing_of_experts_or_behind_them():
    """In a compression they are given tokens that another unit chose; in the end their own."""
    fused = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        )
    ).requires_grad_(False)  # fmt: skip
    unfuse(fused)
    module = fused.model.layers[0]
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    unit = Unit("layer", module, [types.SimpleNamespace(name=f"layer.{name}") for name in names])
    x = torch.randn(1, 6, 32)
    positions = fused.model.rotary_emb(x, torch.arange(6)[None])
    for follower in (False, True):
        with unit.settling(Shelf(), follower):
            unit.settle(unit.layers)
            call = Call(x, (), {"position_embeddings": positions}, None)
            call.run(module, x)
            with unit.running(call):
                call.run(module, x)
            [(_, kept)] = unit.settled._kept.values()
            assert (len(kept) > 4) != follower  # q, k, v, o, and experts
            assert len(kept) >= 4


def test_a_copy_of_a_unit_goes_with_its_last_use():
    """One that the garbage collector has to find would keep a block's weights meanwhile."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block()])})
    weights = Weights.of(model, ["blocks.0"])
    gc.disable()
    try:
        with weights.gated():
            unit = Unit("blocks.0", model["blocks"][0], [])
            copied = unit.copy()
            x = torch.randn(2, 128)
            assert torch.equal(copied.module(x), unit.module(x))
            gone = weakref.ref(copied.module)
            del copied
            assert gone() is None
    finally:
        gc.enable()
