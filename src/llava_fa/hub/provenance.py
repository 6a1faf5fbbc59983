"""Where a compressed folder comes from: the command and the versions that made it (``compression.json``), and how many
tokens each layer was fitted to (``calibration.json``).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llava_fa.data.textfiles import read_json
from llava_fa.errors import FourierError
from llava_fa.hub.shards import write_text

COMPRESSION = "compression.json"
"""File of a compressed model's folder, beside its weights; the model does not need it."""

CALIBRATION = "calibration.json"
"""The same."""

PACKAGES = ("llava-fa", "torch", "transformers", "safetensors", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Python, the packages that decide what a model computes, and the machine."""
    numbers = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:  # run from sources that are not installed
            continue
    return {**numbers, "platform": platform.platform(terse=True), "machine": platform.machine()}


def record(folder: Path, command: str) -> dict[str, Any]:
    """Write ``compression.json``: the command, with OUT in the place of the folder's name, and the versions.

    The folder may be moved, and a resumed run ends with the same bytes: neither its name nor a date is kept.
    """
    provenance = {"command": command, "versions": versions()}
    write_text(folder / COMPRESSION, json.dumps(provenance, indent=1))
    return provenance


def read(folder: Path) -> dict[str, Any] | None:
    """What `record` wrote; None where the folder was made through the Python API.

    Raises:
        FourierError: the file is not what `record` writes.
    """
    path = folder / COMPRESSION
    if not path.is_file():
        return None
    remedy = "Remove it; the model does not need it"
    provenance = read_json(path, remedy)
    if not isinstance(provenance, dict) or not isinstance(provenance.get("command"), str):
        raise FourierError("it is not a record of a compression", remedy=remedy, where=str(path))
    return provenance


def record_tokens(folder: Path, tokens: Mapping[str, int]) -> None:
    """Write ``calibration.json``: calibrated layer → tokens that its second moment is made of."""
    write_text(folder / CALIBRATION, json.dumps({"tokens": dict(tokens)}, indent=1) + "\n")


def read_tokens(folder: Path) -> dict[str, int]:
    """What `record_tokens` wrote; empty where nothing was calibrated.

    Raises:
        FourierError: the file is not what `record_tokens` writes.
    """
    path = folder / CALIBRATION
    if not path.is_file():
        return {}
    remedy = "Remove it; the model does not need it"
    told = read_json(path, remedy)
    tokens = told.get("tokens") if isinstance(told, dict) else None
    if not isinstance(tokens, dict) or not all(type(count) is int and count >= 0 for count in tokens.values()):
        raise FourierError("it does not say how many tokens layers saw", remedy=remedy, where=str(path))
    return tokens
