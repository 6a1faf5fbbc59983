"""What a model folder is, compressed or not, from config.json and the headers of its weight files."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from llava_fa.config import QUANT_METHOD
from llava_fa.hub.checkpoint import file_keys, is_codebook, read_metadata, validate
from llava_fa.hub.compress import describe
from llava_fa.hub.report import LayerReport, Report, Skipped, peak_rss_bytes
from llava_fa.hub.shards import Entry
from llava_fa.hub.source import empty_model, match_names, open_source, read_config, resolve_model, weight_files
from llava_fa.nn.surgery import classify


def inspect_model(model: str | Path) -> Report:
    """The `Report` of ``"tiny"``, a folder or a hub id.

    Of a model that is not compressed it lists the layers that could be, with their present bits and no error.

    Raises:
        FourierError: not a model folder, a damaged one, or one quantised by something else.
    """
    folder = resolve_model(model)
    quantised = read_config(folder).get("quantization_config") or {}
    if quantised.get("quant_method") == QUANT_METHOD:
        return describe(folder)
    return _original(folder)


def spending(model: str | Path) -> dict[str, int]:
    """What the bytes of a model's tensors are spent on; their sum is `Report.compressed_bytes`.

    Keys, those that occur: ``codes``, ``scales``, ``signs``, ``low rank`` and ``codebooks`` of compressed layers;
    ``dense layers`` (linear, not compressed), ``embeddings`` (input and output), ``other`` (norms, biases, positions).

    Raises:
        FourierError: as `inspect_model`.
    """
    folder = resolve_model(model)
    quantised = read_config(folder).get("quantization_config") or {}
    spent: Counter[str] = Counter()
    if quantised.get("quant_method") == QUANT_METHOD:
        metadata = read_metadata(folder)
        entries = dict(validate(weight_files(folder), metadata))
        for name, record in metadata.layers.items():
            for key, stored in file_keys(name, record.layout).items():
                if (entry := entries.pop(stored, None)) is not None:  # a codebook has many users
                    spent[_purpose(key)] += entry.nbytes
        names = {key: key for key in entries}
    else:
        source = open_source(folder)
        entries = source.entries
        names = {stored: name for name, stored in match_names(empty_model(source), source)[0].items()}
    for key, entry in entries.items():
        spent[_kind(names.get(key, key), entry)] += entry.nbytes
    return dict(spent)


def _purpose(key: str) -> str:
    """Of one tensor of a packed layer (`Layout.tensors`, `FactoredLayout.tensors`)."""
    last = key.rpartition(".")[2]
    if is_codebook(key):
        return "codebooks"
    return {"codes": "codes", "signs": "signs"}.get(last) or (
        "low rank" if "left" in last or "right" in last else "scales"
    )


def _kind(name: str, entry: Entry) -> str:
    """Of one tensor that is stored as the original had it."""
    if len(entry.shape) < 2:
        return "other"
    if any(mark in name for mark in ("embed_tokens", "lm_head", "wte.")):
        return "embeddings"
    return "other" if "embed" in name else "dense layers"


def _original(folder: Path) -> Report:
    start = time.monotonic()
    source = open_source(folder)
    model = empty_model(source)
    names, _ = match_names(model, source)
    choice = classify(model)
    layers = []
    for name in choice.layers:
        entry = source.entries.get(names.get(f"{name}.weight", ""))
        if entry is not None and len(entry.shape) == 2:
            bits = 8 * entry.nbytes / entry.numel
            layers.append(LayerReport(name, (entry.shape[0], entry.shape[1]), bits, 0.0, None, 0))
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    stored = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in layers)
    return Report(
        path=str(folder),
        method=None,
        bits=None,
        rank=None,
        bits_per_weight=stored / weights if weights else 0.0,
        compression_ratio=1.0,
        original_bytes=source.nbytes,
        compressed_bytes=source.nbytes,
        layers=tuple(layers),
        not_compressed=tuple(Skipped(name, reason) for name, reason in choice.not_compressed.items()),
        seconds=time.monotonic() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )
