"""The quantisation configuration: which of vLLM's modules hold layers of a compressed folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from llava_fa.errors import FourierError
from llava_fa.vllm.names import Names

logger = logging.getLogger(__name__)


class PackedConfig(QuantizationConfig):
    """vLLM asks `get_quant_method` for every layer that it builds; the answer reads its tensors from the folder itself.

    So a layer's tensors pass through no loader of a model class, a rank reads its own rows alone, and what no module
    asks for goes to vLLM dense (`vllm.stream`).

    Args:
        metadata: of the folder, `hub.checkpoint.Metadata`.
    """

    def __init__(self, metadata: Any) -> None:
        super().__init__()
        self.metadata = metadata
        self.names = Names(metadata.layers)
        self.claimed: dict[str, str] = {}
        """Stored layer → the module of vLLM's that holds it."""
        self.model = ""
        self._folder: Any = None

    def __repr__(self) -> str:
        return f"PackedConfig({len(self.metadata.layers)} packed layers)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folder": None}

    def get_name(self) -> str:
        """As config.json says, ``quant_method``."""
        return "llava_fa"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU; below 8.0 PyTorch multiplies, not Triton."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all of it is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """Of the ``quantization_config`` in config.json.

        Raises:
            FourierError: it is damaged, or of a newer format.
        """
        from llava_fa.hub.checkpoint import Metadata

        return cls(Metadata.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM says here which model it is."""
        self.model = model_name

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """And here what the model's class calls its modules."""
        self.names.map(hf_to_vllm_mapper.map_name)

    def folder(self) -> Any:
        """The folder, opened once a process; a hub id is downloaded as vLLM downloads it."""
        if self._folder is None:
            from llava_fa.vllm.folder import Folder

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

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """What loads and runs this layer; None where vLLM's own does, because nothing of it is packed."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from llava_fa.vllm import embedding, experts, linear, stream

        stream.install()
        if isinstance(layer, RoutedExperts):
            return experts.method(self, layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return embedding.method(self, layer, prefix)
        if isinstance(layer, LinearBase):
            return linear.method(self, prefix) or UnquantizedLinearMethod()
        return None


def _local(model: str) -> Path:
    if os.path.isdir(model):
        return Path(model)
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

    config = get_current_vllm_config()
    patterns, revision = ["*.safetensors", "*.json"], config.model_config.revision
    return Path(download_weights_from_hf(model, config.load_config.download_dir, patterns, revision))
