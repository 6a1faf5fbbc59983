"""A folder that holds all that its model needs: checked, and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_fa.config import QUANT_METHOD
from llava_fa.hub.architecture import empty_model, model_class, transformers_errors
from llava_fa.hub.arrangement import Arrangement, arrange
from llava_fa.hub.checkpoint import file_keys, read_metadata, validate
from llava_fa.hub.shards import Entry, read_entries
from llava_fa.hub.source import quantisation, read_config, weight_files


def unpacked(folder: Path) -> tuple[dict[str, Entry], Arrangement]:
    """The tensors of an original or compressed folder that are not packed, and which of the model's they are.

    Raises:
        FourierError: the folder is damaged, or of no model that transformers knows.
    """
    files = weight_files(folder)
    if quantisation(read_config(folder)) != QUANT_METHOD:
        entries = read_entries(files)
        return entries, arrange(empty_model(folder, len(entries)), entries)
    metadata = read_metadata(folder)
    entries = validate(files, metadata)
    model = empty_model(folder, len(entries))
    for name, record in metadata.layers.items():
        for stored in file_keys(name, record.layout).values():
            entries.pop(stored, None)
    return entries, arrange(model, entries, metadata.layers)


def check_complete(folder: Path) -> None:
    """Raise `FourierError` unless an original or compressed folder holds all that its model needs, of its shape."""
    unpacked(folder)[1].check(str(folder))


def loaded_model(folder: Path, **options: Any) -> Any:
    """transformers' `from_pretrained` of this folder, in eval mode; what is missing is an error and not filled in.

    Args:
        folder: original or compressed.
        options: of `from_pretrained`.

    Raises:
        FourierError: as `check_complete`, before memory is asked for, or it does not load.
    """
    check_complete(folder)
    remedy = "Check the folder with transformers alone first"
    with transformers_errors("it does not load", remedy=remedy, where=str(folder)):
        return model_class(folder)[0].from_pretrained(folder, **options).eval()
