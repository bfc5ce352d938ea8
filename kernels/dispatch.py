"""Which backend an op runs on, and why the others cannot."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch

from revisual_fast.kernels.cuda_library import cuda_problem

CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the CUDA kernels compute with."""

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_problem(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on tensors of ``device``, or None. The interpreter runs them on CPUs."""
    if not TRITON_INSTALLED:
        return "not installed: pip install triton"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"made for CUDA, the tensors are on {device.type}"


def backend_problem(backend: str, device: torch.device) -> str | None:
    """Why ``cuda``, ``triton`` or ``torch`` cannot run on tensors of ``device``, or None."""
    if backend == "cuda":
        return cuda_problem(device)
    return triton_problem(device) if backend == "triton" else None


def pick_backend(backend: str, device: torch.device, has: Sequence[str] = ("triton", "torch")) -> str:
    """The backend that a call with ``backend`` runs on, of those that the op ``has``, which end in ``torch``.

    ``auto`` is the first that can run on tensors of a CUDA ``device``, and torch elsewhere. Raises ValueError for an
    unknown backend, or one that cannot run here.
    """
    if backend not in ("auto", *has):
        raise ValueError(f"backend={backend!r} is unknown; it is one of {', '.join(('auto', *has))}")
    if backend == "auto":
        return next(name for name in has if backend_problem(name, device) is None) if device.type == "cuda" else "torch"
    problem = backend_problem(backend, device)
    if problem is not None:
        raise ValueError(f"backend={backend!r} is {problem}; use backend='auto' or 'torch'")
    return backend
