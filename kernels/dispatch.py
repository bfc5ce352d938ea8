"""Whether the Triton kernels can run, and which backend a small kernel beside the loss runs on."""

from __future__ import annotations

import importlib.util
import os

import torch

BACKENDS = ("auto", "triton", "torch")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_problem(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on tensors of ``device``, or None. The interpreter runs them on CPUs."""
    if not TRITON_INSTALLED:
        return "not installed: pip install triton"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"made for CUDA, the tensors are on {device.type}"


def pick_backend(backend: str, device: torch.device) -> str:
    """``triton`` or ``torch``. ``auto`` is triton for tensors on CUDA where triton is installed, torch elsewhere.

    Raises ValueError for an unknown backend, or one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; it is one of {', '.join(BACKENDS)}")
    problem = triton_problem(device)
    if backend == "auto":
        return "triton" if problem is None and device.type == "cuda" else "torch"
    if backend == "triton" and problem is not None:
        raise ValueError(f"backend='triton' is {problem}; use backend='auto' or 'torch'")
    return backend
