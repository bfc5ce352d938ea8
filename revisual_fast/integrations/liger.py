"""``LigerFusedLinearGRPOLoss`` with the fused loss of this package: the import line is all that changes.

The constructor, the call, the defaults and what comes back are those of liger-kernel 0.8.5
(``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``), which need not be installed. docs/integrations/liger.md says
where the two differ.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from revisual_fast.losses import PolicyObjective, TokenBatch
from revisual_fast.losses.surrogates import KL_FORMS, Rows, Surrogate
from revisual_fast.losses.tokens import sequence_mean
from revisual_fast.ops import gather_rows, linear_logprob, linear_policy_loss

__all__ = ["LigerFusedLinearGRPOLoss"]

AGGREGATIONS = {
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "bnpo": "token_mean",
    "dr_grpo": "constant",
    "luspo": "sequence_sum",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "vespo": "token_mean",
}
"""loss_type -> how its tokens are weighed."""
WHOLE_BATCH = ("dapo", "cispo", "vespo")  # divided by the tokens of the whole batch, of all processes
SURROGATES = ("cispo", "sapo", "vespo")  # not the clipped one, and by token only


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO loss of hidden states ``[B, T, H]`` and a head ``[V, H]``; its gradient is made with it, 6 N H V FLOPs.

    ``loss_type`` is one of grpo, bnpo, dr_grpo (needs ``max_completion_length``), dapo, cispo (``epsilon_high`` is the
    bound of the ratio itself), sapo, luspo and vespo; ``importance_sampling_level`` token or, with the clipped ones,
    sequence. ``use_ref_model=False`` ignores a reference: the KL is 0. ``compiled`` and ``chunk_size`` are accepted and
    change nothing: chunks are planned in bytes. Raises ValueError for values outside their range; attributes may be set
    later and are checked in the call.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        positive = {"sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg}
        for name, value in {**positive, "delta": delta}.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,  # [B, T, H] (or [B T, H]) bf16, fp16, fp32 or fp64: the states that predict the tokens
        lin_weight: Tensor,  # [V, H]
        selected_token_ids: Tensor,  # [B, T] int64
        attention_mask: Tensor,  # [B, T] 0 or 1: which tokens count
        advantages: Tensor,  # [B]
        bias: Tensor | None = None,  # [V]
        ref_per_token_logps: Tensor | None = None,  # [B, T]
        old_per_token_logps: Tensor | None = None,  # [B, T]; None: on-policy
        ref_input: Tensor | None = None,  # [B, T, H], used where there is no ref_per_token_logps
        ref_weight: Tensor | None = None,  # [V, H]
        ref_bias: Tensor | None = None,  # [V]
        vllm_is_ratio: Tensor | None = None,  # [B, T] or [B, 1]
        num_items_in_batch: Tensor | float | None = None,  # tokens of the whole batch: dapo, cispo, vespo
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss (scalar, fp32, or fp64 for fp64 inputs) and metrics: the KL where ``beta`` is not 0, the clip fraction.

        Gradients flow into ``_input``, ``lin_weight`` and ``bias``. Tokens that do not count are not computed; finding
        them waits for the device once. Raises ValueError for shapes or settings that do not fit.
        """
        where = _Places(attention_mask, selected_token_ids, advantages)
        self._check(ref_per_token_logps, ref_input, ref_weight)
        hidden, targets = where.hidden(_input), where.rows(selected_token_ids)
        reference = None
        if self._has_kl:
            reference = where.rows(ref_per_token_logps)
            if reference is None:
                assert ref_input is not None, "_check() has seen to it"
                with torch.no_grad():
                    reference = self._logprob(where.hidden(ref_input), ref_weight, targets, ref_bias)
        tokens = TokenBatch(
            advantages,
            where.rows(old_per_token_logps),
            reference,
            cu_seqlens=where.cu_seqlens,
            weight=self._weight(where, num_items_in_batch, hidden.dtype),
            importance=self._importance(where, vllm_is_ratio),
        )
        objective = self._objective(corrected=vllm_is_ratio is not None)
        weight, options = _widened(lin_weight, hidden), {"bias": bias, "temperature": self.temperature}
        out = linear_policy_loss(hidden, weight, targets, tokens, objective, **options)  # type: ignore[arg-type]
        return out.loss, self._metrics(out.logp, tokens)

    @property
    def _has_kl(self) -> bool:
        return self.beta != 0 and self.use_ref_model

    def _check(self, ref_logps: Tensor | None, ref_input: Tensor | None, ref_weight: Tensor | None) -> None:
        if self.loss_type not in AGGREGATIONS:
            raise ValueError(f"loss_type={self.loss_type!r} is unknown; it is one of {', '.join(AGGREGATIONS)}")
        if self.importance_sampling_level == "sequence" and self.loss_type in SURROGATES:
            raise ValueError(
                f"loss_type={self.loss_type!r} has no ratio of sequences: use importance_sampling_level='token'"
            )
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_length")
        if not self._has_kl or ref_logps is not None:
            if self._has_kl and ref_input is not None:
                warnings.warn("ref_per_token_logps and ref_input are both given: ref_input is not used", stacklevel=3)
            return
        if ref_input is None or ref_weight is None:
            raise ValueError(
                f"beta={self.beta} needs ref_per_token_logps, or ref_input and ref_weight; or set use_ref_model=False"
            )

    def _objective(self, corrected: bool) -> PolicyObjective:
        surrogate: str | Surrogate = self.loss_type if self.loss_type in SURROGATES else "clip"
        high = self.epsilon_high
        if self.loss_type == "cispo":
            bound, high = high, max(high - 1, 0.0)
            if bound < 1:  # a cap below 1 is not one of PolicyObjective's
                surrogate = _capped(bound)
        return PolicyObjective(
            surrogate=surrogate,
            level=self.importance_sampling_level,
            clip_low=self.epsilon_low,
            clip_high=high,
            delta=self.delta if surrogate == "clip" else None,
            kl_coef=self.beta if self._has_kl else 0.0,
            kl_bias_correction=self.use_bias_correction_kl,
            rollout_correction="truncate" if corrected else None,
            aggregation=AGGREGATIONS[self.loss_type],
            constant_length=self.max_completion_length if self.loss_type == "dr_grpo" else None,
            sapo_tau_pos=self.sapo_temperature_pos,
            sapo_tau_neg=self.sapo_temperature_neg,
            vespo_k_pos=self.vespo_k_pos,
            vespo_lambda_pos=self.vespo_lambda_pos,
            vespo_k_neg=self.vespo_k_neg,
            vespo_lambda_neg=self.vespo_lambda_neg,
        )

    def _logprob(self, hidden: Tensor, weight: Any, targets: Tensor, bias: Tensor | None) -> Tensor:
        logp, _ = linear_logprob(hidden, _widened(weight, hidden), targets, bias=bias, temperature=self.temperature)
        return logp

    def _weight(self, where: _Places, num_items: Tensor | float | None, dtype: torch.dtype) -> Tensor | None:
        """``[N]``, or None where the objective's aggregation derives it."""
        if self.loss_type not in WHOLE_BATCH:
            return None
        dtype = torch.promote_types(dtype, torch.float32)
        together = dist.is_available() and dist.is_initialized()
        if num_items is None:
            total = torch.tensor(len(where.index), dtype=dtype, device=where.device)
            if together:
                dist.all_reduce(total)
        else:
            total = torch.as_tensor(num_items, dtype=dtype, device=where.device)
        share = (total / (dist.get_world_size() if together else 1)).clamp(min=1).reciprocal()
        return share.reshape(()).expand(len(where.index))

    def _importance(self, where: _Places, ratio: Tensor | None) -> Tensor | None:
        """``[N]`` of what multiplies the surrogate; vespo multiplies a sequence's values, so one is spread."""
        if ratio is None:
            return None
        if ratio.shape not in ((where.shape[0], 1), where.shape):
            raise ValueError(f"vllm_is_ratio must be {list(where.shape)} or [B, 1]; got {list(ratio.shape)}")
        if self.loss_type == "vespo" and ratio.shape[1] == 1 and where.shape[1] > 1:
            ratio = ratio ** (1 / where.lengths.to(ratio.device).clamp(min=1)[:, None])
        return where.rows(ratio.expand(where.shape))

    @torch.no_grad()
    def _metrics(self, logp: Tensor, tokens: TokenBatch) -> tuple[Tensor, ...]:
        batch = tokens.expanded(len(logp), logp.dtype, logp.device)
        assert batch.cu_seqlens is not None
        assert batch.advantages is not None
        ratio = torch.zeros_like(logp) if batch.old_logp is None else logp - batch.old_logp
        if self.importance_sampling_level == "sequence":
            ratio = sequence_mean(ratio, batch.cu_seqlens)
        ratio = ratio.exp()
        low, high = ratio < 1 - self.epsilon_low, ratio > 1 + self.epsilon_high
        if self.loss_type == "cispo":
            low, high = torch.zeros_like(low), ratio > self.epsilon_high
        clipped = (low & (batch.advantages < 0)) | (high & (batch.advantages > 0))
        if self.loss_type in ("sapo", "vespo"):
            clipped = torch.zeros_like(clipped)
        count = max(len(logp), 1)
        metrics: tuple[Tensor, ...] = (clipped.sum() / count,)
        if self.beta == 0:
            return metrics
        kl = torch.zeros_like(logp) if batch.ref_logp is None else KL_FORMS["k3"](batch.ref_logp - logp)
        return ((kl * ratio if self.use_bias_correction_kl else kl).sum() / count, *metrics)


