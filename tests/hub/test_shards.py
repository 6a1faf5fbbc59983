"""Our reader and writer of safetensors against the library's own."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llava_fa import FourierError
from llava_fa.hub.shards import Item, file_metadata, read_header, tensor_bytes, write_file

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=6))
def test_round_trip_through_the_library(tmp_path_factory, kinds):
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": (torch.randn(shape, generator=generator) * 3).to(dtype) for i, (dtype, shape) in enumerate(kinds)
    }
    write_file(folder / "ours", [Item.of(name, tensor) for name, tensor in tensors.items()], {"note": "x"})
    save_file(tensors, folder / "theirs")
    for path in ("ours", "theirs"):
        loaded = load_file(folder / path)
        entries, _ = read_header(folder / path)
        assert loaded.keys() == entries.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name], tensor)
            assert torch.equal(entries[name].read(), tensor)
            assert b"".join(entries[name].chunks()) == tensor_bytes(tensor)
    assert file_metadata(folder / "ours") == {"format": "pt", "note": "x"}


def test_copies_keep_dtypes_torch_may_not_know(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "in").write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")
    entries, _ = read_header(tmp_path / "in")
    write_file(tmp_path / "out", [Item.copy(entries["x"], "y")])
    copied, _ = read_header(tmp_path / "out")
    assert copied["y"].dtype == "F4"
    assert b"".join(copied["y"].chunks()) == b"abcd"
    with pytest.raises(FourierError, match="x has dtype F4"):
        entries["x"].read()


def raw(header, data=b"\0" * 8):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short"),
        (b"\xff" * 8, "cut short"),
        (raw([]), "not that of a safetensors file"),
        (raw(b"{"), "not that of a safetensors file"),
        (raw({"x": 1}), "not that of a safetensors file"),
        (raw({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}), "not that of a safetensors file"),
        (
            raw({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
            "has .* bytes where its header announces",
        ),
        (
            raw({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
            r"8 bytes do not make F32 \[3\]",
        ),
        (raw({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), "not that of a safetensors file"),
        (raw({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}), "not that of a safetensors file"),
        (
            raw({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
            "x begins at byte .* where the one before",
        ),
        (raw({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}), "has .* bytes where its header announces"),
        (raw({"x": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}), "not that of a safetensors file"),
        (raw({"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}), "not that of a safetensors file"),
        (raw({"__metadata__": {"a": 1}}), "not that of a safetensors file"),
    ],
)
def test_hostile_files(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FourierError, match=message):
        read_header(tmp_path / "file")


def test_the_order_of_items_does_not_matter(tmp_path):
    items = [Item.of(f"t{i}", torch.arange(i + 1).to(DTYPES[i % 4])) for i in range(6)]
    write_file(tmp_path / "a", items)
    write_file(tmp_path / "b", items[::-1])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
