"""The models of this package under lmms-eval, as its model ``llava_fa`` (extra ``[lmms-eval]``)."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval finds by the entry point ``lmms_eval.models``: where the model is, to import it when asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("llava_fa", simple_class_path=f"{__name__}.model.LlavaFA")
