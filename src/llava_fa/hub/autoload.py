"""Registers with transformers and peft as soon as they and this package are imported, in either order.

transformers has no entry point for quantisers, and peft none for layers; importing ours eagerly would drag torch and
transformers (five seconds) into `import llava_fa` and so into `llava-fa --help`. So a finder waits for the module that
whoever needs us must import, and registers right after its execution: `transformers.modeling_utils`, which every
`from_pretrained` needs, and `peft`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def _register_format(transformers: ModuleType) -> None:
    importlib.import_module("llava_fa.hub.quantizer")
    importlib.import_module("llava_fa.hub.decoding").install()
    visual_tokens = importlib.import_module("llava_fa.hub.visual_tokens")
    visual_tokens.extend_post_init(transformers.PreTrainedModel)


def _register_adapters(_: ModuleType) -> None:
    importlib.import_module("llava_fa.hub.peft_layers").install()


_AWAITED: dict[str, Callable[[ModuleType], None]] = {
    "transformers.modeling_utils": _register_format,
    "peft": _register_adapters,
}


def install() -> None:
    """Register with each of the two now if it is loaded already, else when it is."""
    for name, register in _AWAITED.items():
        if name in sys.modules:
            register(sys.modules[name])
        elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(name, register))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as all others do, and stays until it is executed: many only ask whether there is one."""

    def __init__(self, name: str, register: Callable[[ModuleType], None]) -> None:
        self.name, self.register = name, register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # once is enough; the class's own is there again
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.register(module)

            loader.exec_module = exec_module  # the true loader stays: source inspection looks there
        return spec
