import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fa import FourierError
from llava_fa.maths import bitpack


def by_definition(codes, bits):
    """One big integer, code i at bit i·b, written little-endian."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(number.to_bytes((len(codes) * bits + 7) // 8, "little"))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), bits=st.integers(1, 16))
def test_pack_is_its_definition_and_unpack_undoes_it(data, bits):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=50))
    packed = bitpack.pack(torch.tensor([codes, codes[::-1]]), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [by_definition(codes, bits), by_definition(codes[::-1], bits)]
    assert bitpack.unpack(packed, bits, len(codes)).tolist() == [codes, codes[::-1]]


def test_more_leading_dimensions():
    codes = torch.randint(0, 8, (2, 3, 11))
    assert torch.equal(bitpack.unpack(bitpack.pack(codes, 3), 3, 11), codes.int())


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.tensor([4]), 2, "outside 0 … 3"),
        (torch.tensor([-1]), 2, "outside 0 … 3"),
        (torch.tensor([256]), 8, "outside 0 … 255"),
        (torch.tensor([1.0]), 2, "float32"),
        (torch.tensor([1]), 17, "codes of 17 bits"),
        (torch.tensor([1]), 0, "codes of 0 bits"),
    ],
)
def test_codes_that_do_not_fit(codes, bits, message):
    with pytest.raises(FourierError, match=message):
        bitpack.pack(codes, bits)


def test_bytes_that_do_not_fit():
    with pytest.raises(FourierError, match="take uint8 with 3 bytes a row"):
        bitpack.unpack(torch.zeros(4, dtype=torch.uint8), 5, 4)
    with pytest.raises(FourierError, match="int32"):
        bitpack.unpack(torch.zeros(3, dtype=torch.int32), 5, 4)
