"""The folder of a model, original or compressed: found, its config.json read, its weight files named and opened."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import llava_fa
from llava_fa.config import QUANT_METHOD
from llava_fa.data import textfiles
from llava_fa.data.textfiles import reading
from llava_fa.errors import FourierError
from llava_fa.hub.conversion import Translation
from llava_fa.hub.shards import COPY_AGAIN, Entry, read_header

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LEDGER = "ledger.json"
"""File of a compressed folder: what became of every tensor of the original. The model does not need it."""
_DOWNLOAD = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "spk_dict.pt"]
_NOT_COPIED = (
    ".index.json",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".partial",
)
_NO_WEIGHTS = ("spk_dict.pt",)
"""Files that look like weights and are not: Qwen2.5-Omni's voices, which transformers reads with `weights_only`."""
_TEMPLATES = "additional_chat_templates"
_OTHERS = ("config.json", "merged.json", LEDGER)


def resolve_model(model: str | Path, patterns: Sequence[str] = _DOWNLOAD) -> Path:
    """The folder of a model: ``"tiny"`` (the embedded one), a folder, or a hub id (such files of it downloaded)."""
    if not isinstance(model, (str, Path)):
        raise FourierError(
            f"the model is a {type(model).__name__}",
            remedy="Give a folder, a hub id or 'tiny'; save it first",
        )
    if str(model) == "tiny":
        folder = Path(llava_fa.__file__).parent / "world" / "tiny"
        if not (folder / "config.json").is_file():
            raise FourierError(
                "the embedded model is not in this installation",
                remedy="Install a release, or train it with `llava-fa world train`",
                where="tiny",
            )
        return folder
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FourierError("this is a file", remedy="Give the folder that holds config.json", where=str(model))
    if isinstance(model, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) or str(model).startswith("."):
        raise FourierError(
            "no such folder",
            remedy="Give `tiny`, a model folder, or a hub id such as llava-hf/llava-1.5-7b-hf",
            where=str(model),
        )
    return _download(str(model), patterns)


def resolve_config(model: str | Path) -> Path:
    """The folder of a model's config.json: as `resolve_model`, or that file; of a hub id nothing else is downloaded."""
    if isinstance(model, (str, Path)) and (path := Path(model).expanduser()).name == "config.json" and path.is_file():
        return path.parent
    return resolve_model(model, ("config.json",))


