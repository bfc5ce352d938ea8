"""Named ranges on a profiler's timeline, by NVTX: one around every op and around every phase of a training step.

They are off unless somebody listens, and then cost nothing: a decorated function is the function itself, ``span``
returns a context that does nothing, and ``nvtx`` is not imported. Which it is gets decided once, at import:
``REVISUAL_FAST_NVTX=1`` or ``0`` says so, else they are on where ``NVTX_INJECTION64_PATH`` is set. That is the variable
by which a tool names the library that NVTX hands the ranges to, and on Linux the only way it has (nvtx3/nvtxDetail/
nvtxInit.h in the CUDA toolkit; "NVTX injection" in https://docs.nvidia.com/cupti/main/main.html): without it every call
of NVTX would do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, TypeVar

import torch

__all__ = ["DOMAIN", "ENABLED", "ranged", "span"]

DOMAIN = "revisual_fast"
"""The NVTX domain of all ranges."""

SWITCH, TOOL = "REVISUAL_FAST_NVTX", "NVTX_INJECTION64_PATH"

Function = TypeVar("Function", bound=Callable[..., Any])


def _wanted(environment: Mapping[str, str]) -> bool:
    choice = environment.get(SWITCH, "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}={choice!r} is unknown; it is 1 (ranges on), 0 (off) or unset (on under a profiler)")
    return choice == "1" if choice else bool(environment.get(TOOL))


def _annotate_of_nvtx() -> Callable[..., AbstractContextManager[Any]]:
    try:
        from nvtx import annotate
    except ModuleNotFoundError:
        why = SWITCH if os.environ.get(SWITCH) else TOOL
        raise ImportError(
            f"{why} is set, which asks for NVTX ranges, but the package nvtx is not installed: pip install nvtx, or "
            f"set {SWITCH}=0 to do without them"
        ) from None
    return annotate


ENABLED = _wanted(os.environ)
"""Whether ranges are recorded in this process."""

_NOTHING: AbstractContextManager[Any] = nullcontext()
_annotate = _annotate_of_nvtx() if ENABLED else None


def span(name: str, payload: int | None = None) -> AbstractContextManager[Any]:
    """A context that is the range ``name`` of the thread that enters it; ``payload`` is a number shown with it.

    Names are few and fixed, since NVTX keeps every one: what varies is the payload. Nothing happens while
    ``torch.compile`` traces: a range never breaks a graph.
    """
    if _annotate is None or torch.compiler.is_compiling():
        return _NOTHING
    return _named(name) if payload is None else _annotate(name, domain=DOMAIN, payload=payload)


@cache
def _named(name: str) -> AbstractContextManager[Any]:
    """nvtx's context has no state, so that one does for every range of that name, nested ones and threads included."""
    assert _annotate is not None
    return _annotate(name, domain=DOMAIN)


def ranged(name: str) -> Callable[[Function], Function]:
    """Decorator: every call of the function is the range ``name``. Where ranges are off, the function itself."""

    def decorate(function: Function) -> Function:
        if not ENABLED:
            return function

        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with span(name):
                return function(*args, **kwargs)

        return inside  # type: ignore[return-value]

    return decorate
