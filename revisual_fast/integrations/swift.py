"""ms-swift's GRPO trainer without logits: ``patch_swift()`` before the trainer is made.

One place is replaced, ``GRPOTrainer._get_per_token_logps_and_entropies_single``: the log-probs of the policy, of the
old and the reference policy and of a local teacher come from it. Everything that is made of them stays ms-swift's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revisual_fast.integrations.head import head_problem
from revisual_fast.integrations.seams import check_version, replace, seam, warn_once
from revisual_fast.integrations.transformers import IGNORE, score_tokens

__all__ = ["patch_swift"]

TRAINER = "swift.rlhf_trainers.grpo_trainer:GRPOTrainer"
SINGLE = "_get_per_token_logps_and_entropies_single"


def patch_swift() -> None:
    """Let ms-swift's ``GRPOTrainer`` take log-probs and entropies from the fused head; twice is as good as once.

    Undone by ``revisual_fast.integrations.unpatch("swift")``. Raises ImportError where ms-swift is missing, SeamError
    for a version or a signature that this was not written for.
    """
    check_version("swift")
    trainer = seam(TRAINER)
    seam(f"{TRAINER}.{SINGLE}", ("self", "model", "model_inputs", "grpo_batch", "compute_entropy"))
    seam(f"{TRAINER}._unpad_logps_and_entropies", ("self", "logps", "entropies", "logits_to_keep", "batch_size"))
    spread = seam(
        "swift.rlhf_trainers.utils:pad_logps_back_to_batch",
        ("logps_rmpad", "logits_to_keep", "batch_size", "seq_lengths", "pad_value"),
    )
    originals: list[Any] = []

    def single(
        self: Any, model: Any, model_inputs: dict[str, Any], grpo_batch: Any, compute_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies ``[B, T]``, those of tokens that are not in ``completion_mask`` 0 or padding's.

        ``model_inputs["input_ids"]`` is ``[B, L]`` whose last T are scored, or, without padding, one row ``[1, L]``.
        """
        base = self.accelerator.unwrap_model(model)
        if (problem := _problem(self, base)) is not None:
            warn_once(f"revisual_fast: ms-swift's own log-probs are used: {problem}")
            return originals[0](self, model, model_inputs, grpo_batch, compute_entropy=compute_entropy)
        keep, lengths = grpo_batch.logits_to_keep, grpo_batch.seq_lengths
        counts = grpo_batch.completion_mask.bool()
        if self.template.padding_free:
            counts = _in_one_row(counts, spread, keep, lengths)
        ids = model_inputs["input_ids"]
        targets = torch.full_like(ids, IGNORE)
        targets[:, -keep - 1 : -1] = ids[:, -keep:].masked_fill(~counts, IGNORE)
        inputs = {name: value for name, value in model_inputs.items() if name != "logits_to_keep"}
        out = score_tokens(model, targets, base=base, temperature=self.temperature, **inputs)
        scores: list[Any] = [out[name][:, -keep - 1 : -1] for name in ("logp", "entropy")]
        scores[1] = scores[1] if compute_entropy else None
        if self.template.padding_free:
            return self._unpad_logps_and_entropies(*scores, keep, len(lengths), lengths, compute_entropy)
        return scores[0], scores[1]

    originals.append(replace("swift", trainer, SINGLE, single))


def _in_one_row(counts: Tensor, spread: Any, keep: int, lengths: Tensor) -> Tensor:
    """``[B, T]`` bool -> ``[1, keep]``: which of a row's last tokens count; ms-swift's ``spread`` says where."""
    place = torch.arange(1, keep + 1, device=counts.device)[None]
    places, _ = spread(place, logits_to_keep=keep, batch_size=len(lengths), seq_lengths=lengths, pad_value=0)
    if places.shape != counts.shape:  # it has put sequences into the row that are not in the batch
        return counts.new_ones(1, keep)
    row = counts.new_zeros(keep + 1).index_put((places.long()[counts],), counts.new_ones(()))
    return row[None, 1:]


def _problem(trainer: Any, base: Any) -> str | None:
    """Why ms-swift's own code has to run, or None."""
    if trainer.template.sequence_parallel_size > 1:
        return "sequence_parallel_size > 1 cuts sequences over devices"
    return head_problem(base, "deepspeed zero3 has partitioned the head (use zero2)")
