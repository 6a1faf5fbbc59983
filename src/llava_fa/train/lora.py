"""LoRA by peft on top of a compressed model."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn

from llava_fa.errors import explained

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def with_lora(model: nn.Module, config: LoraConfig) -> PeftModel:
    """``peft.get_peft_model``: y = W x + (α/r) B (A x) with W packed and frozen (`hub.peft_layers`).

    Adapters are saved, loaded (``peft.PeftModel.from_pretrained``) and trained by whatever does so with peft models;
    they cannot be merged into codes.

    Args:
        model: compressed.
        config: of peft; ``target_modules`` may name packed layers and plain ones, or be ``"all-linear"``.

    Raises:
        FourierError: peft is not installed, or ``config`` asks for what packed layers cannot do.
    """
    remedy = "pip install 'llava-fa[train]'"
    with explained("LoRA needs the package peft", remedy=remedy, kinds=(ImportError,), words=None):
        import peft
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # a name of transformers' v4
        return peft.get_peft_model(model, config)
