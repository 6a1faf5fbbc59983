"""A compressed model in one process of vLLM: its layers by vLLM's names, who holds each, and the folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llava_fa.errors import FourierError
from llava_fa.hub.checkpoint import Metadata
from llava_fa.vllm.folder import Folder
from llava_fa.vllm.names import Names


class Store:
    """What the methods of all layers share.

    Args:
        metadata: of the folder.

    Attributes:
        layers: stored layer → its record.
        names: stored layers by the names of vLLM's modules.
        model: the folder or hub id that vLLM was started with.
        claimed: stored layer → the module of vLLM's that holds it.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.metadata, self.layers = metadata, metadata.layers
        self.names = Names(metadata.layers)
        self.model = ""
        self.claimed: dict[str, str] = {}
        self._folder: Folder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folder": None}  # every process reads its own rows

    def folder(self) -> Folder:
        """The folder, opened once a process; a hub id is downloaded as vLLM downloads it."""
        if self._folder is None:
            self._folder = Folder(_local(self.model), self.metadata)
        return self._folder

    def claim(self, stored: str, prefix: str) -> None:
        """Note that a module holds this layer.

        Raises:
            FourierError: another one does already.
        """
        other = self.claimed.setdefault(stored, prefix)
        if other != prefix:
            raise FourierError(
                f"two modules of vLLM's model hold it, {other} and {prefix}",
                remedy="Report this model class; `llava-fa serve --engine transformers` serves the model meanwhile",
                where=stored,
            )


def _local(model: str) -> Path:
    if os.path.isdir(model):
        return Path(model)
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

    config = get_current_vllm_config()
    patterns, revision = ["*.safetensors", "*.json"], config.model_config.revision
    return Path(download_weights_from_hf(model, config.load_config.download_dir, patterns, revision))
