"""Where tests of the kernels run: on a CUDA device if there is one, else on the CPU, Triton in its interpreter."""

from typing import Any

import pytest
import torch

from revisual_fast.kernels.dispatch import backend_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_DEVICE = [pytest.mark.gpu] if DEVICE == "cuda" else []
"""Marks of a module whose tests use the device where there is one."""


def _unless_missing(backend: str) -> Any:
    problem = backend_problem(backend, torch.device(DEVICE))
    return pytest.mark.skipif(problem is not None, reason=f"{backend} is {problem}")


needs_triton = _unless_missing("triton")
_CUDA = [pytest.param("cuda", marks=_unless_missing("cuda"))] if DEVICE == "cuda" else []
KERNELS = [pytest.param("triton", marks=needs_triton), *_CUDA]
"""Backends with kernels of their own; ``cuda`` only where there is a device to run it."""
BACKENDS = ["torch", KERNELS[0]]
ALL_BACKENDS = ["torch", *KERNELS]
