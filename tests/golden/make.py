"""Builds the golden files from whole numbers, so that nobody's random generator or solver is in them.

`python tests/golden/make.py` writes `model.safetensors` and `config.json` for each version of the format (version 1
here, later ones in folders); the test rebuilds and compares. A change that needs new golden bytes needs a new format
version.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from llava_fa import FourierConfig
from llava_fa.hub.checkpoint import LayerRecord, Metadata, codebook_digest, file_keys
from llava_fa.hub.shards import Item, write_file
from llava_fa.kernels.layout import FactoredLayout, Layout
from llava_fa.maths.bitpack import pack

HERE = Path(__file__).parent


def _numbers(name: str, shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
    """Whole numbers low … high from SHA-256 of the name and the position."""
    count = torch.Size(shape).numel()
    values = [
        low + int.from_bytes(hashlib.sha256(f"{name} {i}".encode()).digest()[:4], "little") % (high - low + 1)
        for i in range(count)
    ]
    return torch.tensor(values).reshape(shape)


def versions() -> dict[Path, dict[str, Layout | FactoredLayout]]:
    """Folder → layers, for every version of the format."""
    return {
        HERE: layouts(),
        HERE / "version2": trellis_layouts(),
        HERE / "version3": factored_layouts(),
        HERE / "version4": embeddings(),
    }


def embeddings() -> dict[str, Layout | FactoredLayout]:
    """Words of an even and an odd width, and a head of the same codes."""
    return {
        "words.even": Layout(method="best", out_features=6, in_features=12, code_bits=3),
        "words.odd": Layout(method="best", out_features=3, in_features=7, code_bits=8),
        "best.even": Layout(method="best", out_features=5, in_features=12, code_bits=3),
    }


def factored_layouts() -> dict[str, Layout | FactoredLayout]:
    """Factors of the same codes, and of two kinds; grouped-query attention's shape; an odd n; beside a plain layer."""
    trellis = Layout(method="best", out_features=4, in_features=9, code_bits=3, codes="trellis", state_bits=12)
    return {
        "factored.wide": FactoredLayout(
            left=Layout(method="best", out_features=3, in_features=4, code_bits=3),
            right=Layout(method="best", out_features=4, in_features=10, code_bits=3),
        ),
        "factored.trellis": FactoredLayout(
            left=Layout(method="best", out_features=6, in_features=4, code_bits=6), right=trellis
        ),
        "best.even": Layout(method="best", out_features=5, in_features=12, code_bits=3),
    }


def trellis_layouts() -> dict[str, Layout]:
    """Windows that begin in every bit of a byte and reach into a third one; beside rings of the same size."""
    return {
        "trellis.even": Layout(
            method="best", out_features=4, in_features=20, code_bits=3, codes="trellis", state_bits=12
        ),
        "trellis.odd": Layout(
            method="best", out_features=3, in_features=7, code_bits=7, rank=1, codes="trellis", state_bits=12
        ),
        "best.even": Layout(method="best", out_features=5, in_features=12, code_bits=3),
    }


def layouts() -> dict[str, Layout]:
    """Between them: odd and even n, codes that cross bytes, both kinds of factors, a shared codebook."""
    return {
        "best.even": Layout(method="best", out_features=5, in_features=12, code_bits=3),
        "best.odd": Layout(method="best", out_features=4, in_features=7, code_bits=3, rank=2),
        "best.wide": Layout(method="best", out_features=3, in_features=10, code_bits=6, rank=1, factor_dtype="bf16"),
        "paper.even": Layout(
            method="paper",
            out_features=4,
            in_features=6,
            code_bits=5,
            factor_dtype="bf16",
            amplitude_bits=2,
            phase_bits=3,
        ),
        "paper.odd": Layout(
            method="paper",
            out_features=3,
            in_features=9,
            code_bits=9,
            rank=2,
            factor_dtype="bf16",
            amplitude_bits=4,
            phase_bits=5,
        ),
    }


def tensors(name: str, layout: Layout | FactoredLayout) -> dict[str, torch.Tensor]:
    """All tensors of one layer; scales and points are short binary fractions, which bf16 holds exactly."""
    if isinstance(layout, FactoredLayout):
        parts = layout.parts().items()
        return {
            prefix + key: tensor for prefix, part in parts for key, tensor in tensors(f"{name}.{prefix}", part).items()
        }
    out = {}
    for key, (dtype, shape) in layout.tensors().items():
        seed = f"{name}.{key}"
        if key == "codebook":
            seed = layout.codebook.replace("_", " ")
        if key == "codes" and layout.codes == "trellis":
            out[key] = pack(_numbers(seed, (shape[0], layout.row_bits), 0, 1), 1)
        elif key == "codes":
            top = (1 << layout.code_bits) - 1
            out[key] = pack(_numbers(seed, (shape[0], layout.coefficients), 0, top), layout.code_bits)
        elif key == "signs":
            out[key] = pack(_numbers(seed, (layout.padded_features,), 0, 1), 1)
        elif dtype == torch.int8:
            out[key] = _numbers(seed, shape, -127, 127).to(dtype)
        elif key in ("codebook", "left", "right"):
            out[key] = (_numbers(seed, shape, -128, 128) / 64).to(dtype)
        else:
            out[key] = (_numbers(seed, shape, 1, 128) / 128).to(dtype)
    return out


def build(folder: Path, layers: dict[str, Layout | FactoredLayout]) -> None:
    """Write both golden files to ``folder``."""
    stored: dict[str, torch.Tensor] = {}
    digests: dict[str, str] = {}
    for name, layout in layers.items():
        layer = tensors(name, layout)
        stored |= {file_key: layer[key] for key, file_key in file_keys(name, layout).items()}
        for prefix, part in layout.parts().items():
            if prefix + "codebook" in layer:
                digests[part.codebook] = codebook_digest(layer[prefix + "codebook"])
    write_file(folder / "model.safetensors", [Item.of(name, tensor) for name, tensor in stored.items()])
    records = {
        name: LayerRecord(layout, 0.25, None, embedding=name.startswith("words")) for name, layout in layers.items()
    }
    parts = [part for layout in layers.values() for part in layout.parts().values()]
    codes = "auto" if any(part.state_bits for part in parts) else "rings"
    metadata = Metadata(FourierConfig(bits=1.5, codes=codes), records, {"lm_head": "output embedding"}, digests)
    text = json.dumps({"quantization_config": metadata.to_dict()}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")


def main() -> None:
    """Write the files, and the weights by the definition of docs/format.md in float64."""
    import sys

    sys.path.insert(0, str(HERE.parent))
    from packed_layers import exact_weight

    for folder, layers in versions().items():
        folder.mkdir(exist_ok=True)
        build(folder, layers)
        weights = {name: exact_weight(layout, tensors(name, layout)).tolist() for name, layout in layers.items()}
        lines = [f'  "{name}": {json.dumps([[round(v, 9) for v in row] for row in w])}' for name, w in weights.items()]
        (folder / "weights.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
