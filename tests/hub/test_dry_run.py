"""A model that runs without its weights: the shapes of the real one, in the time and the memory of a small one."""

import time

import pytest
import torch
import transformers
from torch import nn

from llava_fa.hub.dry_run import stand_in, without_arithmetic


def test_shapes_are_those_of_the_real_model():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(6)[None]
    real = model(ids, output_hidden_states=True)
    with without_arithmetic():
        dry = stand_in(model)(ids, output_hidden_states=True)
    assert dry.logits.shape == real.logits.shape
    assert [one.shape for one in dry.hidden_states] == [one.shape for one in real.hidden_states]


def test_the_largest_model_takes_no_memory():
    """400 G parameters in float32 would be 1.6 TB."""
    config = transformers.LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 3e11
    start = time.process_time()
    with without_arithmetic():
        logits = stand_in(model)(torch.arange(6)[None], use_cache=False).logits
    assert logits.shape == (1, 6, 32000)
    assert time.process_time() - start < 20


def test_pictures_too():
    layers = [nn.Conv2d(3, 64, 16, 16), nn.Flatten(2), nn.Linear(196, 5), nn.GELU(), nn.Softmax(-1)]
    with without_arithmetic():
        assert stand_in(nn.Sequential(*layers))(torch.zeros(2, 3, 224, 224)).shape == (2, 64, 5)


def test_small_tensors_keep_their_values():
    """They may decide what runs next."""
    with without_arithmetic():
        assert (torch.tensor([3, 4]).prod() + 1).item() == 13
        assert torch.linspace(0, 6, 4).int().tolist() == [0, 2, 4, 6]


def test_large_ones_may_be_written_into_and_viewed():
    with without_arithmetic():
        scores = torch.ones(1024, 8) @ torch.ones(8, 1024)
        assert scores.mul_(2).masked_fill_(torch.ones(1024, 1024, dtype=torch.bool), 0).shape == (1024, 1024)
        assert torch.view_as_complex(scores.view(1024, 512, 2)).shape == (1024, 512)
        scores[:, :4] = torch.ones(1024, 4)


def test_nothing_is_allocated_beyond_reason():
    with without_arithmetic(), pytest.raises(MemoryError, match="zeros"):
        torch.zeros(1 << 20, 1 << 20)


def test_the_model_and_torch_stay_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dtype, state = torch.get_default_dtype(), torch.random.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with without_arithmetic():
            assert stand_in(model)(torch.rand(3, 4)).dtype == torch.float32
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(dtype)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
