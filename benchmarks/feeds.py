"""Of how many linear layers the norm in front is known, family by family, and what knowing it is worth.

    python benchmarks/feeds.py [FAMILY …]      every architecture of transformers that takes pictures and writes text
    python benchmarks/feeds.py --worth         output error of 2-bit codes without data, the norm known and not

The first: default configurations on the meta device, nothing downloaded. "by name" is the table of names that came
before (tests/hub/feed_rules.py), "seen" is `hub.feeds.observe`; seconds are of one thread's CPU time.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import arguments
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]


def family(name: str) -> dict[str, Any]:
    """One row of the table; ``kinds`` are layers newly known, numbers in their names left out."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KINDS

    from llava_fa.hub.feeds import observe

    sys.path.insert(0, str(ROOT / "tests/hub"))
    from feed_rules import norm_by_name

    config = transformers.AutoConfig.for_model(name)
    _mend(config)
    with torch.device("meta"):
        model = getattr(transformers, KINDS[name])(config).eval()
    modules = dict(model.named_modules())
    layers = [key for key, module in modules.items() if type(module) is nn.Linear]
    start = time.process_time()
    feeds = observe(model)
    seconds = time.process_time() - start
    named = {key: norm for key in layers if (norm := norm_by_name(modules, key)) is not None}
    seen = {key: feed.norm for key in layers if (feed := feeds.of(key)) is not None}
    return {
        "family": name,
        "layers": len(layers),
        "by name": len(named) / len(layers),
        "seen": len(seen) / len(layers),
        "not run": len([key for key in feeds.unseen if key in modules]),
        "otherwise": sum(seen.get(key, norm) != norm for key, norm in named.items()),
        "lost": sum(key not in seen for key in named),
        "seconds": seconds,
        "kinds": Counter(re.sub(r"\d+", "#", key) for key in seen if key not in named),
    }


def _mend(config: Any) -> None:
    """Give defaults that transformers itself cannot run what the published models have there."""
    text = config.get_text_config()
    if text.model_type in ("glm4v_text", "glm4v_moe_text"):
        text.rope_parameters |= {"partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
    if text.model_type == "glm4v_moe_text":
        text.head_dim = 128
    if text.model_type == "step3p5":
        text.sliding_window = 512


def families(names: list[str], kinds: bool) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KINDS

    torch.set_num_threads(1)
    print("| family | linear layers | by name | seen | not run | otherwise | lost | s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names or list(KINDS):
        try:
            row = family(name)
        except Exception as error:  # a default configuration that transformers itself cannot build
            print(f"| {name} | cannot be built: {type(error).__name__} |", flush=True)
            continue
        print(
            f"| {name} | {row['layers']} | {row['by name']:.0%} | {row['seen']:.0%} | {row['not run']} "
            f"| {row['otherwise']} | {row['lost']} | {row['seconds']:.1f} |",
            flush=True,
        )
        for kind, count in row["kinds"].items() if kinds else ():
            print(f"    {count} × {kind}")


def worth() -> None:
    """Relative output error ‖(W - Ŵ) diag(γ)‖ / ‖W diag(γ)‖ of Gaussian weights, with γ as it is said to be."""
    from llava_fa import FourierConfig, approximate

    generator = torch.Generator().manual_seed(0)
    print("| layer | γ | not known | known |\n|---|---|---|---|")
    for layer, m, n in (("DeltaNet in_proj_qkv", 2048, 1024), ("MLA q_b_proj", 1536, 768)):
        W = torch.randn(m, n, generator=generator)
        for spread in (0.25, 0.5, 1.0):
            gamma = (spread * torch.randn(n, generator=generator)).exp()
            errors = [
                _error(W, approximate(W, FourierConfig(bits=2), moment).dequantize(), gamma)
                for moment in (None, gamma.square())
            ]
            print(f"| {layer}, {m} × {n} | log-normal, σ = {spread} | {errors[0]:.3f} | {errors[1]:.3f} |", flush=True)


def _error(W: Tensor, approximation: Tensor, gamma: Tensor) -> float:
    return float(((W - approximation) * gamma).norm() / (W * gamma).norm())


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--worth", action="store_true")
    parser.add_argument("--kinds", action="store_true", help="the layers that are newly known, by their names")
    chosen = parser.parse_args()
    worth() if chosen.worth else families(chosen.families, chosen.kinds)
