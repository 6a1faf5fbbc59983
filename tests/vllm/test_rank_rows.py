"""What a rank reads of a folder, and by which names; without vLLM."""

import helpers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import llava_fa
from llava_fa import FourierConfig, FourierError
from llava_fa.hub.checkpoint import read_layer, read_metadata
from llava_fa.kernels.layout import Layout
from llava_fa.vllm.folder import Folder
from llava_fa.vllm.names import Names, canonical, rewritten
from llava_fa.vllm.shares import Share, cost, shares, split, with_rows


@given(m=st.integers(1, 500), ranks=st.integers(1, 9))
def test_ranks_share_out_every_row_once(m, ranks):
    rows = [range(*split(m, ranks, rank)) for rank in range(ranks)]
    assert [row for some in rows for row in some] == list(range(m))


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4), ranks=st.integers(1, 4))
def test_rows_of_a_fused_matrix_are_those_of_its_parts(sizes, ranks):
    """q, k and v stored one by one, or as one matrix: a rank has the same rows of them."""
    whole = [size * ranks for size in sizes]
    matrices = [torch.arange(m) + 1000 * index for index, m in enumerate(whole)]
    for rank in range(ranks):
        wanted = [(rank * size, (rank + 1) * size) for size in sizes]
        apart = shares([str(index) for index in range(len(sizes))], wanted, whole)
        taken = torch.cat([matrices[int(share.name)][start:end] for share in apart for start, end in share.rows])
        (together,) = shares(["all"], wanted, whole)
        assert torch.equal(torch.cat([torch.cat(matrices)[start:end] for start, end in together.rows]), taken)
        assert together.count == sum(sizes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random LLaVA compressed with a low-rank part, with trellis codes, and in two factors."""
    source = helpers.save_llava(tmp_path_factory.mktemp("model") / "llava")
    configs = [
        FourierConfig(bits=4, rank=4),
        FourierConfig(bits=2, codes="trellis"),
        FourierConfig(bits=4, inner_rank=8),
    ]
    outs = []
    for index, config in enumerate(configs):
        outs.append(tmp_path_factory.mktemp("out") / str(index))
        llava_fa.compress(source, outs[-1], config, embeddings=4)
    return outs


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_rows_are_those_of_the_whole_weight(folders, kind):
    folder = Folder(folders[kind], read_metadata(folders[kind]))
    for name, record in folder.metadata.layers.items():
        m = record.layout.out_features
        pieces = ((0, m // 3), (m // 3 + 2, m - 1))
        some = folder.layer(Share(name, pieces), torch.float32, torch.device("cpu"))
        whole = read_layer(folders[kind], name).dequantize()
        wanted = torch.cat([whole[start:end] for start, end in pieces])
        # PyTorch adds a low-rank part, or multiplies two factors, of another number of rows in another order.
        torch.testing.assert_close(some.dequantize(), wanted, rtol=1e-5, atol=1e-6)


def test_a_codebook_is_one_tensor_of_all_layers(folders):
    folder = Folder(folders[0], read_metadata(folders[0]))
    names = [name for name, record in folder.metadata.layers.items() if not record.embedding][:3]
    layers = [
        folder.layer(Share(name, ((0, folder.record(name).layout.out_features),)), torch.float32, torch.device("cpu"))
        for name in names
    ]
    assert len({layer.tensors()["codebook"].data_ptr() for layer in layers}) == 1


def test_what_cannot_be_split_is_refused():
    bits = {"code_bits": 8, "amplitude_bits": 4, "phase_bits": 4}
    paper = Layout(method="paper", out_features=8, in_features=8, factor_dtype="bf16", **bits)
    with pytest.raises(FourierError, match="method paper"):
        with_rows(paper, Share("a.layer", ((0, 4),)))
    assert with_rows(paper, Share("a.layer", ((0, 8),))) is paper
    low = Layout(method="best", out_features=8, in_features=8, code_bits=8, rank=4)
    with pytest.raises(FourierError, match=r"a\.layer: one rank would have 2 of its 8 rows"):
        with_rows(low, Share("a.layer", ((6, 8),)))


def test_what_a_rank_holds_and_sends():
    """By counting: a ring moves b bytes p - 1 times to gather, and twice that to sum."""
    row = cost(4096, 14336, 4, 2.0, "row")
    assert row.held == 4096 * 14336 * 2 / 8 / 4
    assert row.dense_held == 8 * row.held
    assert row.sent == 3 * (14336 / 4) * 2 + 2 * 3 * (4096 / 4) * 2
    assert row.dense_sent == 2 * 3 * (4096 / 4) * 2
    assert cost(4096, 4096, 4, 2.0, "column").sent == 0


def test_names_by_the_models_own_mapping_or_by_what_is_the_same():
    names = Names(
        ["model.language_model.layers.0.q_proj", "model.vision_tower.encoder.fc", "lm_head", "a.x", "model.a.x"]
    )
    names.map(lambda name: name.replace("model.language_model.", "language_model.model.", 1))
    names.map(lambda name: None)  # a nested model's: too late
    assert names.find("language_model.model.layers.0.q_proj") == "model.language_model.layers.0.q_proj"
    assert names.find("vision_tower.vision_model.encoder.fc") == "model.vision_tower.encoder.fc"
    assert names.find("language_model.lm_head") == "lm_head"
    assert names.find("language_model.model.layers.1.q_proj") is None
    assert names.find("model.model.a.x") is None  # two are called so
    assert canonical("language_model.model.layers.0.mlp") == canonical("model.language_model.layers.0.mlp")


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_model = nn.ModuleDict({"encoder": nn.ModuleDict({"fc": nn.Linear(2, 2)})})


def test_a_wrapper_is_put_in_or_left_out():
    model = nn.ModuleDict({"vision_tower": Tower(), "language_model": nn.ModuleDict({"norm": nn.LayerNorm(2)})})
    renamed = rewritten(model, lambda name: name.removeprefix("model."))
    assert renamed("model.vision_tower.encoder.fc.weight") == "vision_tower.vision_model.encoder.fc.weight"
    assert renamed("model.vision_tower.post_layernorm.bias") == "vision_tower.vision_model.post_layernorm.bias"
    assert renamed("model.language_model.model.norm.weight") == "language_model.norm.weight"
    for same in ("vision_tower.vision_model.encoder.fc.q_proj.weight", "language_model.norm.weight", "other.weight"):
        assert renamed(same) == same
