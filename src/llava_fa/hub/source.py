"""The checkpoint to be compressed: found, checked, and its tensors matched to the modules of the model.

Names in a checkpoint differ from names in the model (``language_model.model.layers…`` is saved where the
module is ``model.language_model.layers…``, and older checkpoints have yet other names); transformers' own
conversion rules give the match, so that whatever `from_pretrained` loads is understood here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import llava_fa
from llava_fa.config import QUANT_METHOD
from llava_fa.errors import FourierError, explained
from llava_fa.hub.shards import COPY_AGAIN, Entry, read_header

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DOWNLOAD = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


def resolve_model(model: str | Path) -> Path:
    """The folder of a model: ``"tiny"`` (the embedded one), a folder, or a hub id (downloaded)."""
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
    return _download(str(model))


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_DOWNLOAD))
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
    """A checked checkpoint folder: its configuration and every tensor's place."""

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    fingerprint: str
    processor: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of processor_config.json that a copy of this checkpoint has to change."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())


def open_source(folder: Path) -> Source:
    """Read config.json and the headers of all weight files; nothing else.

    Raises:
        FourierError: not a model folder, already quantised, no safetensors, a file missing or cut short.
    """
    config = read_config(folder)
    quantised = config.get("quantization_config")
    if quantised and quantised.get("quant_method") == QUANT_METHOD:
        raise FourierError(
            "this model is already compressed by llava-fa",
            remedy="Give the original; `llava-fa inspect` shows what this one is",
            where=str(folder),
        )
    if quantised:
        raise FourierError(
            f"this model is already quantised ({quantised.get('quant_method', 'unknown method')})",
            remedy="Give the original float checkpoint",
            where=str(folder),
        )
    entries: dict[str, Entry] = {}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weight_files(folder):
        tensors, header = read_header(path)
        entries.update(tensors)
        digest.update(f"{path.name}:{path.stat().st_size}:{header}".encode())
    return Source(folder, config, entries, digest.hexdigest())


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder as a dict."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise FourierError("no such folder", remedy="Give a model folder", where=str(folder))
    if not path.is_file():
        raise FourierError(
            "there is no config.json: this is not a model folder",
            remedy="Give the folder that `save_pretrained` wrote, or a hub id",
            where=str(folder),
        )
    with explained("it is not JSON", remedy=COPY_AGAIN, where=str(path), kinds=(ValueError,), words=str):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise FourierError("it is not a JSON object", remedy=COPY_AGAIN, where=str(path))
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint, as its index (or the one usual name) says."""
    if (index := folder / INDEX).is_file():
        kinds = (ValueError, KeyError, TypeError, AttributeError)
        with explained("it is not a checkpoint index", remedy=COPY_AGAIN, where=str(index), kinds=kinds, words=None):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise _no_weights(folder)
    for name in names:
        if not (folder / name).is_file():
            raise FourierError(f"the index names {name}, which is not there", remedy=COPY_AGAIN, where=str(folder))
    return [folder / name for name in names]


def _no_weights(folder: Path) -> FourierError:
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return FourierError(
            "this is a LoRA adapter, not a model",
            remedy="Merge it first: PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(…)",
            where=str(folder),
        )
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        more = ", …" if len(pickled) > 1 else ""
        return FourierError(
            f"it has only pickled weights ({pickled[0]}{more}), which can run code",
            remedy="If you trust them, convert to safetensors once: "
            "`AutoModelForImageTextToText.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)`",
            where=str(folder),
        )
    return FourierError(
        f"there are no weights: neither {SINGLE} nor {INDEX}",
        remedy="Copy or download the model again",
        where=str(folder),
    )


def empty_model(source: Source) -> nn.Module:
    """The model on the meta device: every module and name, no memory.

    Raises:
        FourierError: transformers does not know the architecture, or it does not see images.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    where, name = str(source.folder), (source.config.get("architectures") or [None])[0]
    if name is None or not hasattr(transformers, str(name)):
        raise FourierError(
            f"transformers {transformers.__version__} has no architecture {name!r}",
            remedy="Give a checkpoint in the Hugging Face format, such as llava-hf/llava-1.5-7b-hf",
            where=where,
        )
    if name not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        raise FourierError(
            f"{name} is not a vision-language model",
            remedy="Give a LLaVA-type checkpoint (vision tower, projector and language model in one)",
            where=where,
        )
    what = f"transformers cannot build {name} from config.json"
    remedy = "Check the folder with transformers alone first"
    with quiet_transformers(), explained(what, remedy=remedy, where=where):
        config = transformers.AutoConfig.from_pretrained(source.folder)
        with torch.device("meta"):
            return getattr(transformers, str(name))(config).eval()


def match_names(model: nn.Module, source: Source) -> tuple[dict[str, str], dict[str, str]]:
    """Which checkpoint tensor is which parameter, by the rules with which transformers loads the model.

    Returns:
        ``names``: parameter or buffer in the model → name in the checkpoint, for tensors stored as they are;
        ``converted``: name in the checkpoint → name in the model, for those that loading stacks, splits or
        transposes (fused experts), which are copied and never compressed.

    Raises:
        FourierError: most of the model's parameters are not in the checkpoint: it belongs to something else.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, str] = {}
    converted: dict[str, str] = {}
    for key in sorted(source.entries):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if pattern is not None:
            converted[key] = name
        elif name in state:
            names[name] = key
    parameters = [name for name, _ in model.named_parameters()]
    matches = len({*names, *converted.values()} & set(parameters))
    if 2 * matches < len(parameters):
        raise FourierError(
            f"only {matches} of {len(parameters)} parameters of {type(model).__name__} are in the weight files",
            remedy="Check that config.json and the weights belong together",
            where=str(source.folder),
        )
    return names, converted


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the screen; errors still come."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def transformers_errors(what: str, *, remedy: str, where: str) -> Iterator[None]:
    """transformers, quiet, on a folder that may be no model: what it then raises, the first line of it, `explained`."""
    kinds = (OSError, ValueError, KeyError)
    with (
        quiet_transformers(),
        explained(what, remedy=remedy, where=where, kinds=kinds, words=lambda error: str(error).splitlines()[0]),
    ):
        yield
