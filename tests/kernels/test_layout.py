"""The tensor table: the numbers of docs/format.md, JSON round trip, damaged descriptions."""

from __future__ import annotations

import pytest
import torch
from packed_layers import LAYOUTS, best, layout_id, paper, random_tensors, trellis

from llava_fa import FourierConfig, FourierError
from llava_fa.kernels.layout import Layout
from llava_fa.solver.approximate import approximate


def test_the_table_for_best():
    assert best(10, 7, 6, rank=2).tensors() == {
        "codes": (torch.uint8, (10, 3)),  # 4 codes of 6 bits
        "row_scale": (torch.bfloat16, (10,)),
        "input_scale": (torch.bfloat16, (7,)),
        "signs": (torch.uint8, (1,)),
        "codebook": (torch.bfloat16, (64, 2)),
        "left": (torch.int8, (10, 2)),
        "right": (torch.int8, (2, 7)),
        "left_scale": (torch.bfloat16, (2,)),
        "right_scale": (torch.bfloat16, (2,)),
    }
    assert best(10, 7, 6, rank=2, factor_dtype="bf16").tensors()["right"] == (torch.bfloat16, (2, 7))
    assert "left" not in best(10, 7, 6).tensors()


def test_the_table_for_a_trellis():
    table = trellis(10, 7, 6).tensors()
    assert table["codes"] == (torch.uint8, (10, 4))  # 4 codes of 6 bits, and the 6 that the first window has before
    assert table["codebook"] == (torch.bfloat16, (4096, 2))
    assert trellis(10, 7, 6).codebook == "trellis_6_12"
    assert best(10, 7, 6).codebook == "bits_6"


def test_the_table_for_paper():
    assert paper(10, 7, 4, 5, rank=2).tensors() == {
        "codes": (torch.uint8, (10, 5)),  # 4 codes of 9 bits
        "r_max": (torch.float32, (1,)),
        "left": (torch.bfloat16, (10, 2, 2)),
        "right": (torch.bfloat16, (2, 4, 2)),
    }


@pytest.mark.parametrize(
    "config",
    [
        FourierConfig(bits=2),
        FourierConfig(bits=3.5, rank=2),
        FourierConfig(bits=1, codes="trellis"),
        FourierConfig(bits=2.5, codes="trellis", rank=2),
        FourierConfig(bits=2, codes="auto"),
        FourierConfig(bits=4, rank=3, factor_dtype="bf16"),
        FourierConfig(method="paper", bits=4),
        FourierConfig(method="paper", amplitude_bits=3, phase_bits=6, rank=4),
    ],
    ids=lambda config: f"{config.method}-{config.codes}-{config.bits}-{config.rank}",
)
@pytest.mark.parametrize("shape", [(20, 33), (17, 16)])
def test_the_solver_writes_the_table(config, shape):
    found = approximate(torch.randn(shape, generator=torch.Generator().manual_seed(0)), config)
    Layout.from_config(config, *shape).check(found.tensors)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_json_round_trip(layout):
    assert Layout.from_dict(layout.to_dict()) == layout


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [4]},
        {"shape": [4, 0]},
        {"code_bits": 9},
        {"code_bits": 1},
        {"rank": 33},
        {"rank": -1},
        {"method": "worst"},
        {"factor_dtype": "int4"},
        {"amplitude_bits": 2, "phase_bits": 2},
        {"codes": "trellis"},
        {"codes": "trellis", "state_bits": 17},
        {"codes": "trellis", "state_bits": 3},
        {"codes": "vq", "state_bits": 12},
        {"state_bits": 12},
        {"colour": "red"},
        {"shape": None},
    ],
    ids=str,
)
def test_a_damaged_description_is_refused(change):
    with pytest.raises(FourierError, match=r"layer layout|description is damaged"):
        Layout.from_dict({**best(24, 32).to_dict(), **change})


def test_paper_needs_its_split():
    with pytest.raises(FourierError, match="layer layout"):
        Layout.from_dict({**paper(24, 32, 2, 3).to_dict(), "phase_bits": 4})
    with pytest.raises(FourierError, match="layer layout"):
        Layout.from_dict({**paper(24, 32, 2, 3).to_dict(), "factor_dtype": "int8"})
    with pytest.raises(FourierError, match="layer layout"):
        Layout.from_dict({**paper(24, 32, 2, 3).to_dict(), "codes": "trellis", "state_bits": 12})


def test_check_names_what_is_wrong():
    layout = best(24, 32)
    tensors = random_tensors(layout)
    with pytest.raises(FourierError, match="missing tensor signs"):
        layout.check({name: t for name, t in tensors.items() if name != "signs"})
    with pytest.raises(FourierError, match="unknown tensor left"):
        layout.check({**tensors, "left": tensors["codes"]})
    with pytest.raises(FourierError, match=r"row_scale is torch.float32 \[24\], not torch.bfloat16 \[24\]"):
        layout.check({**tensors, "row_scale": tensors["row_scale"].float()})
