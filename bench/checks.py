"""What a variant must pass before it is timed, and what it may raise without ending the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
MARGIN = 2.0  # a variant's error is at most this many times plain torch's
ROUNDING = torch.finfo(torch.float32).eps
SLICE = 1 << 26  # elements compared at a time
VALUES = {"loss", "logp", "entropy"}  # what the precision of the logits decides; the rest are gradients

KINDS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    LookupError,
    AttributeError,
    NameError,
    ArithmeticError,
    ImportError,
    OSError,
    MemoryError,
)
THEIR_KINDS = {  # module -> a class of its own that derives from Exception alone
    "triton.errors": "TritonError",
    "cutlass.base_dsl.common": "DSLBaseError",
    "torch._dynamo.exc": "FailOnRecompileLimitHit",
}


def failures() -> tuple[type[Exception], ...]:
    """What a variant may raise here and be reported for, not the benchmark: it is often code of others.

    Looked up when something was raised: a module that is not loaded by then has raised nothing.
    """
    theirs = [getattr(sys.modules.get(module), name, None) for module, name in THEIR_KINDS.items()]
    return (*KINDS, *(kind for kind in theirs if kind is not None))


def said(error: Exception) -> str:
    """One line for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def recompile_limit_is_an_error() -> AbstractContextManager[Any]:
    """Beyond its limit of recompilations torch.compile runs eager torch without a word; within this it raises."""
    import torch._dynamo

    config: Any = torch._dynamo.config
    names = ("fail_on_recompile_limit_hit", "error_on_recompile_limit")  # depends on the version
    known = {name: True for name in names if hasattr(config, name)}
    return config.patch(known) if known else nullcontext()


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``|value - reference| / |reference|`` in float64, in slices; nan where the value has one."""
    reference = reference.reshape(-1)
    value = value.detach().reshape(-1)  # a variant may return a view of another shape
    if value.shape != reference.shape:
        raise ValueError(f"an output has {value.numel()} elements, the reference {reference.numel()}")
    pairs = zip(value.split(SLICE), reference.split(SLICE), strict=True)
    squares = [((v.double() - r.double()).square().sum(), r.double().square().sum()) for v, r in pairs]
    error, size = (sum(float(square) for square in side) for side in zip(*squares, strict=True))
    return (error / max(size, 1e-300)) ** 0.5


def errors_of(outputs: Outputs, reference: Outputs) -> dict[str, float]:
    """Error of every output. A loss is a sum in which errors cancel by luck, so that its own size says nothing: its
    error is taken relative to ``|c| |logp|``, the size that an error of logp times ``c = dL/dlogp`` can reach."""
    errors = {name: relative_error(value, reference[name]) for name, value in outputs.items() if name != "loss"}
    if "loss" in outputs:
        scale = float(reference["c"].double().norm() * reference["logp"].double().norm())
        errors["loss"] = abs(float(outputs["loss"].detach().double() - reference["loss"])) / scale
    return errors


def allowed_errors(
    names: Sequence[str], plain: Mapping[str, float], values: Mapping[str, float] | None = None
) -> dict[str, float]:
    """``MARGIN`` times plain torch's error, at least one fp32 rounding; the loss is bounded by logp's error.

    ``values``: the errors that bound loss, logp and entropy, where they are not those of ``plain``.
    """

    def of(name: str) -> float:
        source = plain if values is None or name not in VALUES else values
        return source["logp" if name == "loss" else name]

    return {name: max(MARGIN * of(name), ROUNDING) for name in names}
