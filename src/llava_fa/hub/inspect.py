"""What a model folder is, compressed or not, from config.json and the headers of its weight files."""

from __future__ import annotations

import time
from pathlib import Path

from llava_fa.config import QUANT_METHOD
from llava_fa.hub.compress import describe
from llava_fa.hub.report import LayerReport, Report, Skipped, peak_rss_bytes
from llava_fa.hub.source import empty_model, match_names, open_source, read_config, resolve_model
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
