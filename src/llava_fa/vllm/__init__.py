"""Compressed models in vLLM, which finds `register` by the entry point ``vllm.general_plugins`` (docs/serving.md)."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Make the format, and LLaVA models with elastic visual tokens, known to vLLM.

    vLLM calls it in every process, perhaps several times, before anything is loaded: it costs no import of a model or
    a kernel. What keeps a version of vLLM from being served is said when a compressed model is asked for.
    """
    from llava_fa.vllm import support

    reason = support.version_refusal()
    if reason is not None:
        logger.warning("llava-fa does not serve its models in this vLLM: %s", reason)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.layers.quantization import register_quantization_config

    from llava_fa.vllm.config import PackedConfig

    register_quantization_config("llava_fa")(PackedConfig)
    for architecture in support.ELASTIC:
        ModelRegistry.register_model(architecture, f"llava_fa.vllm.elastic:{architecture}")
