"""LLaVA-FA: large multimodal models made small enough to use.

The public API, loaded on first use: `import llava_fa` costs milliseconds, and `llava-fa --help` no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llava_fa.config import Budget as Budget
from llava_fa.config import Casp as Casp
from llava_fa.config import FourierConfig as FourierConfig
from llava_fa.errors import FourierError as FourierError
from llava_fa.hub import autoload as _autoload

if TYPE_CHECKING:
    from llava_fa.hub.compress import compress as compress
    from llava_fa.hub.request import CompressionRequest as CompressionRequest
    from llava_fa.hub.visual_tokens import attach_visual_tokens as attach_visual_tokens
    from llava_fa.hub.visual_tokens import set_visual_tokens as set_visual_tokens
    from llava_fa.nn.factored_linear import FactoredLinear as FactoredLinear
    from llava_fa.nn.fourier_linear import FourierLinear as FourierLinear
    from llava_fa.solver.approximate import approximate as approximate
    from llava_fa.solver.approximation import Approximation as Approximation
    from llava_fa.train.compress_recover import compress_and_recover as compress_and_recover

# One line a name, as above: where it comes from.
_LAZY = {
    "compress": "llava_fa.hub.compress",
    "CompressionRequest": "llava_fa.hub.request",
    "compress_and_recover": "llava_fa.train.compress_recover",
    "attach_visual_tokens": "llava_fa.hub.visual_tokens",
    "set_visual_tokens": "llava_fa.hub.visual_tokens",
    "FactoredLinear": "llava_fa.nn.factored_linear",
    "FourierLinear": "llava_fa.nn.fourier_linear",
    "approximate": "llava_fa.solver.approximate",
    "Approximation": "llava_fa.solver.approximation",
}
__all__ = ["Budget", "Casp", "FourierConfig", "FourierError", *_LAZY]

_autoload.install()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'llava_fa' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
