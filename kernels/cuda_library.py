"""The CUDA kernels: the library that ``setup.py`` builds from csrc/, and whether it can run on a device.

Importing this module loads the library where it is built; its ops are then in ``torch.ops.revisual_fast_cuda``.
"""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"
BUILD = "run `make cuda` in a checkout, or `pip install --no-build-isolation .`, with nvcc on PATH"


def load_library(path: Path) -> str | None:
    """Load the library, None; or why it cannot be loaded, and the command that builds it."""
    if not path.exists():
        return f"not built: {BUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"built, but cannot be loaded ({error}): {BUILD}"
    return None


LOAD_PROBLEM = load_library(LIBRARY)
ARCHITECTURES: str = "" if LOAD_PROBLEM else torch.ops.revisual_fast_cuda.architectures()
"""What the library holds code for, in nvcc's words: ``sm_80+compute_80+sm_90a``, machine code and PTX."""


def load() -> str | None:
    """None if the library is loaded, or the reason why not, with the command that builds it."""
    return LOAD_PROBLEM


def cuda_problem(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on tensors of ``device``, or None. ``torch.compile`` traces through it."""
    if LOAD_PROBLEM is not None:
        return LOAD_PROBLEM
    if device.type != "cuda":
        return f"made for CUDA, the tensors are on {device.type}"
    properties = torch.cuda.get_device_properties(device)
    return capability_problem(properties.major, properties.minor, ARCHITECTURES)


def capability_problem(major: int, minor: int, architectures: str) -> str | None:
    """Why code for ``architectures`` cannot run on a device of compute capability ``major.minor``, or None."""
    if major < 8:
        return f"made for compute capability 8.0 and newer, this device has {major}.{minor}"
    for architecture in architectures.split("+"):
        if runs(architecture, major, minor):
            return None
    wanted = f"{major}.{minor}a" if major == 9 else f"{major}.{minor}"
    found = f"built for {architectures}, not for this device's compute capability {major}.{minor}"
    return f"{found}, which takes TORCH_CUDA_ARCH_LIST={wanted}: {BUILD}"


def runs(architecture: str, major: int, minor: int) -> bool:
    """Machine code runs on its own major version, from its own minor version on; PTX on everything newer as well; ``a``
    code on one capability, ``f`` code on one major version (CUDA C++ Programming Guide, "Compute Capabilities").
    """
    kind, name = architecture.split("_")
    number = name.rstrip("af")
    made = (int(number[:-1]), int(number[-1]))
    if name.endswith("a"):
        return made == (major, minor)
    return made <= (major, minor) and (made[0] == major or (kind == "compute" and not name.endswith("f")))
