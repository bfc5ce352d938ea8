"""Where tests of the kernels run: on a CUDA device if there is one, else on the CPU, Triton in its interpreter."""

import pytest
import torch

from revisual_fast.kernels.dispatch import triton_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_DEVICE = [pytest.mark.gpu] if DEVICE == "cuda" else []
"""Marks of a module whose tests use the device where there is one."""

PROBLEM = triton_problem(torch.device(DEVICE))
needs_triton = pytest.mark.skipif(PROBLEM is not None, reason=f"triton is {PROBLEM}")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
