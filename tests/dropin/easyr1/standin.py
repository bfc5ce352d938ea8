"""Stands in for EasyR1, which needs transformers < 5: the two places that are patched, with its names and signatures.

Written for these tests; it calls the model, takes its logits and averages losses as EasyR1 does (July 2026).
"""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def compute_policy_loss(
    old_log_probs: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_dual: float,
    tau_positive: float,
    tau_negative: float,
    loss_type: str,
    loss_avg_mode: str,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, float]]:
    """Token by token, from EasyR1's formulas."""
    sums: dict[str, list[float]] = {"ppo_kl": []}
    rows, entropies, total = [], [], log_probs.sum() * 0
    for i, own in enumerate(response_mask.bool()):
        at = own.nonzero().flatten().tolist()
        differences = {t: log_probs[i, t] - old_log_probs[i, t] for t in at}
        mean = sum(differences.values()) / (len(at) + 1e-8)
        losses = []
        for t in at:
            difference, advantage = differences[t], advantages[i, t]
            sums["ppo_kl"].append(-difference.item())
            if loss_type == "gspo":
                difference = mean
            elif loss_type == "gspo_token":
                difference = mean.detach() + log_probs[i, t] - log_probs[i, t].detach()
            ratio = difference.clamp(-20, 20).exp()
            held = difference.clamp(math.log(1 - clip_ratio_low), math.log(1 + clip_ratio_high)).exp()
            if loss_type == "cispo":
                losses.append(-advantage * log_probs[i, t] * held.detach())
            elif loss_type == "sapo":
                tau = tau_positive if advantage >= 0 else tau_negative
                losses.append(-advantage * 4 / tau * torch.sigmoid(tau * (ratio - 1)))
            else:
                free, clipped, lowest = -advantage * ratio, -advantage * held, -advantage * clip_ratio_dual
                loss = torch.maximum(free, clipped)
                sums.setdefault("pg_clipfrac_higher", []).append(float(free < clipped))
                sums.setdefault("pg_clipfrac_lower", []).append(float(loss > lowest and advantage < 0))
                losses.append(torch.minimum(loss, lowest) if advantage < 0 else loss)
        rows.append((sum(losses), len(at)))
        entropies.append(sum(-log_probs[i, t].item() for t in at))
    count = sum(n for _, n in rows)
    shares = [1 / (count + 1e-8) if loss_avg_mode == "token" else 1 / (len(rows) * (n + 1e-8)) for _, n in rows]
    for (loss, _), share in zip(rows, shares, strict=True):
        total = total + share * loss
    metrics = {name: sum(values) / (count + 1e-8) for name, values in sums.items()}
    metrics["entropy_loss"] = sum(e * s for e, s in zip(entropies, shares, strict=True))
    return total, metrics


class DataParallelPPOActor:
    def __init__(self, config: Any, actor_module: nn.Module, actor_optimizer: Any = None):
        self.config, self.actor_module, self.actor_optimizer = config, actor_module, actor_optimizer
        self.log_probs_from_logits = log_probs_from_logits

    def _forward_micro_batch(self, micro_batch: dict[str, Tensor], temperature: float) -> Tensor:
        ids, real = micro_batch["input_ids"], micro_batch["attention_mask"].bool()
        positions, length = micro_batch["position_ids"], micro_batch["responses"].shape[1]
        if not self.config.padding_free:
            inputs = {"input_ids": ids, "attention_mask": real, "position_ids": positions}
            logits = self.actor_module(**inputs, use_cache=False).logits
            logits.div_(temperature)
            return self.log_probs_from_logits(logits[:, -length - 1 : -1], micro_batch["responses"])
        packed = ids[real][None]
        output = self.actor_module(
            input_ids=packed, attention_mask=None, position_ids=positions[real][None], use_cache=False
        )
        logits = output.logits.squeeze(0)
        logits.div_(temperature)
        found = self.log_probs_from_logits(logits=logits, labels=packed.roll(-1, 1).squeeze(0))
        padded = torch.zeros(ids.shape, dtype=found.dtype).masked_scatter(real, found)
        return padded[:, -length - 1 : -1]


def config(**settings: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"padding_free": True, "ulysses_size": 1, **settings})


def modules() -> dict[str, ModuleType]:
    """For ``sys.modules``."""
    names = ("verl", "verl.workers", "verl.workers.actor", "verl.workers.actor.dp_actor")
    made = {name: ModuleType(name) for name in names}
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
        vars(module)["__path__"] = []
    actor = made[names[-1]]
    vars(actor)["compute_policy_loss"] = compute_policy_loss
    vars(actor)["DataParallelPPOActor"] = type(
        "DataParallelPPOActor", (DataParallelPPOActor,), dict(vars(DataParallelPPOActor))
    )
    assert not set(made) & set(sys.modules)
    return made
