"""Checkpoints of formats that transformers does not read, as those that it does: LLaVA's first one, and InternLM-2.

LLaVA's own code saves a language model (``model.layers…``, ``lm_head``) with ``model.mm_projector`` in it, and names
its vision tower in config.json (``mm_vision_tower``); the tower lies elsewhere, or is among the weights. InternLM-2
computes what Llama's class computes, from other names and with q, k and v in one tensor. No weight is copied: names
are translated, tensors converted when they are read, and config.json, tokenizer and processor as transformers has them
are made in a folder that lasts as long as the checkpoint is open. What comes out is what transformers' own conversion
scripts for LLaVA, LLaVA-NeXT and LLaVA-OneVision make, but for the rows of added tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_fa.errors import FourierError
from llava_fa.hub.original_config import find_tower, language_config, model_config
from llava_fa.hub.original_names import INSIDE, NEWLINE, projector, translate, words_of
from llava_fa.hub.original_processor import Words, copy_beside, write_processor
from llava_fa.hub.shards import write_text
from llava_fa.hub.source import Source, beside, open_source, read_object

_ARCHITECTURE = re.compile(r"(Llava)?(Llama|Mistral|Qwen2?|InternLM2)ForCausalLM")
_MODEL_TYPE = re.compile(r"(llava_)?(llama|mistral|qwen2?|internlm2)")
_ROWS = 64
"""Word embeddings that grow get a multiple of so many rows, as in transformers' scripts."""


@dataclasses.dataclass(frozen=True)
class Original:
    """What config.json of such a checkpoint says that it is.

    Attributes:
        language: ``llama``, ``mistral``, ``qwen2`` or ``internlm2``.
        sees: whether it is a LLaVA.
    """

    language: str
    sees: bool


def recognise(config: Mapping[str, Any]) -> Original | None:
    """What this config.json is of; None where transformers reads it, or nothing does."""
    names = config.get("architectures")
    named = str(names[0]) if isinstance(names, list) and names else ""
    match = _ARCHITECTURE.fullmatch(named) if named else _MODEL_TYPE.fullmatch(str(config.get("model_type")))
    if match is None or not (match[1] or match[2].lower() == "internlm2") or "text_config" in config:
        return None  # a part of its own is transformers' way, whatever the class is called
    language = match[2].lower()
    return Original("qwen2" if language == "qwen" else language, bool(match[1]))


@contextlib.contextmanager
def opened(folder: Path, vision_tower: str | Path | None = None) -> Iterator[Source]:
    """The checkpoint in a folder, of whatever format; what is made for it is gone when this ends.

    Args:
        folder: of the model.
        vision_tower: folder or hub id of its vision tower, where it is not where config.json says.

    Raises:
        FourierError: as `source.open_source`; a tower that is not found, is of another size or not wanted; a projector,
            a way to cut pictures up or a vocabulary that transformers' classes do not have.
    """
    source = open_source(folder)
    kind = recognise(source.config)
    if vision_tower is not None and (kind is None or not kind.sees):
        raise FourierError(
            "a vision tower is given, and this model has its own, or none",
            remedy="Leave it out: it is for LLaVA's first format (LlavaLlamaForCausalLM and its kin)",
            where=str(folder),
        )
    if kind is None:
        yield source
        return
    if (folder / "adapter_config.json").is_file():
        raise FourierError(
            "an adapter lies beside weights in a format that peft does not read",
            remedy="Merge it with the code that trained it, or take adapter_config.json away, to use the weights alone",
            where=str(folder),
        )
    with tempfile.TemporaryDirectory(prefix="llava-fa-") as place:
        yield _llava(source, kind, Path(place), vision_tower) if kind.sees else _text(source, kind, Path(place))


def _text(source: Source, kind: Original, home: Path) -> Source:
    """A language model alone."""
    where = str(source.folder)
    config = language_config(source.config, kind.language, where)
    words_of(source.entries, config.vocab_size, where)
    config.architectures = ["LlamaForCausalLM"]
    copy_beside(beside(source.folder), source.folder, home)
    translation = translate(source.entries, {}, config, fused=config)
    return _as(source, home, config, translation=translation)


def _llava(source: Source, kind: Original, home: Path, vision_tower: str | Path | None) -> Source:
    where, values, entries = str(source.folder), source.config, source.entries
    text = language_config(values, kind.language, where)
    rows = words_of(entries, text.vocab_size, where)
    linear, first = projector(entries, values.get("mm_projector_type"), where)
    inside = any(key.startswith(INSIDE) for key in entries)
    tower = find_tower(source.folder, values, inside, vision_tower, first.shape[1])
    config = model_config(values, text, tower.config, linear=linear, newline=NEWLINE in entries, where=where)
    copy_beside(beside(source.folder), source.folder, home)
    write_text(home / "config.json", text.to_json_string())  # the tokenizer is the language model's, and read as such
    words = write_processor(home, values, config, rows, tower.folder, kind.language, where)
    _settle_words(config, words, rows)
    translation = translate(
        entries, tower.entries, config, fused=config.text_config, newline=config.model_type != "llava"
    )
    digest = hashlib.sha256(f"{source.fingerprint} {tower.fingerprint}".encode()).hexdigest()
    both = {**tower.entries, **entries}
    return _as(source, home, config, translation=translation, fingerprint=digest, entries=both)


def _settle_words(config: Any, words: Words, rows: int) -> None:
    """Which tokens are what; a vocabulary that has grown beyond the stored rows gets more of them."""
    config.image_token_index = words.image
    if words.video is not None:
        config.video_token_index = words.video
    config.text_config.pad_token_id = words.pad
    if words.count > rows:
        config.text_config.vocab_size = -(-words.count // _ROWS) * _ROWS


def _as(source: Source, home: Path, config: Any, **changed: Any) -> Source:
    write_text(home / "config.json", config.to_json_string())
    return dataclasses.replace(source, config=read_object(home / "config.json"), prepared=home, **changed)