def _download(repository: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except GatedRepoError:
        what, remedy = (
            "access to this hub model is restricted",
            "Accept its terms on the hub and run `hf auth login`",
        )
    except RepositoryNotFoundError:
        what, remedy = (
            "there is no such folder and no such hub model",
            "Check the name, or `hf auth login` if private",
        )
    except Exception as error:  # the hub client raises its own, httpx's and OSError's family: the remedy is one
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"there is no such folder, and the hub could not be reached ({reason})"
        remedy = "Check the network (HF_HUB_OFFLINE is honoured), or give a local folder"
    raise FourierError(what, remedy=remedy, where=repository)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint to be compressed: every tensor by its name in the files, and what it is told apart by.

    Attributes:
        shadowed: tensors that another file has under the same name; the last file counts, as in transformers.
        unread: weight files in the folder that are no part of the checkpoint.
        processor: fields of processor_config.json that a copy of this checkpoint has to change.
        prepared: where ``folder`` is of a format that transformers does not read: a folder with config.json, tokenizer
            and processor as it reads them, and without weights.
        translation: the tensors of such a checkpoint.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    fingerprint: str
    shadowed: tuple[Entry, ...] = ()
    unread: tuple[Path, ...] = ()
    processor: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepared: Path | None = None
    translation: Translation = dataclasses.field(default_factory=Translation)

    @property
    def home(self) -> Path:
        """The folder whose config.json and processor transformers reads."""
        return self.prepared or self.folder

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those aside that a translation leaves out."""
        return sum(entry.nbytes for key, entry in self.entries.items() if key not in self.translation.left_out)


def open_source(folder: Path) -> Source:
    """Read config.json and the headers of all weight files; nothing else.

    Raises:
        FourierError: not a model folder, already quantised, no safetensors, a file missing or cut short.
    """
    config = read_config(folder)
    if quantisation(config) == QUANT_METHOD:
        raise FourierError(
            "this model is already compressed by llava-fa",
            remedy="Give the original; `llava-fa inspect` shows what this one is",
            where=str(folder),
        )
    refuse_quantised(config, folder)
    entries: dict[str, Entry] = {}
    shadowed: list[Entry] = []
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    files = weight_files(folder)
    for path in files:
        tensors, header = read_header(path)
        shadowed += [entries[name] for name in tensors if name in entries]
        entries.update(tensors)
        digest.update(f"{path.name}:{path.stat().st_size}:{header}".encode())
    return Source(folder, config, entries, digest.hexdigest(), tuple(shadowed), unread(folder, files))


def unread(folder: Path, files: Iterable[Path]) -> tuple[Path, ...]:
    """Weight files in the folder that are none of these: no part of the checkpoint."""
    return tuple(sorted(set(folder.glob("*.safetensors")) - set(files)))


def quantisation(config: Mapping[str, Any]) -> str | None:
    """How a model is quantised, by its config.json or that of its language model; None where it is not."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for part in parts:
        if (values := part.get("quantization_config")) not in (None, {}):
            method = values.get("quant_method") if isinstance(values, Mapping) else values
            return str(method or "unknown method")
    return None


def refuse_quantised(config: Mapping[str, Any], folder: Path) -> None:
    """`FourierError` for a model that something else has quantised."""
    if (method := quantisation(config)) not in (None, QUANT_METHOD):
        raise FourierError(
            f"this model is already quantised ({method})",
            remedy="Give the original float checkpoint",
            where=str(folder),
        )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model's folder that holds an object.

    Raises:
        FourierError: it cannot be read, or is something else.
    """
    values = textfiles.read_json(path, COPY_AGAIN)
    if not isinstance(values, dict):
        raise FourierError("it is not a JSON object", remedy=COPY_AGAIN, where=str(path))
    return values


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder as a dict."""
    path = folder / "config.json"
    with reading(path):
        there, is_file = folder.is_dir(), path.is_file()
    if not there:
        raise FourierError("no such folder", remedy="Give a model folder", where=str(folder))
    if not is_file and (folder / "adapter_config.json").is_file():
        raise _an_adapter(folder)
    if not is_file:
        raise FourierError(
            "there is no config.json: this is not a model folder",
            remedy="Give the folder that `save_pretrained` wrote, or a hub id",
            where=str(folder),
        )
    return read_object(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint, the same that transformers reads.

    That is the file that config.json names, else the one of the usual name, else those of the index.
    """
    with reading(folder):
        named = read_config(folder).get("transformers_weights") if (folder / "config.json").is_file() else None
        if named is not None and not (
            _is_inside(named) and named.endswith((".safetensors", ".safetensors.index.json"))
        ):
            raise FourierError(
                f"config.json names weights that are no safetensors of this folder ({named!r})",
                remedy="Mend `transformers_weights` in config.json, or take it out",
                where=str(folder),
            )
        first = folder / (named or (SINGLE if (folder / SINGLE).is_file() else INDEX))
        if not first.is_file():
            raise _no_weights(folder)
    if first.name.endswith(".index.json"):
        names = read_object(first).get("weight_map")
        if not isinstance(names, dict) or not names or not all(_is_inside(name) for name in names.values()):
            raise FourierError("it is not a checkpoint index", remedy=COPY_AGAIN, where=str(first))
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        files = [first]
    for file in files:
        with reading(file):
            if not file.is_file():
                what = f"the index names {file.name}, which is not there"
                raise FourierError(what, remedy=COPY_AGAIN, where=str(folder))
    return files


def _is_inside(name: Any) -> bool:
    """Whether this is the name of a file that lies in the folder, not beside or above it."""
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _an_adapter(folder: Path) -> FourierError:
    return FourierError(
        "this is a LoRA adapter, not a model",
        remedy="Merge it first: PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(…)",
        where=str(folder),
    )


def _no_weights(folder: Path) -> FourierError:
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return _an_adapter(folder)
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        more = ", …" if len(pickled) > 1 else ""
        return FourierError(
            f"it has only pickled weights ({pickled[0]}{more}), which can run code",
            remedy="If you trust them, convert to safetensors once: "
            "`AutoModelForImageTextToText.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)`; or, where transformers "
            "does not read the folder, each file by `save_file(torch.load(FILE, weights_only=True), NEW_FILE)`, and an "
            "index, if there is one, with the new names",
            where=str(folder),
        )
    return FourierError(
        f"there are no weights: neither {SINGLE} nor {INDEX}",
        remedy="Copy or download the model again",
        where=str(folder),
    )


def beside(folder: Path) -> list[Path]:
    """The files beside the weights that a new checkpoint takes over: processor, tokenizer, templates, whatever else.

    Raises:
        FourierError: one of them cannot be read.
    """
    files = [
        path
        for path in sorted([*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*")])
        if path.is_file()
        and path.name not in _OTHERS
        and (path.name in _NO_WEIGHTS or not path.name.endswith(_NOT_COPIED))
    ]
    for path in files:
        with reading(path):
            path.open("rb").close()
    return files
