"""An adapter (LoRA and its kin, by peft) that lies beside a model's own weights: merged, never ignored."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_fa.data.textfiles import reading
from llava_fa.errors import FourierError, explained
from llava_fa.hub.architecture import one_line, quiet_transformers
from llava_fa.hub.complete import carry_unused, check_complete, loaded_model
from llava_fa.hub.shards import CHUNK, write_text
from llava_fa.hub.source import open_source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FILES = (CONFIG, WEIGHTS, "adapter_model.bin")
_ENDINGS = (".safetensors", ".safetensors.index.json")
"""Of files with weights, or that name them."""
_IDENTITY = "merged.json"
"""File of a merged folder that says what it was made of."""


def has_adapter(folder: Path) -> bool:
    """Whether an adapter lies beside the weights of this folder."""
    return (folder / CONFIG).is_file()


def files(folder: Path) -> list[Path]:
    """The adapter's files in this folder."""
    return [path for name in _FILES if (path := folder / name).is_file()]


def loaded_with_adapter(folder: Path, **options: Any) -> Any:
    """The model of this folder (`complete.loaded_model`), with the adapter that lies beside its weights.

    Dense weights take it in; beside packed codes it stays, frozen, in the layers of the model itself.

    Raises:
        FourierError: as `loaded_model`; peft is not installed, or refuses it; an adapter with pickled weights.
    """
    check_complete(folder)  # here, for the errors of what follows name a folder of links
    with _without_adapter(folder) as plain:
        return _attached(loaded_model(plain, **options), folder)


@contextlib.contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """The folder as it would be without its adapter: links to everything else, as long as this lasts."""
    with tempfile.TemporaryDirectory() as place:
        for path in folder.iterdir():
            if path.name not in _FILES:
                (Path(place) / path.name).symlink_to(path.absolute())
        yield Path(place)


def _attached(model: Any, folder: Path) -> Any:
    where = str(folder)
    remedy = (
        f"`pip install peft`; or merge it yourself and give the result; or take {CONFIG} away, to use the weights alone"
    )
    what = "an adapter lies beside the weights, and the package peft, which merges it, is not here"
    with explained(what, remedy=remedy, where=where, kinds=(ImportError,), words=None):
        from peft import PeftModel
    if not (folder / WEIGHTS).is_file():
        raise FourierError(
            f"the adapter beside the weights has no {WEIGHTS}",
            remedy=f"Convert or copy it, or take {CONFIG} away",
            where=where,
        )
    packed = getattr(model, "hf_quantizer", None) is not None
    refused = "peft refuses the adapter beside the weights"
    with (
        explained(refused, remedy=f"Mend it, or take {CONFIG} away", where=where, words=one_line),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's, of transformers' v4
        adapted = PeftModel.from_pretrained(model, where)
        if not packed:
            return adapted.merge_and_unload()
        if adapted.active_peft_config.is_prompt_learning:  # it lives in peft's wrapper, no model of transformers
            what = "what it puts before a prompt cannot be kept beside packed weights"
            raise FourierError(what, remedy=f"Take {CONFIG} away", where=where)
        return adapted.base_model.model.eval()  # with the layers that peft exchanged


def identity(folder: Path) -> str:
    """SHA-256 of what a merged folder depends on: the checkpoint's headers and the adapter's bytes."""
    digest = hashlib.sha256(open_source(folder).fingerprint.encode())
    for path in files(folder):
        with reading(path), path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def merged(folder: Path, to: Path) -> Path:
    """A folder ``to`` with the adapter of ``folder`` merged into its weights; taken up as it is if it is there already.

    The whole model is in memory, as it is stored.

    Raises:
        FourierError: as `loaded_with_adapter`; ``to`` is there and holds something else.
    """
    made = json.dumps({"made_of": identity(folder)})
    if to.exists():
        if not _is_merged(to):
            raise FourierError("it is in the way of merging an adapter", remedy="Remove or rename it", where=str(to))
        if (to / _IDENTITY).read_text(encoding="utf-8") == made:
            return to
        shutil.rmtree(to)
    temporary = to.with_name(to.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model = loaded_with_adapter(folder, dtype="auto")
    with quiet_transformers():
        model.save_pretrained(temporary)
    carry_unused(folder, temporary)
    for path in set(folder.iterdir()) - set(files(folder)):
        if not (temporary / path.name).exists() and path.is_file() and not path.name.endswith(_ENDINGS):
            shutil.copyfile(path, temporary / path.name)
    write_text(temporary / _IDENTITY, made)
    temporary.rename(to)
    return to


def remove_merged(to: Path) -> None:
    """Remove what `merged` made there, and nothing else of that name."""
    if _is_merged(to):
        shutil.rmtree(to, ignore_errors=True)


def _is_merged(folder: Path) -> bool:
    return (folder / _IDENTITY).is_file()
