"""The fused ops as modules: settings at construction, tensors in ``forward``."""

from __future__ import annotations

from torch import Tensor, nn

from revisual_fast.losses import Objective, TokenBatch
from revisual_fast.ops import (
    PolicyLoss,
    SamplingMask,
    check_objective,
    linear_logprob,
    linear_policy_loss,
    policy_loss_from_logits,
)

__all__ = ["LinearLogprob", "LinearPolicyLoss", "PolicyLossFromLogits"]


class _Settings(nn.Module):
    """Keyword settings of an op, shown in the module's ``repr``; they have no parameters."""

    def __init__(self, objective: Objective | None = None, **settings: object) -> None:
        super().__init__()
        self.objective, self.settings = objective, settings

    def extra_repr(self) -> str:
        settings = [f"{name}={value!r}" for name, value in self.settings.items()]
        return ", ".join(settings if self.objective is None else [repr(self.objective), *settings])


class LinearLogprob(_Settings):
    """:func:`revisual_fast.linear_logprob` with the settings ``temperature, softcap, logits_dtype, backend``."""

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logits_dtype: str = "float32",
        backend: str = "auto",
    ) -> None:
        super().__init__(temperature=temperature, softcap=softcap, logits_dtype=logits_dtype, backend=backend)

    def forward(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        targets: Tensor,  # [N]
        *,
        bias: Tensor | None = None,  # [V]
        sampling_mask: SamplingMask | None = None,
    ) -> tuple[Tensor, Tensor]:
        """logp ``[N]`` and entropy ``[N]``."""
        return linear_logprob(hidden, weight, targets, bias=bias, sampling_mask=sampling_mask, **self.settings)  # type: ignore[arg-type]


class LinearPolicyLoss(_Settings):
    """:func:`revisual_fast.linear_policy_loss` of one objective, with the other settings of that function."""

    def __init__(
        self,
        objective: Objective,
        *,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logits_dtype: str = "float32",
        skip_inactive: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            check_objective(objective),
            temperature=temperature,
            softcap=softcap,
            logits_dtype=logits_dtype,
            skip_inactive=skip_inactive,
            backend=backend,
        )

    def forward(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        targets: Tensor,  # [N]
        tokens: TokenBatch,
        *,
        bias: Tensor | None = None,  # [V]
        sampling_mask: SamplingMask | None = None,
    ) -> PolicyLoss:
        """Loss with its gradient, logp, entropy and metrics."""
        of = (hidden, weight, targets, tokens, self.objective)
        return linear_policy_loss(*of, bias=bias, sampling_mask=sampling_mask, **self.settings)  # type: ignore[arg-type]


class PolicyLossFromLogits(_Settings):
    """:func:`revisual_fast.policy_loss_from_logits` of one objective, with the other settings of that function."""

    def __init__(
        self,
        objective: Objective,
        *,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        inplace: bool = False,
        backend: str = "auto",
    ) -> None:
        settings = {"temperature": temperature, "softcap": softcap, "inplace": inplace, "backend": backend}
        super().__init__(check_objective(objective), **settings)

    def forward(
        self,
        logits: Tensor,  # [N, V]
        targets: Tensor,  # [N]
        tokens: TokenBatch,
        *,
        sampling_mask: SamplingMask | None = None,
    ) -> PolicyLoss:
        """Loss with its gradient, logp, entropy and metrics."""
        of = (logits, targets, tokens, self.objective)
        return policy_loss_from_logits(*of, sampling_mask=sampling_mask, **self.settings)  # type: ignore[arg-type]
