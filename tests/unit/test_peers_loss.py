"""The loss code of TRL and Liger, where it is right, on the same padded batches: loss and dL/dlogp in float64."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast.losses import PolicyObjective, TokenBatch, loss_gradients
from tests.numerics import loss_batch

CPU = torch.device("cpu")
LENGTHS = (3, 5, 1, 4)
OURS = {  # fields of ours -> what TRL and Liger call it
    "grpo": ({"aggregation": "sequence_mean"}, {"loss_type": "grpo"}),
    "grpo two-sided": ({"aggregation": "sequence_mean", "delta": 1.3}, {"loss_type": "grpo", "delta": 1.3}),
    "bnpo": ({}, {"loss_type": "bnpo"}),
    "dapo": ({}, {"loss_type": "dapo"}),
    "dr_grpo": ({"aggregation": "constant", "constant_length": 9}, {"loss_type": "dr_grpo"}),
    "cispo": ({"surrogate": "cispo", "clip_high": 0.28}, {"loss_type": "cispo", "epsilon_high": 1.28}),
    "sapo": ({"surrogate": "sapo", "aggregation": "sequence_mean"}, {"loss_type": "sapo"}),
    "vespo": ({"surrogate": "vespo"}, {"loss_type": "vespo"}),
    "gspo": ({"level": "sequence", "aggregation": "sequence_mean"}, {"loss_type": "grpo"}),
    "luspo": ({"level": "sequence", "aggregation": "sequence_sum"}, {"loss_type": "luspo"}),
}
SHARED = {"clip_low": 0.2, "clip_high": 0.28}
KL: list[dict[str, Any]] = [{}, {"kl_coef": 0.3}, {"kl_coef": 0.3, "kl_bias_correction": True}]


class Case:
    """A batch as we see it, and the same padded to ``[B, T]``."""

    def __init__(self, name: str, kl: dict[str, Any], **more: Any) -> None:
        ours, self.theirs = OURS[name]
        self.objective = PolicyObjective(**{**SHARED, **ours, **kl, **more})
        self.logp, self.entropy, tokens = loss_batch(LENGTHS, seed=4)
        per_sequence = torch.tensor([1.2, -0.7, -1.5, 0.4], dtype=torch.float64)
        self.tokens = TokenBatch(per_sequence, tokens.old_logp, tokens.ref_logp, tokens.rollout_logp, tokens.cu_seqlens)
        self.advantages = per_sequence
        self.mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]

    def padded(self, values: Tensor | None, fill: float = 0.0) -> Tensor:
        assert values is not None
        return torch.full(self.mask.shape, fill, dtype=values.dtype).masked_scatter(self.mask, values)

    def ours(self) -> tuple[Tensor, Tensor]:
        tokens, _ = self.objective.prepare(self.tokens, len(self.logp), torch.float64, CPU)
        loss, c, _ = loss_gradients(self.objective, self.logp, self.entropy, tokens)
        return loss, c

    def importance(self) -> Tensor:
        tokens, _ = self.objective.prepare(self.tokens, len(self.logp), torch.float64, CPU)
        return self.padded(self.objective.importance(self.logp, tokens), fill=1.0)

    def check(self, loss: Tensor, logp: Tensor) -> None:
        (c,) = torch.autograd.grad(loss, logp)
        torch.testing.assert_close((loss.detach(), c[self.mask]), self.ours())


def trl_loss(case: Case, logp: Tensor) -> Tensor:
    """TRL's own ``_compute_loss`` with a trainer that has the settings and nothing else."""
    pytest.importorskip("trl", reason="trl is not installed")
    from trl import GRPOTrainer

    o = case.objective
    names = {"epsilon_high": o.clip_high, **case.theirs}
    settings = {
        "use_bias_correction_kl": o.kl_bias_correction,
        "delta": o.delta,
        "sapo_temperature_pos": o.sapo_tau_pos,
        "sapo_temperature_neg": o.sapo_tau_neg,
        "vespo_k_pos": o.vespo_k_pos,
        "vespo_lambda_pos": o.vespo_lambda_pos,
        "vespo_k_neg": o.vespo_k_neg,
        "vespo_lambda_neg": o.vespo_lambda_neg,
    }
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(**settings),
        loss_type=names["loss_type"],
        epsilon_low=o.clip_low,
        epsilon_high=names["epsilon_high"],
        beta=o.kl_coef,
        importance_sampling_level=o.level,
        max_completion_length=o.constant_length,
        off_policy_mask_threshold=o.off_policy_mask,
        use_vllm=o.rollout_correction is not None,
        vllm_importance_sampling_correction=True,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, case.padded(case.entropy), None),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    tokens, mask = case.tokens, case.mask.double()
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1),
        "prompt_mask": torch.ones(len(mask), 1),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": case.advantages,
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": case.padded(tokens.ref_logp),
        "old_per_token_logps": case.padded(tokens.old_logp),
        "sampling_per_token_logps": case.padded(tokens.rollout_logp),
    }
    if o.rollout_correction is not None:
        inputs["importance_sampling_ratio"] = case.importance()
    return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


@pytest.mark.parametrize("kl", KL, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_trl(name: str, kl: dict[str, Any]) -> None:
    extras: list[dict[str, Any]] = [{}, {"off_policy_mask": 0.1}, {"rollout_correction": "truncate"}]
    for more in [*extras, {"rollout_correction": "mask", "rollout_cap": 1.1}]:
        case = Case(name, kl, **more)
        logp = case.padded(case.logp).requires_grad_()
        case.check(trl_loss(case, logp), logp)


def test_trl_masks_sequences_in_these_batches() -> None:
    case = Case("grpo", {}, off_policy_mask=0.1)
    tokens, _ = case.objective.prepare(case.tokens, len(case.logp), torch.float64, CPU)
    masked = case.objective.masked(case.logp, tokens)
    assert masked is not None
    assert 0 < masked.sum() < (tokens.advantages < 0).sum()  # type: ignore[operator]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("kl", KL, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_liger(name: str, kl: dict[str, Any], corrected: bool) -> None:
    """Its plain-torch loss."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    if name == "luspo" and (kl or corrected):
        pytest.skip("Liger 0.8.5 divides luspo by the padded length as soon as a term differs from token to token")
    case = Case(name, kl, rollout_correction="truncate" if corrected else None)
    o, logp, mask = case.objective, case.padded(case.logp).requires_grad_(), case.mask.double()
    loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logp,
        mask,
        case.advantages,
        mask,
        ref_per_token_logps=case.padded(case.tokens.ref_logp),
        old_per_token_logps=case.padded(case.tokens.old_logp),
        **{"epsilon_low": o.clip_low, "epsilon_high": o.clip_high, **case.theirs},
        beta=o.kl_coef,
        max_completion_length=o.constant_length,
        importance_sampling_level=o.level,
        vllm_is_ratio=case.importance() if corrected else None,
        use_bias_correction_kl=o.kl_bias_correction,
    )
    case.check(loss, logp)
