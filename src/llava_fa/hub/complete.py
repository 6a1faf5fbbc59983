"""A folder that holds all that its model needs: checked, and loaded."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from llava_fa.config import QUANT_METHOD
from llava_fa.hub.architecture import empty_model, model_class, model_of, transformers_errors
from llava_fa.hub.arrangement import Arrangement, arrange
from llava_fa.hub.checkpoint import file_keys, read_metadata, validate
from llava_fa.hub.original import opened, recognise
from llava_fa.hub.shards import Entry, Item, file_metadata, read_entries, write_file, write_text
from llava_fa.hub.source import INDEX, SINGLE, Source, quantisation, read_config, read_object, weight_files

_UNUSED = "model-unused.safetensors"


def unpacked(folder: Path) -> tuple[dict[str, Entry], Arrangement]:
    """The tensors of an original or compressed folder that are not packed, and which of the model's they are.

    Raises:
        FourierError: the folder is damaged, or of no model that transformers knows.
    """
    files = weight_files(folder)
    if quantisation(read_config(folder)) != QUANT_METHOD:
        with opened(folder) as source:
            return source.entries, arranged(source)
    metadata = read_metadata(folder)
    entries = validate(files, metadata)
    model = empty_model(folder, len(entries))
    for name, record in metadata.layers.items():
        for stored in file_keys(name, record.layout).values():
            entries.pop(stored, None)
    return entries, arrange(model, entries, metadata.layers)


def arranged(source: Source) -> Arrangement:
    """Which of the model's parameters the tensors of an original are, in whatever format."""
    return arrange(model_of(source), source.entries, translation=source.translation)


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
    if recognise(read_config(folder)) is not None:
        with opened(folder) as source:
            return loaded_source(source, **options)
    kind, config = model_class(folder)
    packed = quantisation(read_config(folder)) == QUANT_METHOD
    if not packed or kind.__name__ not in (config.architectures or ()):  # else the quantizer does, before it loads
        check_complete(folder)
    with _loading(folder):
        return kind.from_pretrained(folder, **options).eval()


def loaded_source(source: Source, **options: Any) -> Any:
    """`loaded_model` of an opened checkpoint: of a translated one from the tensors that the translation makes.

    Those are in memory beside the model until it is loaded.
    """
    if source.prepared is None:
        return loaded_model(source.folder, **options)
    from transformers import GenerationConfig

    arrangement = arranged(source)
    arrangement.check(str(source.folder))
    kind, config = model_class(source.home, str(source.folder))
    state = {name: stored.read() for name, stored in arrangement.weights.items() if isinstance(stored, Entry)}
    for conversion in arrangement.conversions:
        state |= conversion.read()
    with _loading(source.folder):
        model = kind.from_pretrained(None, config=config, state_dict=state, **options).eval()
        if (source.home / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source.home)
    return model


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


def _loading(folder: Path) -> AbstractContextManager[None]:
    remedy = "Check the folder with transformers alone first"
    return transformers_errors("it does not load", remedy=remedy, where=str(folder))
