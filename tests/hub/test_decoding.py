"""Attention of one query: the same numbers as transformers' function, and that function in every other case."""

import pytest
import torch
from packed_layers import best, random_tensors
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava_fa import FourierConfig, FourierLinear, compress
from llava_fa.hub import decoding
from llava_fa.hub.loading import load


class Attention(nn.Module):
    def __init__(self, layer, groups=1):
        super().__init__()
        self.o_proj = layer
        self.num_key_value_groups = groups


def packed(groups=1):
    return Attention(FourierLinear.from_tensors(best(16, 16), random_tensors(best(16, 16))), groups)


def made(heads, groups, queries=1, dtype=torch.float32, batch=2, keys=37, width=16):
    torch.manual_seed(heads + groups)
    shapes = [(batch, heads, queries, width), (batch, heads // groups, keys, width), (batch, heads // groups, keys, 8)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def oracle(query, key, value, mask=None, scaling=None):
    groups = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(groups, 1) for part in (key, value))
    logits = query.double() @ key.mT * (scaling or query.shape[-1] ** -0.5)
    logits = logits if mask is None else logits + mask
    return (logits.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups"), [(6, 1), (6, 3), (4, 4), (1, 1)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.1])
def test_one_query_gives_what_the_definition_gives(monkeypatch, dtype, heads, groups, masked, scaling):
    query, key, value = made(heads, groups, dtype=dtype)
    mask = None
    if masked:  # the first sequence is padded on the left
        mask = torch.zeros(2, 1, 1, 37, dtype=dtype)
        mask[0, :, :, :9] = torch.finfo(dtype).min
    expected = oracle(query, key, value, mask, scaling)
    theirs = sdpa_attention_forward(packed(groups), query, key, value, mask, scaling=scaling)[0]
    monkeypatch.setattr(decoding, "sdpa_attention_forward", None)
    found, maps = decoding.attend(packed(groups), query, key, value, mask, scaling=scaling)
    assert maps is None
    assert found.shape == theirs.shape
    assert found.dtype == dtype
    error, allowed = (found - expected).norm(), (theirs - expected).norm()
    assert error <= 2 * allowed + 1e-6 * expected.norm()


def test_a_mask_of_booleans_and_a_static_cache_that_is_not_full():
    query, key, value = made(6, 3)
    mask = (torch.arange(37) < 20).view(1, 1, 1, 37)
    found = decoding.attend(packed(3), query, key, value, mask)[0]
    expected = oracle(query, key[:, :, :20], value[:, :, :20])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "queries", "mask", "options"),
    [
        (Attention(nn.Linear(16, 16), 3), 1, None, {}),  # not packed
        (packed(3), 5, None, {}),
        (packed(3), 1, torch.zeros(2, 6, 1, 37), {}),  # a mask a head
        (packed(3), 1, None, {"dropout": 0.5}),
        (packed(3), 1, None, {"position_bias": torch.zeros(1, 6, 1, 37)}),
    ],
)
def test_all_else_goes_to_what_was_there_before(monkeypatch, module, queries, mask, options):
    seen = []

    def theirs(*arguments, **named):
        seen.append((arguments, named))
        return sdpa_attention_forward(*arguments, **named)

    monkeypatch.setattr(decoding, "sdpa_attention_forward", theirs)
    query, key, value = made(6, 3, queries)
    torch.manual_seed(0)
    found = decoding.attend(module, query, key, value, mask, scaling=0.2, is_causal=True, **options)[0]
    torch.manual_seed(0)
    expected = sdpa_attention_forward(module, query, key, value, mask, scaling=0.2, is_causal=True, **options)[0]
    assert len(seen) == 1
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_answers_through_it(tmp_path, monkeypatch, dtype):
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is decoding.attend
    compress("tiny", tmp_path / "small", FourierConfig(bits=4))
    model, processor = load(tmp_path / "small", dtype=dtype)
    prompt = processor(text="How many cubes are there?", return_tensors="pt")
    served = []
    whether = decoding._served
    monkeypatch.setattr(decoding, "_served", lambda *given: served.append(whether(*given)) or served[-1])

    def answer():
        made = model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
                              return_dict_in_generate=True)  # fmt: skip
        return torch.stack(made.logits)

    ours = answer()
    assert sum(served) == 5 * model.config.text_config.num_hidden_layers
    monkeypatch.setattr(decoding, "_served", lambda *_: False)
    torch.testing.assert_close(ours, answer(), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2)
