"""Which modules are compressed, why the others are not, and how patterns find them."""

from __future__ import annotations

import pytest
import torch
from helpers import random_llava
from torch import nn

from llava_fa import FourierConfig, FourierError, FourierLinear
from llava_fa.nn.surgery import classify, output_embedding, replace_module, resolve, spellings


@pytest.fixture(scope="module")
def llava():
    with torch.device("meta"):
        return random_llava()


def test_vision_tower_projector_and_language_model_are_compressed(llava):
    plan = classify(llava)
    linears = {name for name, module in llava.named_modules() if isinstance(module, nn.Linear)}
    assert set(plan.layers) == linears - {"lm_head"}
    assert len(plan.layers) == 2 * 6 + 2 + 2 * 7
    assert list(plan.layers) == [name for name, _ in llava.named_modules() if name in set(plan.layers)]


def test_every_parameter_is_accounted_for(llava):
    plan = classify(llava)
    covered = {*plan.layers, *plan.not_compressed}
    for name, _ in llava.named_parameters():
        assert name in covered or name.rpartition(".")[0] in covered


def test_reasons(llava):
    rest = classify(llava).not_compressed
    assert rest["lm_head"] == "output embedding"
    assert rest["model.language_model.embed_tokens"] == "embedding"
    assert rest["model.language_model.layers.0.input_layernorm"] == "normalisation"
    assert rest["model.vision_tower.pre_layrnorm"] == "normalisation"
    assert "convolution" in rest["model.vision_tower.embeddings.patch_embedding"]
    tower = "model.vision_tower.embeddings.class_embedding"
    assert rest[tower] == "a parameter of CLIPVisionEmbeddings, not of a linear layer"
    tied = classify(random_llava(tied=True)).not_compressed
    assert tied["lm_head"] == "output embedding, tied to the input embedding"


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(4, 32, 32))
        self.attention = nn.MultiheadAttention(32, 2)
        self.small = nn.Linear(32, 15)
        self.own = OwnForward(32, 32)
        self.one = nn.Linear(32, 32, bias=False)
        self.same = nn.Linear(32, 32, bias=False)
        self.same.weight = self.one.weight
        self.fine = nn.Linear(16, 16)
        self.packed = FourierLinear.from_linear(nn.Linear(16, 16), FourierConfig(bits=2))


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_odd_modules():
    plan = classify(Odd())
    assert plan.layers == ("fine",)
    rest = plan.not_compressed
    assert rest["experts"] == "fused experts: one parameter of shape 4×32×32 in Odd"
    assert rest["attention.out_proj"] == "inside torch.nn.MultiheadAttention, which reads the weight itself"
    assert rest["small"] == "too small: 15×32, one side is under 16"
    assert rest["own"] == "OwnForward is a linear layer with a forward of its own"
    assert rest["one"] == rest["same"] == "tied to another weight"
    assert rest["packed"] == "compressed already"


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("vision_tower", 12),
        ("model.vision_tower", 12),
        ("model.vision_tower.encoder.layers.0", 6),
        ("vision_tower.vision_model.encoder.layers.0", 6),
        ("multi_modal_projector", 2),
        ("language_model", 14),
        ("language_model.model", 14),
        ("language_model.model.layers.1", 7),
        ("language_model.model.layers.1.mlp.down_proj.weight", 1),
        ("model.language_model.layers.1.mlp", 3),
        ("language_model.layers.*.mlp", 6),
        ("*.k_proj", 4),
        ("*.mlp", 4 + 6),
        ("*.layers.0.*", 6 + 7),
        ("*.layers.[01].self_attn.q_proj", 4),
        ("lm_head", 0),
        ("language_model.lm_head", 0),
    ],
)
def test_skip(llava, pattern, count):
    plan = classify(llava, skip=[pattern])
    skipped = [name for name, why in plan.not_compressed.items() if why == f"skipped by pattern {pattern!r}"]
    assert len(skipped) == count
    assert len(plan.layers) == 28 - count


def test_only_and_skip_together(llava):
    plan = classify(llava, only=["language_model"], skip=["*.down_proj"])
    assert len(plan.layers) == 12
    assert all("language_model" in name and "down_proj" not in name for name in plan.layers)
    assert plan.not_compressed["model.multi_modal_projector.linear_1"] == "outside the patterns of only"


