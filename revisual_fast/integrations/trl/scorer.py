"""A model's packed passes over padded batches: log-probs, entropies, and the loss with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revisual_fast.integrations.grouping import GroupedRows, Images, group_rows, scatter
from revisual_fast.losses import Objective, TokenBatch
from revisual_fast.ops import linear_logprob, linear_policy_loss
from revisual_fast.packing import Group, PackedBatch, plan_micro_batches
from revisual_fast.policy.borrowed import BorrowedPolicy

__all__ = ["Scorer", "scorer_problem"]

IMAGES = ("pixel_values", "image_grid_thw", "num_images")
"""What TRL hands over of Qwen's images; ``mm_token_type_ids`` follow from the ids."""


def scorer_problem(model: Any) -> str | None:
    """Why the passes of ``model``, perhaps in a peft wrapper, cannot be packed, or None."""
    from revisual_fast.policy.families import family_for

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    adapters = getattr(model, "peft_config", {}).values()
    if any(
        getattr(config, name, False) for config in adapters for name in ("is_prompt_learning", "is_adaption_prompt")
    ):
        return "the adapter adds tokens to the prompt"
    try:
        family_for(base.config.model_type).check(base.config)
    except ValueError as error:
        return str(error)
    if hasattr(base.model, "visual") and _is_changed(base.model):
        return f"somebody listens to or has replaced the forward of {type(base.model).__name__}, which is not called"
    if len(set(getattr(base, "hf_device_map", {}).values())) > 1:
        return "device_map lays the model over several devices"
    if not isinstance(base.get_output_embeddings(), nn.Linear):
        return f"the head is a {type(base.get_output_embeddings()).__name__}, not a linear layer"
    return None


def _is_changed(backbone: nn.Module) -> bool:
    """Whether a vision-language model's backbone does more than transformers': packed passes call its two towers."""
    own = type(backbone).forward.__module__.startswith("transformers.models.") and "forward" not in vars(backbone)
    return not own or bool(backbone._forward_hooks or backbone._forward_pre_hooks)


@dataclass(frozen=True)
class Scored:
    """What a packed pass gives for a padded batch."""

    logp: Tensor  # [B, C] fp32, 0 where there is no token
    entropy: Tensor  # [B, C]


class Scorer:
    """Packed passes of one model. ``dtype`` is that of the products where the weights have another: autocast's.

    ``head_dtype`` is what the head is multiplied in; None: as the rest.
    """

    def __init__(
        self,
        model: Any,
        temperature: float,
        *,
        attention: str = "auto",
        dtype: torch.dtype | None = None,
        head_dtype: torch.dtype | None = None,
    ):
        self.policy = BorrowedPolicy(model, attention=attention, dtype=dtype)
        self.temperature, self.head_dtype = temperature, head_dtype

    def group(self, input_ids: Tensor, attention_mask: Tensor, columns: int, features: dict[str, Any]) -> GroupedRows:
        """The batch's groups. Raises ValueError for one that cannot be packed, with the reason."""
        unknown = sorted(k for k, v in features.items() if v is not None and k not in (*IMAGES, "mm_token_type_ids"))
        if unknown:
            raise ValueError(f"the model takes {', '.join(unknown)}")
        given = [x for name in IMAGES if (x := features.get(name)) is not None]
        if len(given) not in (0, len(IMAGES)) and features.get("pixel_values") is not None:
            raise ValueError("images come without image_grid_thw or num_images")
        images = Images(*given) if len(given) == len(IMAGES) else None
        made = group_rows(input_ids, attention_mask, columns, images)
        family, image = self.policy.family, self.policy.family.image_token_id
        for group in made.groups if image is not None else ():
            slots = int(torch.eq(group.prompt.ids, int(image or 0)).sum())
            features_given = int(group.prompt.grids.prod(1).sum()) // family.merge_size**2
            if slots != features_given:
                raise ValueError(f"a prompt has {slots} image tokens, and its images give {features_given} features")
        if image is not None and any((c == image).any() for group in made.groups for c in group.completions):
            raise ValueError("a completion holds image tokens")
        return made

    def score(self, through: nn.Module, grouped: GroupedRows, budget: int) -> Scored:
        """Log-probs and entropies of all completions, at ``budget`` packed tokens a pass, those of the model's head.

        Differentiable where gradients are on.
        """
        parts = plan_micro_batches(grouped.groups, budget, cost=lambda group: float(group.tokens("shared")))[0]
        index, logp, entropy = [], [], []
        for part in parts:
            index.append(grouped.index([grouped.rows[g][i] for g, members in part.parts for i in members]))
            made = self.policy.run(through, partial(self._logprob, part.of(grouped.groups)))
            logp.append(made[0])
            entropy.append(made[1])
        places = torch.cat(index).to(self.policy.device)
        return Scored(*(scatter(torch.cat(values), places, grouped.shape) for values in (logp, entropy)))

    def _logprob(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        batch = self.policy.pack(groups)
        hidden, weight, bias = self._head(self.policy.hidden(batch))
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_logprob(hidden, weight, batch.targets, bias=bias, temperature=self.temperature)

    def _head(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden [N, D] in the dtype of the product, the head's weight [V, D] in that or a wider one, and its bias."""
        hidden = hidden.to(self.head_dtype or self.policy.compute_dtype)
        weight = self.policy.head_weight
        return hidden, weight.to(torch.promote_types(weight.dtype, hidden.dtype)), self.policy.head_bias

    def loss(
        self,
        through: nn.Module,
        grouped: GroupedRows,
        mask: Tensor,  # [B, C]: the tokens that are trained on
        values: dict[str, Tensor | None],  # a field of TokenBatch -> [B, C]
        objective: Callable[[Tensor], Objective],  # from the places [N] of the rows in a flat [B, C]
    ) -> tuple[Tensor, Scored]:
        """The loss of the batch in one packed pass, its gradient computed with it where gradients are on.

        Tokens that ``mask`` leaves out are part of the sequences, but have no target.
        """
        places = grouped.index([r for rows in grouped.rows for r in rows])
        trained = mask.bool().flatten().cpu()[places]
        index = places[trained].to(self.policy.device)
        tokens = {k: None if v is None else v.expand(grouped.shape).flatten()[index] for k, v in values.items()}

        def work() -> tuple[Tensor, Tensor, Tensor]:
            batch = _only(self.policy.pack(grouped.groups), trained)
            hidden, weight, bias = self._head(self.policy.hidden(batch))
            of = TokenBatch(**{"advantages": None, **tokens}, cu_seqlens=batch.cu_seqlens)
            with torch.autocast(hidden.device.type, enabled=False):
                out = linear_policy_loss(
                    hidden, weight, batch.targets, of, objective(index), bias=bias, temperature=self.temperature
                )
            return out.loss, out.logp, out.entropy

        loss, logp, entropy = self.policy.run(through, work)
        return loss, Scored(*(scatter(x, index, grouped.shape) for x in (logp, entropy)))


def _only(batch: PackedBatch, trained: Tensor) -> PackedBatch:
    """The batch with those of its targets that are ``trained`` [N], on the host."""
    if trained.all():
        return batch
    keep = trained.nonzero().flatten().to(batch.rows.device)
    counts = torch.nn.functional.pad(trained.cumsum(0), (1, 0))
    return replace(
        batch,
        rows=batch.rows[keep],
        targets=batch.targets[keep],
        sequence_ids=batch.sequence_ids[keep],
        cu_seqlens=counts[batch.cu_seqlens.long()].int(),
    )
