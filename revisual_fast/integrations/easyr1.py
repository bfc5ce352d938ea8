"""EasyR1: log-probs of response rows straight from the hidden states, and the policy loss as this package's objective.

:func:`patch_easyr1` puts them in place, in every worker process; docs/integrations/easyr1.md says how Ray is told to.
Nothing here needs transformers, whose version EasyR1 holds below 5.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revisual_fast.integrations import seams
from revisual_fast.integrations.grouping import scatter
from revisual_fast.integrations.padded_loss import bounded, clipped_weight, differ_within, prepared
from revisual_fast.losses import PolicyObjective, TokenBatch, counted
from revisual_fast.ops import gather_rows, linear_logprob

__all__ = ["compute_policy_loss", "patch_easyr1", "unpatch_easyr1"]

ACTOR = "verl.workers.actor.dp_actor"
LOSS = (
    *("old_log_probs", "log_probs", "advantages", "response_mask", "clip_ratio_low", "clip_ratio_high"),
    *("clip_ratio_dual", "tau_positive", "tau_negative", "loss_type", "loss_avg_mode"),
)
FORWARD = ("self", "micro_batch", "temperature")
USED = ("actor_module", "log_probs_from_logits", "logits")
"""What the actor's forward has to use: the model, its logits, and a function of the actor's that takes them."""
LEFT = "revisual_fast: {} is left to EasyR1's own code"
_VERLS: dict[str, Any] = {}
"""What stood in the places before."""


def patch_easyr1() -> None:
    """Replace ``compute_policy_loss`` and ``DataParallelPPOActor._forward_micro_batch``; again is harmless.

    Raises SeamError, which names the place, where EasyR1 is not what this was written for.
    """
    if seams.patched("easyr1"):
        return
    try:
        actor = seams.seam(ACTOR)
        found = {
            "compute_policy_loss": seams.seam(f"{ACTOR}:compute_policy_loss", LOSS),
            "forward": seams.seam(f"{ACTOR}:DataParallelPPOActor._forward_micro_batch", FORWARD),
        }
    except seams.SeamError as error:
        raise seams.SeamError(f"this is not EasyR1 as of July 2026: {error}") from error
    used = found["forward"].__code__.co_names
    if missing := [name for name in USED if name not in used]:
        raise seams.SeamError(f"{ACTOR}:DataParallelPPOActor._forward_micro_batch does not use {', '.join(missing)}")
    _VERLS.update(found)
    seams.replace("easyr1", actor, "compute_policy_loss", compute_policy_loss)
    seams.replace("easyr1", actor.DataParallelPPOActor, "_forward_micro_batch", _forward_micro_batch)


def unpatch_easyr1() -> None:
    """Put EasyR1's own functions back."""
    seams.unpatch("easyr1")
    _VERLS.clear()


# Log-probs


def _forward_micro_batch(actor: Any, micro_batch: dict[str, Any], temperature: float) -> Tensor:
    """EasyR1's own method over a head that returns, in the place of logits, log-probs of response rows: [bs, resp].

    Zero where a response has no token. What the head cannot be asked for is left to EasyR1, with one warning.
    """
    original = _VERLS["forward"]
    head, reason = _head_of(actor)
    if reason is not None:
        seams.warn_once(LEFT.format(reason))
        return original(actor, micro_batch, temperature)
    needed, labels = _rows_and_labels(micro_batch, actor.config.padding_free)
    forward = partial(_head_forward, head, needed, labels, temperature)
    with seams.placed(head, "forward", forward), seams.placed(actor, "log_probs_from_logits", _taken):
        return original(actor, micro_batch, temperature=1.0)  # the head has divided by it


def _head_of(actor: Any) -> tuple[Any, str | None]:
    """The model's head, and why it cannot be used."""
    if actor.config.ulysses_size > 1:
        return None, "sequence parallelism (ulysses_size > 1)"
    head = actor.actor_module.get_output_embeddings()
    head = getattr(head, "_fsdp_wrapped_module", head)
    if type(head) is not nn.Linear:
        return None, f"a head that is a {type(head).__name__}, not a linear layer"
    return head, None


def _rows_and_labels(micro_batch: dict[str, Any], padding_free: bool) -> tuple[Tensor, Tensor]:
    """[rows] bool, the rows of the hidden states that predict a response token; [rows] int64, the token after each."""
    ids, real = micro_batch["input_ids"], micro_batch["attention_mask"].bool()
    needed = torch.zeros_like(real)
    first = ids.shape[1] - micro_batch["responses"].shape[1]
    needed[:, first - 1 : -1] = real[:, first - 1 : -1] & real[:, first:]
    labels = ids.roll(-1, 1)
    return (needed[real], labels[real]) if padding_free else (needed.flatten(), labels.flatten())


