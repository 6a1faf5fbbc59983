"""LoRA by peft on top of a compressed model."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from llava_fa.errors import FourierError, explained
from llava_fa.nn.factored_linear import FactoredLinear
from llava_fa.nn.fourier_linear import FourierLinear

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def with_lora(model: nn.Module, config: LoraConfig) -> PeftModel:
    """``peft.get_peft_model`` that knows packed layers: y = W x + (α/r) B (A x) with W packed and frozen.

    Adapters are saved and loaded by peft, and trained by whatever trains peft models; they cannot be merged into codes.

    Args:
        model: compressed.
        config: of peft; ``target_modules`` may name packed layers and plain ones.

    Raises:
        FourierError: peft is not installed.
    """
    remedy = "pip install 'llava-fa[train]'"
    with explained("LoRA needs the package peft", remedy=remedy, kinds=(ImportError,), words=None):
        import peft
        from peft.tuners import lora

    class PackedLora(lora.Linear):  # type: ignore[misc]
        """peft's own LoRA layer, whose base is asked for its output and never for its weight."""

        def merge(self, *_: Any, **__: Any) -> None:
            """Refused: a sum of codes and adapters is no codes."""
            raise FourierError("an adapter cannot be merged into packed codes", remedy="Keep it beside the model")

    config._register_custom_module({FourierLinear: PackedLora, FactoredLinear: PackedLora})
    with warnings.catch_warnings():
        # that peft does not know these layers is why this function is there; and peft reads a name of transformers' v4
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(model, config)