class _Places:
    """Where the tokens that count stand in a batch ``[B, T]``: their rows and the bounds of their sequences."""

    def __init__(self, mask: Tensor, ids: Tensor, advantages: Tensor) -> None:
        if mask.ndim != 2 or ids.shape != mask.shape or advantages.shape != mask.shape[:1]:
            raise ValueError(
                f"attention_mask and selected_token_ids must be [B, T], advantages [B]; got {list(mask.shape)}, "
                f"{list(ids.shape)} and {list(advantages.shape)}"
            )
        self.device, self.shape = ids.device, mask.shape
        on_host = mask.cpu()
        counts = on_host != 0
        if not (counts == on_host).all():
            raise ValueError("attention_mask must be 0 or 1: weights of tokens have no place in it")
        self.lengths = counts.sum(1)
        self.cu_seqlens = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).int()  # [B + 1], on the CPU
        self.index = counts.flatten().nonzero()[:, 0]  # [N], on the CPU
        self._all = len(self.index) == mask.numel()
        self._on_device = self.index.to(self.device, non_blocking=True)

    def rows(self, values: Any) -> Any:
        """``[B, T]`` -> ``[N]``; None stays None."""
        if values is None:
            return None
        if values.shape != self.shape:
            raise ValueError(f"expected a tensor [B, T] = {list(self.shape)}; got {list(values.shape)}")
        return values.to(self.device).flatten()[self._on_device]

    def hidden(self, hidden: Tensor) -> Tensor:
        """``[B, T, H]`` -> ``[N, H]``."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if len(flat) != self.shape.numel():
            raise ValueError(
                f"hidden states must be [B, T, H] with [B, T] = {list(self.shape)}; got {list(hidden.shape)}"
            )
        return flat if self._all else gather_rows(flat, self._on_device)


def _widened(weight: Tensor, hidden: Tensor) -> Tensor:
    """A weight narrower than the hidden states is multiplied in their dtype, as Liger does it."""
    return weight.to(torch.promote_types(weight.dtype, hidden.dtype))


def _capped(bound: float) -> Surrogate:
    def cispo(r: Rows) -> Tensor:
        return -r.ratio.detach().clamp(max=bound) * r.advantage * r.logp

    return cispo
