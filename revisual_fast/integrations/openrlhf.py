"""OpenRLHF's actor without logits: ``patch_openrlhf()`` before the trainer is made, in the processes that train.

One place is replaced, ``openrlhf.models.actor.Actor.forward``: policy, old, reference and, in SFT and DPO, all other
log-probs come from it. ``PolicyLoss`` works on ``[B, A]`` numbers and stays OpenRLHF's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revisual_fast.integrations.head import head_problem
from revisual_fast.integrations.seams import check_version, replace, seam, warn_once
from revisual_fast.integrations.transformers import IGNORE, score_tokens

__all__ = ["patch_openrlhf"]

FORWARD = (
    *("self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits", "return_logprobs"),
    *("ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs"),
)


def patch_openrlhf() -> None:
    """Let every ``Actor`` of OpenRLHF take its log-probs and entropies from the fused head; twice is as good as once.

    Undone by ``revisual_fast.integrations.unpatch("openrlhf")``. Raises ImportError where openrlhf is missing,
    SeamError for a version or a signature that this was not written for.
    """
    check_version("openrlhf")
    actor = seam("openrlhf.models.actor:Actor")
    seam("openrlhf.models.actor:Actor.forward", FORWARD)
    unpad = seam("openrlhf.models.ring_attn_utils:unpad_and_slice_tensor", ("sequences", "attention_mask"))
    pad = seam("openrlhf.models.ring_attn_utils:gather_and_pad_tensor", ("tensor", "indices", "batch", "seqlen"))
    originals: list[Any] = []

    def forward(
        self: Any,
        sequences: Tensor,  # [B, T] int64
        action_mask: Tensor | None = None,  # [B, A] of the last A tokens
        attention_mask: Tensor | None = None,  # [B, T]
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: list[int] | None = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:
        """Log-probs ``[B, A]`` fp32, or ``[B, T - 1]`` without ``action_mask``; with ``return_output`` the output, too.

        Only tokens of ``action_mask`` (without it, of ``attention_mask``) are scored; others are 0, in the entropy too.
        """
        problem = _problem(self, wants_logits=action_mask is None and not return_logprobs)
        if problem is not None:
            warn_once(f"revisual_fast: OpenRLHF's own Actor.forward runs: {problem}")
            options: dict[str, Any] = {"return_output": return_output, "allgather_logits": allgather_logits}
            options |= {"return_logprobs": return_logprobs, "ring_attn_group": ring_attn_group}
            options |= {"packed_seq_lens": packed_seq_lens, "return_entropy": return_entropy, **mm_inputs}
            return originals[0](self, sequences, action_mask, attention_mask, **options)
        if return_entropy and not return_output:
            raise ValueError("return_entropy=True needs return_output=True: the entropy is part of the output")
        packed = getattr(self, "packing_samples", False)
        places = _Places(unpad, pad, sequences, attention_mask, ring_attn_group, packed)
        inputs = places.inputs(_targets(sequences, attention_mask, action_mask))
        if getattr(self, "is_vlm", False) and not packed:
            inputs["position_ids"] = None  # the model's own: it knows the images
            mm_inputs = _with_token_types(self._vlm_config, sequences, mm_inputs)
        out = score_tokens(self.model, places.targets, temperature=self.temperature, **inputs, **mm_inputs)
        logp, entropy = places.batch(out.logp), places.batch(out.entropy)
        out["logp"], out["entropy"] = logp, entropy
        if action_mask is not None:
            logp = logp[:, -action_mask.shape[1] :] * action_mask.float()
        return (logp, out) if return_output else logp

    originals.append(replace("openrlhf", actor, "forward", forward))


def _problem(actor: Any, wants_logits: bool) -> str | None:
    """Why OpenRLHF's own code has to run, or None."""
    if wants_logits:
        return "a caller wants the logits themselves"
    return head_problem(actor.model, "ds.zero_stage 3 has partitioned the head (use stage 2)")


def _targets(sequences: Tensor, attention_mask: Tensor | None, action_mask: Tensor | None) -> Tensor:
    """``[B, T]``: what each position predicts, where somebody asks for it."""
    targets = torch.roll(sequences, -1, dims=1)
    counts = torch.zeros_like(targets, dtype=torch.bool)
    if action_mask is not None:
        counts[:, -1 - action_mask.shape[1] : -1] = action_mask.bool()
    elif attention_mask is not None:
        counts[:, :-1] = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    else:
        counts[:, :-1] = True
    return targets.masked_fill(~counts, IGNORE)


def _with_token_types(config: Any, sequences: Tensor, mm_inputs: dict[str, Any]) -> dict[str, Any]:
    """What a processor says of a prompt's tokens, for completions as well: 1 an image, 2 a video, else 0."""
    if not mm_inputs:
        return mm_inputs
    kinds = (sequences == config.image_token_id).int()
    video = getattr(config, "video_token_id", None)
    if video is not None:
        kinds = kinds.masked_fill(sequences == video, 2)
    return {**mm_inputs, ("mm_token_type_ids" if "image_grid_thw" in mm_inputs else "token_type_ids"): kinds}


class _Places:
    """A batch ``[B, T]`` as the model gets it: as it is, or without padding in one row ``[1, L]``."""

    def __init__(self, unpad: Any, pad: Any, sequences: Tensor, mask: Any, group: Any, packed: bool) -> None:
        self.unpad, self.pad, self.sequences, self.mask = unpad, pad, sequences, mask
        self.group, self.packed = group, packed
        self.targets = sequences

    def inputs(self, targets: Tensor) -> dict[str, Any]:
        if not self.packed:
            self.targets = targets
            positions = None if self.mask is None else (self.mask.long().cumsum(-1) - 1).masked_fill(self.mask == 0, 1)
            return {"input_ids": self.sequences, "attention_mask": self.mask, "position_ids": positions}
        ids, positions, _, self.filled, self.indices = self.unpad(self.sequences, self.mask, self.group)
        self.targets, *_ = self.unpad(targets, self.mask, self.group)
        return {"input_ids": ids, "attention_mask": None, "position_ids": positions}

    def batch(self, values: Any) -> Tensor:
        """``[B, T - 1]``."""
        if self.packed:
            values = self.pad(values, self.group, self.filled, self.indices, *self.sequences.shape)
        return values[:, :-1]
