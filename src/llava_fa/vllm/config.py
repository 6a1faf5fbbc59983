"""The quantisation configuration: which of vLLM's modules hold layers of a compressed folder."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from llava_fa.errors import FourierError
from llava_fa.vllm.support import ELASTIC


class PackedConfig(QuantizationConfig):
    """vLLM asks `get_quant_method` for every layer that it builds; the answer reads its tensors from the folder itself.

    So a layer's tensors pass through no loader of a model class, a rank reads its own rows alone, what no module asks
    for is put in its place later (`vllm.unasked`), and what cannot be goes to vLLM dense (`vllm.stream`).

    Args:
        store: the layers, `vllm.store.Store`.
    """

    def __init__(self, store: Any) -> None:
        super().__init__()
        self.store = store

    def __repr__(self) -> str:
        return f"PackedConfig({len(self.store.layers)} packed layers)"

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
        from llava_fa.vllm.store import Store

        return cls(Store(Metadata.from_dict(config)))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM says here which model it is.

        Raises:
            FourierError: it is told fewer visual tokens, which its class would ignore.
        """
        names = getattr(hf_config, "architectures", None) or []
        if getattr(hf_config, "visual_tokens", None) is not None and not set(names) & set(ELASTIC):
            raise FourierError(
                f"{', '.join(names)} always uses all its visual tokens in vLLM",
                remedy=f"Leave visual_tokens out of --hf-overrides; it is for {', '.join(ELASTIC)}",
                where=model_name,
            )
        self.store.model = model_name

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """And here what the model's class calls its modules."""
        self.store.names.map(hf_to_vllm_mapper.map_name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """What loads and runs this layer; None where vLLM's own does, because nothing of it is packed."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from llava_fa.vllm import embedding, experts, linear, stream

        stream.install()
        if isinstance(layer, RoutedExperts):
            return experts.method(self.store, layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return embedding.method(self.store, layer, prefix)
        if isinstance(layer, LinearBase):
            return linear.method(self.store, prefix, self.packed_modules_mapping) or UnquantizedLinearMethod()
        return None
