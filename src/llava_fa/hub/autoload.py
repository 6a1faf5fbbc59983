"""Registers the checkpoint format with transformers as soon as both packages are imported, in either order.

transformers has no entry point for quantisers; importing ours eagerly would drag torch and transformers
(five seconds) into `import llava_fa` and so into `llava-fa --help`. So a finder waits for
`transformers.modeling_utils`, which every `from_pretrained` needs, and registers right after its execution.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_AWAITED = "transformers.modeling_utils"


def install() -> None:
    """Register now if transformers' models are loaded already, else when they are."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    importlib.import_module("llava_fa.hub.quantizer")
    importlib.import_module("llava_fa.hub.decoding").install()
    visual_tokens = importlib.import_module("llava_fa.hub.visual_tokens")
    visual_tokens.extend_post_init(sys.modules[_AWAITED].PreTrainedModel)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # once is enough; the class's own is there again
                execute(module)
                _register()

            loader.exec_module = exec_module  # the true loader stays: source inspection looks there
        return spec
