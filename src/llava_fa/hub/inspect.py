"""What a model folder is, compressed or not, from config.json and the headers of its weight files."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from llava_fa.config import QUANT_METHOD
from llava_fa.errors import explained
from llava_fa.hub import provenance
from llava_fa.hub.checkpoint import ORIGINAL_BYTES, account, file_keys, is_codebook, read_metadata, validate
from llava_fa.hub.report import TRAINING, LayerReport, Report, Skipped, kind_of_codes, peak_rss_bytes
from llava_fa.hub.shards import Entry, file_metadata
from llava_fa.hub.source import empty_model, match_names, open_source, read_config, resolve_model, weight_files
from llava_fa.nn.surgery import classify


def inspect_model(model: str | Path) -> Report:
    """The `Report` of ``"tiny"``, a folder or a hub id.

    Of a model that is not compressed it lists the layers that could be, with their present bits and no error.

    Raises:
        FourierError: not a model folder, a damaged one, or one quantised by something else.
    """
    folder = resolve_model(model)
    return describe(folder) if _compressed(folder) else _original(folder)


def _compressed(folder: Path) -> bool:
    return (read_config(folder).get("quantization_config") or {}).get("quant_method") == QUANT_METHOD


def describe(
    folder: Path,
    *,
    original_bytes: int | None = None,
    seconds: float | None = None,
    notes: dict[str, tuple[str, ...]] | None = None,
) -> Report:
    """The `Report` of a compressed folder, from its headers alone; every byte counted from the files.

    ``original_bytes`` is what the tensors of the original took; where it is not known, the original is taken
    to have kept its compressed layers in 16 bits.
    """
    start = time.monotonic()
    metadata = read_metadata(folder)
    files = weight_files(folder)
    entries = validate(files, metadata)
    accounts = account(entries, metadata)
    layers = tuple(
        LayerReport(
            name=name,
            shape=(record.layout.out_features, record.layout.in_features),
            bits_per_weight=accounts.layers[name],
            weight_error=record.weight_error,
            output_error=record.output_error,
            rank=getattr(record.layout, "rank", 0),
            inner_rank=getattr(record.layout, "inner_rank", 0),
            sensitivity=record.sensitivity,
            predicted_loss=record.predicted_loss,
            notes=(notes or {}).get(name, ()),
            embedding=record.embedding,
            codes=kind_of_codes(record.layout),
        )
        for name, record in metadata.layers.items()
    )
    compressed = sum(entry.nbytes for entry in entries.values())
    note = file_metadata(files[0]).get(ORIGINAL_BYTES)
    original = original_bytes or (int(note) if note else accounts.dense_bytes)
    return Report(
        path=str(folder),
        method=metadata.config.method,
        bits=metadata.config.bits if metadata.budget is None else metadata.budget.get("bits"),
        rank=metadata.config.rank,
        bits_per_weight=accounts.bits_per_weight,
        compression_ratio=original / compressed,
        original_bytes=original,
        compressed_bytes=compressed,
        layers=layers,
        not_compressed=tuple(Skipped(name, reason) for name, reason in metadata.not_compressed.items()),
        seconds=time.monotonic() - start if seconds is None else seconds,
        peak_rss_bytes=peak_rss_bytes(),
        budget=metadata.budget,
        attention_density=metadata.attention_density,
        training=_training(folder),
        provenance=provenance.read(folder),
    )


def _training(folder: Path) -> dict[str, Any] | None:
    path = folder / TRAINING
    remedy = "Remove it; the model does not need it"
    with explained("it is not JSON", remedy=remedy, where=str(path), kinds=(ValueError,), words=None):
        return json.loads(path.read_text()) if path.is_file() else None


def spending(model: str | Path) -> dict[str, int]:
    """What the bytes of a model's tensors are spent on; their sum is `Report.compressed_bytes`.

    Keys, those that occur: ``codes``, ``scales``, ``signs``, ``low rank`` and ``codebooks`` of compressed layers;
    ``dense layers`` (linear, not compressed), ``embeddings`` (input and output), ``other`` (norms, biases, positions).

    Raises:
        FourierError: as `inspect_model`.
    """
    folder = resolve_model(model)
    spent: Counter[str] = Counter()
    if _compressed(folder):
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
    bits = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in layers)
    return Report(
        path=str(folder),
        method=None,
        bits=None,
        rank=None,
        bits_per_weight=bits / weights if weights else 0.0,
        compression_ratio=1.0,
        original_bytes=source.nbytes,
        compressed_bytes=source.nbytes,
        layers=tuple(layers),
        not_compressed=tuple(Skipped(name, reason) for name, reason in choice.not_compressed.items()),
        seconds=time.monotonic() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )
