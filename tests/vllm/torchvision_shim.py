"""Lets a CUDA build of torchvision be imported beside a CPU build of torch, for the tests on vLLM.

Its import fails where the operators ``torchvision::nms`` and ``qnms`` do not exist; here they are declared before it.
``prepare.py`` copies this file into an environment, where it is imported whenever Python starts.
"""

import importlib.abc
import sys


class _DeclareFirst(importlib.abc.MetaPathFinder):
    """Finds nothing, but notices when torchvision is first asked for."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


finder = _DeclareFirst()
"""Holds the declarations, which end with it."""
sys.meta_path.insert(0, finder)
