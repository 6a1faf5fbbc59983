"""Attention of one query: the same numbers as transformers' function, and that function in every other case."""

import pytest
import torch
from packed_layers import best, random_tensors
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
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


def made(heads, groups, queries=1, dtype=torch.float32, values=16, keyed=2):
    torch.manual_seed(heads + groups)
    shapes = [(2, heads, queries, 16), (keyed, heads // groups, 37, 16), (keyed, heads // groups, 37, values)]
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
@pytest.mark.parametrize("values", [16, 8])  # torch's fused kernel asks for one width, and has its way with 16
@pytest.mark.parametrize("scaling", [None, 0.1])
def test_one_query_gives_what_the_definition_gives(monkeypatch, dtype, heads, groups, masked, values, scaling):
    query, key, value = made(heads, groups, dtype=dtype, values=values)
    mask = None
    if masked:  # the first sequence is padded on the left
        mask = torch.zeros(2, 1, 1, 37, dtype=dtype)
        mask[0, :, :, :9] = torch.finfo(dtype).min
    expected = oracle(query, key, value, mask, scaling)
    theirs = sdpa_attention_forward(packed(groups), query, key, value, mask, scaling=scaling)[0]
    monkeypatch.setattr(decoding, "_before", None)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if values == 16 else [SDPBackend.MATH]):
        found, maps = decoding.attend(packed(groups), query, key, value, mask, scaling=scaling)
    assert maps is None
    assert found.is_contiguous()
    assert found.shape == theirs.shape
    assert found.dtype == dtype
    error, allowed = (found - expected).norm(), (theirs - expected).norm()
    assert error <= 2 * allowed + 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_booleans_and_a_static_cache_that_is_not_full(dtype):
    query, key, value = made(6, 3, dtype=dtype)
    mask = (torch.arange(37) < 20).view(1, 1, 1, 37)
    found = decoding.attend(packed(3), query, key, value, mask)[0]
    expected = oracle(query, key[:, :, :20], value[:, :, :20])
    assert (found - expected).norm() < (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()


@pytest.mark.parametrize(("heads", "groups"), [(6, 3), (4, 1)])
def test_gradients_are_those_of_the_definition(heads, groups):
    given = [part.bfloat16().float().requires_grad_() for part in made(heads, groups)]
    weight = torch.randn(2, 1, heads, 16)
    wanted = torch.autograd.grad((oracle(*given) * weight).sum(), given)
    found = torch.autograd.grad((decoding.attend(packed(groups), *given, None)[0] * weight).sum(), given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "queries", "keyed", "mask", "options"),
    [
        (Attention(nn.Linear(16, 16), 3), 1, 2, None, {}),  # not packed
        (packed(3), 5, 2, None, {}),
        (packed(3), 1, 1, None, {}),  # keys that all sequences share
        (packed(3), 1, 2, torch.zeros(2, 6, 1, 37), {}),  # a mask a head
        (packed(3), 1, 2, torch.zeros(6, 1, 37), {}),
        (packed(3), 1, 2, torch.zeros(37), {}),
        (packed(3), 1, 2, None, {"dropout": 0.5}),
        (packed(3), 1, 2, None, {"position_bias": torch.zeros(1, 6, 1, 37)}),
        (packed(3), 1, 2, None, {"cache": object()}),
        (packed(3), 1, 2, None, {"softcap": 30.0}),
    ],
)
def test_all_else_goes_to_what_was_there_before(monkeypatch, module, queries, keyed, mask, options):
    seen = []

    def theirs(*arguments, **named):
        seen.append((arguments, named))
        return "theirs"

    monkeypatch.setattr(decoding, "_before", theirs)
    query, key, value = made(6, 3, queries, keyed=keyed)
    found = decoding.attend(module, query, key, value, mask, scaling=0.2, is_causal=True, **options)
    wanted = {"dropout": 0.0, "scaling": 0.2, "is_causal": True, **options}
    assert found == "theirs"
    assert seen == [((module, query, key, value, mask), wanted)]


def test_another_function_under_that_name_is_kept(monkeypatch):
    def theirs(*arguments, **named):
        return "theirs"

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", theirs)
    monkeypatch.setattr(decoding, "_before", decoding._before)
    decoding.install()
    decoding.install()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is decoding.attend
    assert decoding.attend(nn.Module(), *made(6, 3), None) == "theirs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_answers_through_it(tmp_path, monkeypatch, dtype):
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is decoding.attend
    assert decoding._before is sdpa_attention_forward
    compress("tiny", tmp_path / "small", FourierConfig(bits=4))
    model, processor = load(tmp_path / "small", dtype=dtype)
    prompt = processor(text="How many cubes are there?", return_tensors="pt")
    served = []
    whether = decoding._served
    monkeypatch.setattr(decoding, "_served", lambda *given: served.append(whether(*given)) or served[-1])

    @torch.inference_mode()
    def answer():  # tokens are given, whatever the model makes of them
        cache, logits = None, []
        for ids in (prompt["input_ids"], *torch.arange(20, 25).view(5, 1, 1)):
            made = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            logits.append(made.logits[:, -1])
        return torch.stack(logits).float()

    ours = answer()
    assert sum(served) == 5 * model.config.text_config.num_hidden_layers
    monkeypatch.setattr(decoding, "_served", lambda *_: False)
    theirs = answer()
    assert (ours - theirs).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * theirs.norm()