def _head_forward(head: nn.Linear, needed: Tensor, labels: Tensor, temperature: float, hidden: Tensor) -> Tensor:
    """[..., D] -> [..., 1]: log-probs of the labels where needed, 0 elsewhere. Inside the model's forward, because FSDP
    gathers the weight for its time only."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    if len(rows) != len(needed):
        raise ValueError(f"the head gets {len(rows)} rows, the batch has {len(needed)}: unpatch_easyr1() and report it")
    if torch.promote_types(rows.dtype, head.weight.dtype) != head.weight.dtype:
        rows = rows.to(head.weight.dtype)
    index = needed.nonzero().flatten()
    of = (gather_rows(rows, index), head.weight, labels[index])
    logp, _ = linear_logprob(*of, bias=head.bias, temperature=float(temperature))
    return scatter(logp, index, (*hidden.shape[:-1], 1))


def _taken(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-probs are there already."""
    return logits.squeeze(-1)


# Loss


def compute_policy_loss(
    old_log_probs: Tensor,  # [bs, resp]
    log_probs: Tensor,  # [bs, resp]
    advantages: Tensor,  # [bs, resp]
    response_mask: Tensor,  # [bs, resp] bool, or 0 and 1
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_dual: float,
    tau_positive: float,
    tau_negative: float,
    loss_type: str,  # default | gspo | gspo_token | cispo | sapo
    loss_avg_mode: str,  # token | seq
    **kwargs: Any,
) -> tuple[Tensor, dict[str, float]]:
    """Loss (scalar, differentiable in ``log_probs``) and EasyR1's metrics; nothing outside of the mask matters.

    gspo and gspo_token with advantages that differ within a response are left to EasyR1, with one warning. Raises
    ValueError for an unknown mode.
    """
    mask = response_mask.bool()
    if loss_type in ("gspo", "gspo_token") and differ_within(advantages, mask):
        seams.warn_once(LEFT.format(f"{loss_type} with different advantages within a response"))
        settings = (clip_ratio_low, clip_ratio_high, clip_ratio_dual, tau_positive, tau_negative)
        verls = _VERLS["compute_policy_loss"]
        return verls(old_log_probs, log_probs, advantages, response_mask, *settings, loss_type, loss_avg_mode, **kwargs)
    objective = _objective(loss_type, clip_ratio_low, clip_ratio_high, clip_ratio_dual, tau_positive, tau_negative)
    weight = _weights(loss_avg_mode, mask, log_probs.dtype)
    logp, tokens = prepared(objective, log_probs, old_log_probs, advantages, mask, weight)
    near = bounded(logp, tokens) if loss_type in ("default", "sapo") else logp
    loss = objective(near, torch.zeros_like(logp), tokens)
    with torch.no_grad():
        metrics = _metrics(objective, logp, near, tokens)
        return loss, dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


def _objective(kind: str, low: float, high: float, dual: float, positive: float, negative: float) -> PolicyObjective:
    clips: dict[str, Any] = {"clip_low": low, "clip_high": high}
    if kind == "default":
        return PolicyObjective(**clips, dual_clip=dual)
    if kind in ("gspo", "gspo_token"):  # the same gradient where a response has one advantage
        return PolicyObjective(level="sequence", **clips, dual_clip=dual)
    if kind == "cispo":
        return PolicyObjective(surrogate=clipped_weight, **clips)
    if kind == "sapo":
        return PolicyObjective(surrogate="sapo", sapo_tau_pos=positive, sapo_tau_neg=negative)
    raise ValueError(f"loss_type={kind!r} is unknown; it is one of default, gspo, gspo_token, cispo, sapo")


def _weights(mode: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[bs, resp] weight of every token in the mean."""
    if mode not in ("token", "seq"):
        raise ValueError(f"loss_avg_mode={mode!r} is unknown; it is token or seq")
    if mode == "token":
        return mask.to(dtype) / (mask.sum() + 1e-8)
    return mask.to(dtype) / (len(mask) * (mask.sum(1, keepdim=True) + 1e-8))


def _metrics(o: PolicyObjective, logp: Tensor, near: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    assert tokens.mask is not None
    assert tokens.weight is not None
    assert tokens.advantages is not None
    of = tokens.mask.sum()

    def mean(values: Tensor) -> Tensor:
        return counted(values.float(), tokens.mask).sum() / (of + 1e-8)

    entropy = -(tokens.weight * logp).sum() * of / (of + 1e-8)
    metrics = {"ppo_kl": mean(-o.log_ratio(logp, tokens)), "entropy_loss": entropy}
    if o.surrogate == "clip":
        ratio, minus = o.ratio(near, tokens), -tokens.advantages
        free, held = minus * ratio, minus * ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
        assert o.dual_clip is not None
        lower = (torch.maximum(free, held) > minus * o.dual_clip) & (minus > 0)
        metrics |= {"pg_clipfrac_higher": mean(held > free), "pg_clipfrac_lower": mean(lower)}
    return metrics
