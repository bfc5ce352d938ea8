"""Backends and dtypes of the kernels around packed rows; ``cuda`` only where there is a device."""

import pytest
import torch

from revisual_fast.kernels.dispatch import backend_problem
from tests.devices import BACKENDS, DEVICE

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

_PROBLEM = backend_problem("cuda", torch.device(DEVICE))
_CUDA = [pytest.param("cuda", marks=pytest.mark.skipif(_PROBLEM is not None, reason=f"cuda is {_PROBLEM}"))]
PACKING_BACKENDS = [*BACKENDS, *(_CUDA if DEVICE == "cuda" else [])]


def skip_missing(backend: str, dtype: torch.dtype) -> None:
    """fp64 has no CUDA kernels."""
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels are for bf16, fp16 and fp32")
