"""Let PyPI's torchvision be imported beside torch's CPU wheel: its operators get a schema before it gives them fakes.

Lies in the environment's site-packages, and is imported when Python starts (Makefile, `test-vllm`). It does nothing
until something imports torchvision. vLLM needs no operator of it: it imports the module for its transforms.
"""

import importlib.abc
import sys


class _Before(importlib.abc.MetaPathFinder):
    """Defines the operators when torchvision is about to be imported, and finds nothing itself."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and _Before.library is None:
            import torch

            _Before.library = torch.library.Library("torchvision", "DEF")
            _Before.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _Before.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _Before())
