"""Dtypes of the kernels around packed rows, and which backend lacks which."""

import pytest
import torch

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def skip_missing(backend: str, dtype: torch.dtype) -> None:
    """fp64 has no CUDA kernels."""
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels are for bf16, fp16 and fp32")
