"""A folder that holds all that its model needs: checked, and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_fa.config import QUANT_METHOD
from llava_fa.hub.architecture import empty_model, model_class, transformers_errors
from llava_fa.hub.arrangement import Arrangement, arrange
from llava_fa.hub.checkpoint import file_keys, read_metadata, validate
from llava_fa.hub.shards import Entry, Item, file_metadata, read_entries, write_file, write_text
from llava_fa.hub.source import INDEX, SINGLE, quantisation, read_config, read_object, weight_files

_UNUSED = "model-unused.safetensors"


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


def carry_unused(folder: Path, to: Path) -> None:
    """Copy what transformers leaves out when it saves a model: the tensors of its folder that no module has.

    Args:
        folder: original or compressed, that the model was loaded from.
        to: what `save_pretrained` wrote.

    Raises:
        FourierError: as `check_complete`.
    """
    files = weight_files(to)
    saved = read_entries(files)
    unused = {name: entry for name, entry in unpacked(folder)[1].unused.items() if name not in saved}
    if not unused:
        return
    items = [Item.copy(entry, name) for name, entry in unused.items()]
    if files == [to / SINGLE]:
        write_file(
            to / SINGLE, [*(Item.copy(entry, name) for name, entry in saved.items()), *items], file_metadata(files[0])
        )
        return
    write_file(to / _UNUSED, items)
    index = read_object(to / INDEX)
    index["weight_map"] |= dict.fromkeys(unused, _UNUSED)
    index["metadata"]["total_size"] += sum(entry.nbytes for entry in unused.values())
    write_text(to / INDEX, json.dumps(index, indent=2) + "\n")
