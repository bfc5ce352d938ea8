"""Generation of completions: the engine protocol, the embedded engine, and vLLM in a process of its own or a server."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from revisual_fast.config import RolloutConfig

__all__ = ["VLLM_LEAST", "pick_engine", "vllm_problem", "vllm_version"]

VLLM_LEAST = (0, 29)
"""The first version that has all that is used of it."""
INSTALL = f'pip install "vllm>={VLLM_LEAST[0]}.{VLLM_LEAST[1]}"'


def vllm_version() -> str | None:
    """The version of vllm that is installed, under whatever name it is distributed; None if there is none.

    vllm is not imported, which would take seconds.
    """
    if importlib.util.find_spec("vllm") is None:
        return None
    names = metadata.packages_distributions().get("vllm", [])
    return metadata.version(names[0]) if names else "of unknown version"


def vllm_problem() -> str:
    """Why the vllm here cannot be used; empty if it can."""
    version = vllm_version()
    if version is None:
        return "vllm is not installed"
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers and numbers < VLLM_LEAST:
        return f"vllm {version} is too old"
    return ""


def pick_engine(config: RolloutConfig, device: torch.device) -> tuple[Literal["embedded", "vllm"], str]:
    """The engine that ``rollout.engine`` means for a trainer on ``device``, and why.

    Raises ValueError where vllm is asked for and cannot be used, or a setting needs it and it is not chosen.
    """
    if config.engine == "embedded":
        return "embedded", "as configured"
    if config.url is not None:
        return "vllm", "as configured" if config.engine == "vllm" else "rollout.url names a server"
    problem = vllm_problem()
    if config.engine == "vllm":
        if problem:
            raise ValueError(f"rollout.engine: {problem}; {INSTALL}, or set rollout.engine to embedded")
        return "vllm", "as configured"
    if not problem and device.type == "cuda":
        return "vllm", f"vllm {vllm_version()} is installed and the device is CUDA"
    why = problem or f"the device is {device.type}"
    if given := config.for_vllm():
        raise ValueError(
            f"rollout.{', rollout.'.join(given)}: of vllm, but rollout.engine: auto is the embedded engine here "
            f"({why}); set rollout.engine to vllm, or leave them out"
        )
    return "embedded", why
