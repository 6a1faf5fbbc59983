"""What the scripts of this folder share: rows measured once, compressed models, how near they are to the original.

Nothing of the package is imported before it is called for: transformers, which the package imports, looks for a library
`kernels` and comes upon the script of that name, which imports this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llava_fa.eval.divergence import Divergence

Row = dict[str, Any]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


class Rows(list[Row]):
    """The rows of a file of JSON lines: what stands there need not be measured again."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(map(json.loads, path.read_text().splitlines()) if path.exists() else ())
        self.path = path

    def find(self, **key: Any) -> Row | None:
        """The first row that has these values."""
        return next((row for row in self if key.items() <= row.items()), None)

    def by_name(self) -> dict[str, Row]:
        """Name → row; of several the last."""
        return {row["name"]: row for row in self}

    def add(self, row: Row) -> Row:
        """Keep a row, on disk too."""
        self.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.rename(path)


def compressed(source: str, folder: Path, *settings: Any, **options: Any) -> tuple[Any, Any, Any]:
    """What `llava_fa.compress` makes of a model, in place of what is in the folder: (model, processor, report).

    The model is in float32 and decoded once, which is the same function of the input up to rounding.
    """
    import llava_fa
    from llava_fa.hub.loading import load

    shutil.rmtree(folder, ignore_errors=True)
    report = llava_fa.compress(source, folder, *settings, **options, fresh=True)
    model, processor = load(folder, dtype=torch.float32)
    model.dequantize()
    return model, processor, report


def nearness(model: Any, processor: Any, divergence: Divergence, limit: int) -> Row:
    """``kl``, nats per answer token against the original; ``accuracy`` on so many questions of the world, if any."""
    from llava_fa.eval.runner import evaluate_world

    row = {"kl": divergence(model)}
    if limit:
        row["accuracy"] = evaluate_world(model, processor, limit=limit)["accuracy"]
    return row


def percent(row: Row) -> str:
    """A row's accuracy, or a dash where it was not measured."""
    return "-" if row.get("accuracy") is None else f"{100 * row['accuracy']:.1f}"


def memory(what: str) -> int:
    """Bytes of memory that this process holds (VmRSS), or the most it has held (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def clip_large() -> Any:
    """The configuration of LLaVA-1.5's vision tower: CLIP-L on pictures of 336 pixels."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
