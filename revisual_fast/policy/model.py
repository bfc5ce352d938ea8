"""The policy: a multimodal model run over packed rows.

``Policy.hidden`` gives the hidden states of exactly the rows that have a target, which is what the fused loss takes;
the vision tower runs once per distinct image of the batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from revisual_fast.kernels.embed import pack_embeddings
from revisual_fast.kernels.gather import gather_rows
from revisual_fast.packing import Group, Layout, PackedBatch, pack_groups
from revisual_fast.policy.attention import NAME, AttentionPlan, SdpaPlan
from revisual_fast.policy.families import Qwen2_5VL, family_for
from revisual_fast.ranges import ranged, span

__all__ = ["Policy"]


class Policy:
    """A model of a supported family, its text tower switched to packed attention.

    ``model`` is a transformers model or a peft wrapper around one. Its device and dtype are taken as they are.
    """

    def __init__(self, model: Any):
        self.model = model
        self.base = model.get_base_model() if hasattr(model, "peft_config") else model
        self.family: Qwen2_5VL = family_for(self.base.config.model_type)(self.base)
        self.family.text.config._attn_implementation = NAME

    @property
    def device(self) -> torch.device:
        return self.family.head.weight.device

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        return self.family.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        return self.family.head.bias

    def freeze_vision(self) -> None:
        """Take the vision tower out of training. Raises ValueError if the model has none to freeze."""
        vision = [p for n, p in self.model.named_parameters() if self.family.is_vision(n)]
        if not vision:
            raise ValueError("freeze_vision: this model has no vision parameters")
        for parameter in vision:
            parameter.requires_grad_(False)

    def without_dropout(self) -> None:
        """Switch dropout off for good: a ratio between two passes must measure the weights, not the masks."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def without_adapter(self) -> AbstractContextManager[Any]:
        """Inside, a LoRA policy computes what its base model would; any other policy is unchanged."""
        return self.model.disable_adapter() if self.base is not self.model else nullcontext()

    @ranged("pack")
    def pack(self, groups: list[Group], layout: Layout = "shared") -> PackedBatch:
        """Lay groups into one packed row on the policy's device."""
        family = self.family
        batch = pack_groups(
            groups,
            positions=family.positions,
            image_token_id=family.image_token_id,
            merge_size=family.merge_size,
            layout=layout,
        )
        return batch.to(self.device)

    @ranged("embeddings")
    def embed(self, batch: PackedBatch) -> Tensor:
        """Input embeddings [1, T, D], image features in their places."""
        embedding: Any = self.family.embedding
        ids = batch.ids
        if _is_plain(embedding):
            table, padding_idx = embedding.weight, embedding.padding_idx
        else:  # what it gives becomes the table
            table, ids, padding_idx = embedding(ids), torch.arange(len(ids), device=ids.device), None
        features = None if batch.pixel_values is None else self.encode_images(batch)
        taken = torch.full_like(ids, -1).index_copy(0, batch.image_rows, batch.image_index)
        return pack_embeddings(ids, table, features, taken, padding_idx=padding_idx)[None]

    @ranged("vision tower")
    def encode_images(self, batch: PackedBatch) -> Tensor:
        """Features of the distinct images, without a graph if the tower is frozen."""
        assert batch.pixel_values is not None
        trained = any(p.requires_grad for p in self.family.visual.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return self.family.encode_images(batch.pixel_values, batch.grids)

    def states(self, batch: PackedBatch, plan: AttentionPlan | None = None) -> Tensor:
        """Final hidden states of every packed row, [T, D]."""
        plan = plan or SdpaPlan(batch.segments, self.device)
        embeddings = self.embed(batch)
        with span("text tower"):
            return self.family.run_text(embeddings, batch.positions, plan)

    @ranged("forward")
    def hidden(self, batch: PackedBatch) -> Tensor:
        """Final hidden states of the rows that predict a target, [N, D], in the order of ``batch.targets``."""
        return gather_rows(self.states(batch), batch.rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> fp32 logits [n, V]; for a few rows only (sampling)."""
        return self.family.head(hidden).float()


def _is_plain(embedding: Any) -> bool:
    """Whether it is a look-up and nothing else: no adapter, no renormalised rows, nobody who listens in."""
    if type(embedding) is not nn.Embedding:
        return False
    hooks = (embedding._forward_hooks, embedding._forward_pre_hooks, embedding._backward_hooks)
    special = embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse
    return not special and not any(hooks) and not embedding._backward_pre_hooks
