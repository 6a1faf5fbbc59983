"""What a model folder is, compressed or not, from config.json and the headers of its weight files."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_fa.config import QUANT_METHOD, FourierConfig
from llava_fa.hub import complete, ledger, provenance
from llava_fa.hub.architecture import model_of
from llava_fa.hub.checkpoint import (
    NAMES,
    ORIGINAL_BYTES,
    account,
    file_keys,
    is_codebook,
    names_digest,
    read_metadata,
    validate,
)
from llava_fa.hub.original import opened
from llava_fa.hub.plan import make_plan
from llava_fa.hub.report import TRAINING, LayerReport, Measurement, Report, Skipped, kind_of_codes, peak_rss_bytes
from llava_fa.hub.shards import Entry, file_metadata
from llava_fa.hub.source import Source, quantisation, read_config, read_object, resolve_model, weight_files


def inspect_model(model: str | Path) -> Report:
    """The `Report` of ``"tiny"``, a folder or a hub id.

    Of a model that is not compressed it lists the layers that could be, with their present bits and no error.

    Raises:
        FourierError: not a model folder, a damaged one, or one quantised by something else.
    """
    folder = resolve_model(model)
    if not _compressed(folder):
        return _original(folder)
    report = describe(folder)
    written = file_metadata(weight_files(folder)[0]).get(NAMES)
    if report.ledger is None or written != names_digest(account.name for account in report.ledger.tensors):
        complete.check_complete(folder)  # which builds the model, seconds that a whole folder need not cost
    return report


def _compressed(folder: Path) -> bool:
    return quantisation(read_config(folder)) == QUANT_METHOD


def describe(
    folder: Path,
    *,
    original_bytes: int | None = None,
    seconds: float | None = None,
    measured: Mapping[str, Measurement] | None = None,
) -> Report:
    """The `Report` of a compressed folder, from its headers alone; every byte counted from the files.

    ``original_bytes`` is what the tensors of the original took; where it is not known, the original is taken
    to have kept its compressed layers in 16 bits. ``measured`` is what the run that made the folder has to say of each
    layer beyond what is stored.
    """
    start = time.monotonic()
    metadata = read_metadata(folder)
    files = weight_files(folder)
    entries = validate(files, metadata)
    accounts = account(entries, metadata)
    told, tokens = measured or {}, provenance.read_tokens(folder)
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
            notes=tuple(told[name].notes) if name in told else (),
            tokens=tokens.get(name),
            embedding=record.embedding,
            codes=kind_of_codes(record.layout),
        )
        for name, record in metadata.layers.items()
    )
    compressed = sum(entry.nbytes for entry in entries.values())
    note = file_metadata(files[0]).get(ORIGINAL_BYTES, "")
    original = original_bytes or (int(note) if note.isdecimal() and len(note) < 20 else accounts.dense_bytes)
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
        ledger=ledger.of_compressed(folder, entries, metadata),
        source_ledger=ledger.read(folder),
    )


def _training(folder: Path) -> dict[str, Any] | None:
    path = folder / TRAINING
    return read_object(path) if path.is_file() else None


def spending(model: str | Path) -> dict[str, int]:
    """What the bytes of a model's tensors are spent on; their sum is `Report.compressed_bytes`.

    Keys, those that occur: ``codes``, ``scales``, ``signs``, ``low rank`` and ``codebooks`` of compressed layers;
    ``dense layers`` (linear, not compressed), ``embeddings`` (input and output), ``unused`` (no module has them),
    ``other`` (norms, biases, positions).

    Raises:
        FourierError: as `inspect_model`.
    """
    folder = resolve_model(model)
    spent: Counter[str] = Counter()
    if _compressed(folder):
        metadata = read_metadata(folder)
        packed = dict(validate(weight_files(folder), metadata))
        for name, record in metadata.layers.items():
            for key, stored in file_keys(name, record.layout).items():
                if (entry := packed.pop(stored, None)) is not None:  # a codebook has many users
                    spent[_purpose(key)] += entry.nbytes
    entries, arrangement = complete.unpacked(folder)
    for key, entry in entries.items():
        if key not in arrangement.left_out:
            unused = key in arrangement.unused
            spent["unused" if unused else _kind(arrangement.parameters.get(key, (key,))[0], entry)] += entry.nbytes
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
    with opened(folder) as source:
        return _of_source(source)


def _of_source(source: Source) -> Report:
    start = time.monotonic()
    plan = make_plan(model_of(source), source, FourierConfig())
    layers = tuple(
        LayerReport(layer.name, layer.shape, 8 * layer.weight.nbytes / layer.numel, 0.0, None, 0)
        for layer in plan.layers
    )
    weights = sum(layer.numel for layer in plan.layers)
    rest = {skipped.name: skipped.reason for skipped in plan.not_compressed}
    linear = dict.fromkeys((layer.name for layer in plan.layers), "a linear layer: it can be packed")
    return Report(
        path=str(source.folder),
        method=None,
        bits=None,
        rank=None,
        bits_per_weight=8 * sum(layer.weight.nbytes for layer in plan.layers) / weights,
        compression_ratio=1.0,
        original_bytes=source.nbytes,
        compressed_bytes=source.nbytes,
        layers=layers,
        not_compressed=plan.not_compressed,
        ledger=ledger.of_source(source, plan.arrangement, rest={**linear, **rest}, left_out=plan.left_out),
        seconds=time.monotonic() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )
