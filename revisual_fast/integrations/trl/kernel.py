"""The kernel seam: TRL's chunked log-probs, which all its trainers use, computed by :func:`linear_logprob`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revisual_fast.integrations.seams import replace, seam, warn_once
from revisual_fast.kernels.linear import matmul
from revisual_fast.kernels.plan import rows_per_chunk, slices
from revisual_fast.ops import linear_logprob
from revisual_fast.policy.attention import autocast_dtype

__all__ = ["FusedLogProb", "patch_trl"]

PLACE = "trl.trainer.utils:_ChunkedLogProbFunction"
PARAMETERS = ("hidden", "weight", "bias", "targets", "temperature", "chunk_size")
MORE = ("final_logit_softcapping", "logit_scale", "outputs")
STATISTICS = ("log_sum_sq_probs", "mean_logits", "is_top1")
"""Of TRL's outputs, those without a gradient."""


def patch_trl() -> None:
    """Let every TRL trainer compute its log-probs, entropies and their gradients by the fused head.

    6 N D V FLOPs where the logits are kept between the passes, 8 where they are not; fp32 logits, rows without an
    upstream gradient left out of the backward products. ``log_sum_sq_probs``, ``mean_logits`` and ``is_top1``, which
    the SFT and DPO trainers log, cost another 2 N D V. Calling it twice is harmless, :func:`unpatch` restores TRL.
    Raises ImportError without TRL, SeamError where TRL's function is not what is expected.
    """
    seam(PLACE)
    from trl.trainer import utils

    if utils._ChunkedLogProbFunction is not FusedLogProb:
        seam(f"{PLACE}.forward", ("ctx", *PARAMETERS, *MORE), exact=True)  # called by position
        FusedLogProb.original = replace("trl", utils, "_ChunkedLogProbFunction", FusedLogProb)


class FusedLogProb:
    """Stands where TRL has an autograd function, of which it calls ``apply`` only."""

    original: Any = None

    @classmethod
    def apply(
        cls,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N] int64
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", *STATISTICS),
    ) -> tuple[Tensor | None, ...]:
        """(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), each [N] or None where it is not asked for."""
        reason = _why_not(hidden, weight, logit_scale)
        if reason is not None:
            warn_once(f"revisual_fast: TRL's own log-probs are used: {reason}")
            settings = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            return cls.original.apply(hidden, weight, bias, targets, *settings)
        kind = hidden.device.type
        hidden = hidden.to(autocast_dtype(kind) or hidden.dtype)
        if weight.dtype.itemsize < hidden.dtype.itemsize:
            weight = weight.to(hidden.dtype)
        # scale * z, softcapped and divided by T, is z softcapped at cap / scale and divided by T / scale
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
        transform: dict[str, Any] = {"temperature": temperature / logit_scale, "softcap": softcap}
        with torch.autocast(kind, enabled=False):
            logp, entropy = linear_logprob(hidden, weight, targets, bias=bias, **transform)
            asked = [name for name in STATISTICS if name in outputs]
            more = _statistics(hidden, weight, bias, targets, asked, **transform) if asked else {}
        return (logp, entropy if "entropy" in outputs else None, *(more.get(name) for name in STATISTICS))


def _why_not(hidden: Tensor, weight: Tensor, logit_scale: float) -> str | None:
    if hidden.device.type not in ("cpu", "cuda"):
        return f"made for CUDA and the CPU, the hidden states are on {hidden.device.type}"
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 takes the head's weight away before the backward pass needs it"
    return None if logit_scale > 0 else f"logit_scale is {logit_scale}, and has to be above 0"


@torch.no_grad()
def _statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    asked: list[str],
    *,
    temperature: float,
    softcap: float | None,
) -> dict[str, Tensor]:
    """``asked`` of ``STATISTICS``, [N] each, from fp32 logits in chunks of rows: 2 N D V."""
    found: dict[str, list[Tensor]] = {name: [] for name in asked}
    columns = torch.arange(len(weight), device=hidden.device)
    for rows in slices(len(hidden), rows_per_chunk(len(weight), hidden.dtype, hidden.device)):
        z = _logits(hidden[rows], weight, bias)
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        if "log_sum_sq_probs" in asked:
            found["log_sum_sq_probs"].append((2 * z).logsumexp(1) - 2 * z.logsumexp(1))
        if "mean_logits" in asked:
            found["mean_logits"].append(z.mean(1))
        if "is_top1" in asked:  # the first of equal logits, as argmax has it
            target = targets[rows, None]
            own = z.gather(1, target)
            found["is_top1"].append(~((z > own) | ((z == own) & (columns < target))).any(1))
    return {name: torch.cat(parts) if parts else hidden.new_empty(0) for name, parts in found.items()}


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[n, V] fp32, or fp64 of fp64."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = matmul(hidden, weight.to(hidden.dtype).t(), wide)
    return z if bias is None else z + bias
