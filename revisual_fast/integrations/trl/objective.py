"""TRL's losses as objectives of the fused loss, and the proof that they are the same.

A loss that a :class:`PolicyObjective` can say is computed in one pass over the logits. Any other one (vespo, an entropy
bonus, masks by entropy or by drift) is TRL's own code, called inside the fused loss with the log-probs and entropies.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from revisual_fast.integrations.grouping import scatter
from revisual_fast.integrations.seams import SeamError
from revisual_fast.losses import PolicyObjective, TokenBatch
from revisual_fast.losses.objective import loss_gradients

__all__ = ["check_objective_against", "objective_of", "token_values"]

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
PLACE = "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss"


def objective_of(trainer: Any) -> PolicyObjective | None:
    """The trainer's loss, but for the weights of its tokens; None where TRL's own code has to compute it."""
    args, loss = trainer.args, trainer.loss_type
    if trainer.top_entropy_quantile < 1 or trainer.off_policy_mask_threshold is not None:
        return None
    if trainer._entropy_bonus_enabled or trainer.importance_sampling_level not in ("token", "sequence"):
        return None
    common: dict[str, Any] = {"level": trainer.importance_sampling_level, "kl_coef": trainer.beta}
    common["kl_bias_correction"] = bool(trainer.beta and args.use_bias_correction_kl)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        common["rollout_correction"] = "truncate"  # the weights are given
    if loss in CLIPPED:
        return PolicyObjective(clip_low=trainer.epsilon_low, clip_high=trainer.epsilon_high, delta=args.delta, **common)
    if loss == "cispo" and trainer.epsilon_high >= 1:
        return PolicyObjective(surrogate="cispo", clip_high=trainer.epsilon_high - 1, **common)
    if loss == "sapo":
        tau = {"sapo_tau_pos": args.sapo_temperature_pos, "sapo_tau_neg": args.sapo_temperature_neg}
        return PolicyObjective(surrogate="sapo", **tau, **common)
    return None


def token_values(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> dict[str, Tensor | None]:
    """What the objective needs of each token: fields of :class:`TokenBatch`, each [B, C] or [B, 1]; mask [B, C]."""
    advantages = inputs["advantages"]
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return {
        "advantages": advantages[:, None] if advantages.dim() == 1 else advantages,
        "old_logp": inputs.get("old_per_token_logps"),
        "ref_logp": inputs["ref_per_token_logps"] if trainer.beta else None,
        "importance": inputs["importance_sampling_ratio"] if corrected else None,
        "weight": _weights(trainer, inputs, mask),
    }


def _weights(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """[B, C]: what each token's loss is multiplied by in the sum, gradient accumulation included."""
    training, loss = trainer.model.training, trainer.loss_type
    mask = mask.float()
    accumulated = trainer.current_gradient_accumulation_steps if training else 1
    if loss in ("cispo", "dapo"):
        total = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
        if training:
            total = total * accumulated / trainer.args.steps_per_generation
        return mask / total
    rows = mask.shape[0] * accumulated
    if loss in ("grpo", "sapo"):
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / rows
    if loss == "bnpo":
        return mask / mask.sum().clamp(min=1) / accumulated
    return mask / rows if loss == "luspo" else mask / (rows * trainer.max_completion_length)


def check_objective_against(trainer: Any, objective: PolicyObjective, trl_loss: Any) -> None:
    """Raises SeamError unless ``trl_loss(inputs, logp, entropy)`` is the objective's loss of random rows.

    Compared are the value and its derivatives by every log-prob and entropy, on-policy and off, where ratios lie
    inside and outside of every bound, in sequences of several lengths, one of them empty.
    """
    metrics, trainer._metrics = trainer._metrics, defaultdict(lambda: defaultdict(list))
    mode, steps = trainer.model.training, getattr(trainer, "current_gradient_accumulation_steps", None)
    trainer.current_gradient_accumulation_steps = steps or trainer.args.gradient_accumulation_steps
    try:
        for training in (True, False):
            trainer.model.training = training  # of the wrapper alone: nothing is run
            for on_policy in (True, False):
                _compare(trainer, objective, trl_loss, on_policy)
    finally:
        trainer._metrics, trainer.model.training = metrics, mode
        if steps is None:
            del trainer.current_gradient_accumulation_steps


def _compare(trainer: Any, objective: PolicyObjective, trl_loss: Any, on_policy: bool) -> None:
    inputs, logp, entropy = _random_batch(trainer, on_policy)
    theirs = trl_loss(inputs, logp, entropy)
    wanted = torch.autograd.grad(theirs, (logp, entropy), allow_unused=True, materialize_grads=True)
    mask = inputs["completion_mask"]
    places = mask.flatten().nonzero().flatten()
    values = token_values(trainer, inputs, mask)
    fields = {k: None if v is None else v.expand(mask.shape).flatten()[places] for k, v in values.items()}
    bounds = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    tokens = TokenBatch(**fields, cu_seqlens=bounds)
    tokens, _ = objective.prepare(tokens, len(places), logp.dtype, logp.device)
    ours, c, e = loss_gradients(objective, logp.flatten()[places], entropy.flatten()[places], tokens)
    found = [torch.zeros_like(c) if x is None else x for x in (c, e)]
    padded = [scatter(x, places, logp.shape) for x in found]
    named = zip(("value", "gradient by the log-probs", "gradient by the entropies"), (ours, *padded), strict=True)
    for (name, mine), their in zip(named, (theirs.detach(), *wanted), strict=True):
        size = their.abs().max() if name != "value" else (wanted[0] * logp.detach()).abs().sum()  # a value may cancel
        error = float((mine - their).abs().max() / size.clamp(min=1e-30))
        if not error <= 1e-5:
            raise SeamError(
                f"{PLACE} of this TRL, or of a subclass, is another loss than the one known for "
                f"loss_type={trainer.loss_type!r}: the {name} differs by {error:.1e}, on-policy={on_policy}. Use "
                "trl.GRPOTrainer with patch_trl() instead"
            )


def _random_batch(trainer: Any, on_policy: bool) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Inputs as TRL makes them, log-probs [B, C] and entropies [B, C] with gradients on."""
    rng, device = torch.Generator().manual_seed(0), trainer.accelerator.device
    lengths = torch.tensor([7, 4, 0, 7, 1, 5, 6, 3])
    mask = (torch.arange(7) < lengths[:, None]).int()
    shape = tuple(mask.shape)

    def draw(scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64) * scale

    logp = -draw().abs()
    spread = torch.tensor([0.5, 0.5, 0.1, 1e-4, 2.0, 0.1, 1e-3, 0.3], dtype=torch.float64)[:, None]
    drift = spread * (draw() + torch.tensor([1, -1, 0, 0, 1, -1, 0, 1], dtype=torch.float64)[:, None])
    inputs: dict[str, Any] = {
        "prompt_ids": torch.zeros(shape[0], 2, dtype=torch.long),
        "prompt_mask": torch.ones(shape[0], 2, dtype=torch.int),
        "completion_ids": torch.zeros(shape, dtype=torch.long),
        "completion_mask": mask,
        "advantages": draw()[:, 0],
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": logp + draw(0.3),
        "importance_sampling_ratio": draw(0.3).exp(),
    }
    if not on_policy:
        inputs["old_per_token_logps"] = logp - drift
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return inputs, logp.to(device).requires_grad_(), draw().abs().to(device).requires_grad_()