def test_a_number_is_not_a_prefix_of_another():
    names = [f"layers.{i}" for i in range(12)] + [f"layers.{i}.fc" for i in range(12)]
    assert set(resolve(["layers.1"], names, "skip")) == {"layers.1", "layers.1.fc"}


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("k_proj", "Did you mean *.k_proj"),
        ("vision_towr", "Did you mean model.vision_tower"),
        ("model.language_model.layer.0", "model.language_model.layers.0"),
        ("xyz", "Modules are, for instance,"),
    ],
)
@pytest.mark.parametrize("option", ["skip", "only"])
def test_a_pattern_that_matches_nothing_is_an_error(llava, pattern, advice, option):
    with pytest.raises(FourierError) as caught:
        classify(llava, **{option: [pattern]})
    assert f"{option} pattern {pattern!r} matches no module" in str(caught.value)
    assert advice in str(caught.value)


def test_nothing_left_is_an_error(llava):
    with pytest.raises(FourierError, match="no layer is left to compress"):
        classify(llava, only=["lm_head"])
    with pytest.raises(FourierError, match="no layer that can be compressed"):
        classify(nn.Sequential(nn.LayerNorm(4)))


def test_spellings_never_confuse_parts(llava):
    names = [name for name, _ in llava.named_modules() if name]
    owner: dict[str, str] = {}
    for name in names:
        for form in spellings(name):
            assert owner.setdefault(form, name) == name, form


def test_replace_module():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    new = nn.Identity()
    replace_module(model, "0.0", new)
    assert model[0][0] is new


def test_a_model_that_has_no_answer_about_its_embeddings():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.layer = nn.Embedding(64, 32), nn.Linear(32, 32)

        def get_input_embeddings(self):
            raise NotImplementedError("not auto-handled")

    assert classify(Silent()).layers == ("layer",)
    assert classify(Silent(), embeddings=True).embeddings == ("words",)
    with pytest.raises(FourierError, match="no embedding of this model can be compressed"):
        classify(nn.Sequential(nn.Linear(32, 32)), embeddings=True)


class Centred(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) - self.weight.mean(0)


class Tables(nn.Module):
    def __init__(self, **tied):
        super().__init__()
        self.words, self.others, self.centred = nn.Embedding(1000, 64), nn.Embedding(300, 64), Centred(300, 64)
        self.positions, self.narrow = nn.Embedding(16, 64), nn.Embedding(9000, 8)
        self.second, self.lm_head = nn.Embedding(1000, 64), nn.Linear(64, 1000)
        self.layer = nn.Linear(64, 64)
        self.all_tied_weights_keys = tied
        for key, of in tied.items():
            self.get_submodule(key.removesuffix(".weight")).weight = self.get_submodule(
                of.removesuffix(".weight")
            ).weight

    def get_input_embeddings(self):
        return self.words


def test_which_tables_are_packed():
    plan = classify(Tables(), embeddings=True)
    assert plan.layers == ("layer",)
    assert plan.embeddings == ("words", "others", "second", "lm_head")
    assert plan.not_compressed == {
        "centred": "Centred is an embedding with a forward of its own",
        "positions": "embedding, under 1% of the model",
        "narrow": "too small: one side is under 16",
    }
    assert classify(Tables()).not_compressed["others"] == "embedding"
    assert (
        classify(Tables(), skip=["others"], embeddings=True).not_compressed["others"] == "skipped by pattern 'others'"
    )


def test_what_is_tied_follows_or_keeps_the_table():
    tied = {"second.weight": "words.weight", "lm_head.weight": "words.weight"}
    plan = classify(Tables(**tied), embeddings=True)
    assert plan.embeddings == ("words", "others")
    assert plan.not_compressed["second"] == "embedding, tied to words"
    odd = classify(Tables(**{"centred.weight": "others.weight"}), embeddings=True)
    assert odd.embeddings == ("words", "second", "lm_head")
    assert odd.not_compressed["others"] == "tied to centred.weight, which is no plain output embedding and no embedding"
    silent = Tables()
    silent.second.weight = silent.words.weight
    found = classify(silent, embeddings=True)
    assert found.not_compressed["words"] == found.not_compressed["second"] == "tied to another weight"


class Words(nn.Module):
    """A language model: words, a layer, a head."""

    def __init__(self):
        super().__init__()
        self.words, self.layer, self.head = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64, bias=False)

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head


class Around(nn.Module):
    """What holds one, beside another, and knows its words alone."""

    def __init__(self):
        super().__init__()
        self.voice, self.language = Words(), Words()

    def get_input_embeddings(self):
        return self.language.get_input_embeddings()

    def get_output_embeddings(self):
        return None


def test_the_output_embedding_of_the_language_model_within():
    """Nemotron-H Omni answers for its words, and not for its logits."""
    model = Around()
    assert output_embedding(model) is model.language.head
    found = classify(model, embeddings=True)
    assert found.embeddings == ("voice.words", "language.words", "language.head")
    assert "voice.head" in found.layers
    assert classify(model).not_compressed["language.head"] == "output embedding"
    assert output_embedding(nn.Linear(4, 4)) is None
