"""The policy: a model run over packed rows.

``Policy.hidden`` gives the hidden states of exactly the rows that have a target, which is what the fused loss takes.
The vision tower runs once per distinct image of the batch; a frozen one not even that, if the features are still known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from revisual_fast.kernels.embed import pack_embeddings
from revisual_fast.kernels.gather import gather_rows
from revisual_fast.packing import Group, Layout, PackedBatch, pack_groups, to_device
from revisual_fast.policy.attention import NAME, AttentionPlan, autocast_dtype, make_plan, pick_attention
from revisual_fast.policy.families import Family, family_for
from revisual_fast.policy.vision_cache import CACHE_BYTES, VisionCache
from revisual_fast.ranges import ranged, span

__all__ = ["Policy"]


class Policy:
    """A model of a supported family, its text tower switched to packed attention.

    ``model`` is a transformers model or a peft wrapper around one. Its device and dtype are taken as they are.
    ``attention`` is ``auto`` or one of ``policy.attention.BACKENDS``; ``cache_bytes`` bounds the image features that
    are kept on the model's device. Raises ValueError for a family that is not supported or an attention that cannot
    run.
    """

    def __init__(self, model: Any, *, attention: str = "auto", cache_bytes: int = CACHE_BYTES):
        self.model = model
        self.base = model.get_base_model() if hasattr(model, "peft_config") else model
        self.family: Family = family_for(self.base.config.model_type)(self.base)
        self.family.text.config._attn_implementation = NAME
        self.attention, _ = pick_attention(attention, self.device, self.head_weight.dtype)
        self.images = VisionCache(cache_bytes)
        self.writing = Lock()  # held while an optimizer changes the weights, for whoever reads them in another thread
        self._again: dict[str, Tensor | None] = {}  # images that a trained tower will see again, before its next update

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

    @property
    def compute_dtype(self) -> torch.dtype:
        """What products are computed in: autocast's dtype where it is on, else the head's."""
        return autocast_dtype(self.device.type) or self.head_weight.dtype

    @property
    def vision_trained(self) -> bool:
        """Whether the model has a vision tower with something to train in it."""
        visual = self.family.visual
        return visual is not None and any(p.requires_grad for p in visual.parameters())

    def freeze_vision(self) -> None:
        """Take the vision tower out of training. Raises ValueError if the model has none to freeze."""
        vision = [p for n, p in self.model.named_parameters() if self.family.is_vision(n)]
        if not vision:
            raise ValueError("freeze_vision: this model has no vision parameters")
        for parameter in vision:
            parameter.requires_grad_(False)
        _without_dropout(self.family.visual)  # its features are kept, so they must not be one draw of a mask

    def without_dropout(self) -> None:
        """Switch dropout off for good: a ratio between two passes must measure the weights, not the masks."""
        _without_dropout(self.model)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, a LoRA policy computes what its base model would; any other policy is unchanged."""
        if self.base is self.model:
            yield
            return
        trained = [(p, p.requires_grad) for p in self.model.parameters()]
        with self.model.disable_adapter():
            yield
        for parameter, flag in trained:  # peft has made all adapters trainable, also those that were frozen
            parameter.requires_grad_(flag)

    @ranged("pack")
    def pack(self, groups: Sequence[Group], layout: Layout = "shared") -> PackedBatch:
        """Lay groups into one packed row on the policy's device."""
        family = self.family
        batch = pack_groups(
            [g.prompt for g in groups],
            [g.completions for g in groups],
            positions=family.positions,
            image_token_id=family.image_token_id,
            merge_size=family.merge_size,
            layout=layout,
        )
        return batch.to(self.device)

    @ranged("embeddings")
    def embed(self, batch: PackedBatch, features: Tensor | None) -> Tensor:
        """Input embeddings [1, T, D], the image ``features`` [distinct, D] in their places."""
        embedding: Any = self.family.embedding
        ids = batch.ids
        if _is_plain(embedding):
            table, padding_idx = embedding.weight, embedding.padding_idx
        else:  # what it gives becomes the table
            table, ids, padding_idx = embedding(ids), torch.arange(len(ids), device=ids.device), None
        taken = torch.full_like(ids, -1).index_copy(0, batch.image_rows, batch.image_index)
        return pack_embeddings(ids, table, features, taken, padding_idx=padding_idx)[None]

    def image_features(self, batch: PackedBatch) -> Tensor | None:
        """Features of the distinct images, [features, (1 + deepstack) * D], without a graph if the tower is frozen.

        A frozen tower runs for those images only whose features are not in the cache, and for each by itself: so its
        features do not depend, not even in the last bit, on the images beside it or on what was cached before.
        """
        if not batch.pixel_values:
            return None
        assert self.family.visual is not None
        if self.vision_trained:
            self.images.clear()  # should it be frozen later, its weights may have changed unseen
            return self._encode_once(batch) if self._again else self._encode(batch, range(len(batch.image_keys)))
        with torch.no_grad():
            return self.images.features(self.family.visual, batch.image_keys, lambda i: self._encode(batch, [i]))

    @contextmanager
    def keeping_images(self, keys: Iterable[str]) -> Iterator[None]:
        """Inside, nothing is trained: the images ``keys`` are encoded once, though the tower may not be frozen."""
        self._again = dict.fromkeys(keys)
        try:
            yield
        finally:
            self._again = {}

    def _encode_once(self, batch: PackedBatch) -> Tensor:
        """The features of the batch's images, without those that are known from an earlier batch."""
        known = {key: features for key in batch.image_keys if (features := self._again.get(key)) is not None}
        new = [i for i, key in enumerate(batch.image_keys) if key not in known]
        if new:
            sizes = (batch.grids[new].prod(1) // self.family.merge_size**2).tolist()
            made = dict(zip((batch.image_keys[i] for i in new), self._encode(batch, new).split(sizes), strict=True))
            self._again |= {key: features.clone() for key, features in made.items() if key in self._again}
            known |= made
        return torch.cat([known[key] for key in batch.image_keys])

    @ranged("vision tower")
    def _encode(self, batch: PackedBatch, images: Sequence[int]) -> Tensor:
        """The features of some of the batch's images."""
        assert self.family.visual is not None
        pixels = torch.cat([batch.pixel_values[i] for i in images])
        pixels = to_device(pixels.to(next(self.family.visual.parameters()).dtype), self.device)
        return self.family.encode_images(pixels, batch.grids[list(images)])

    def states(self, batch: PackedBatch, plan: AttentionPlan | None = None) -> Tensor:
        """Final hidden states of every packed row, [T, D]."""
        plan = plan or self.plan(batch)
        features, deepstack, width = self.image_features(batch), None, self.family.deepstack
        if features is not None and width:  # deeper layers take features of their own
            features, deep = features.tensor_split([features.shape[1] // (1 + width)], 1)
            rows = gather_rows(deep.contiguous(), batch.image_index)
            features, deepstack = features.contiguous(), (batch.image_rows, rows.unflatten(1, (width, -1)))
        embeddings = self.embed(batch, features)
        with span("text tower"):
            return self.family.run_text(embeddings, batch.positions, plan, deepstack)

    def plan(self, batch: PackedBatch) -> AttentionPlan:
        """How the rows of ``batch`` attend."""
        return make_plan(self.attention, batch.segments, self.device, self.compute_dtype)

    @ranged("forward")
    def hidden(self, batch: PackedBatch) -> Tensor:
        """Final hidden states of the rows that predict a target, [N, D], in the order of ``batch.targets``."""
        return gather_rows(self.states(batch), batch.rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> fp32 logits [n, V]; for a few rows only (sampling)."""
        return self.family.head(hidden).float()


def _without_dropout(part: nn.Module | None) -> None:
    for module in [] if part is None else part.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _is_plain(embedding: Any) -> bool:
    """Whether it is a look-up and nothing else: no adapter, no renormalised rows, nobody who listens in."""
    if type(embedding) is not nn.Embedding:
        return False
    hooks = (embedding._forward_hooks, embedding._forward_pre_hooks, embedding._backward_hooks)
    special = embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse
    return not special and not any(hooks) and not embedding._backward_pre_hooks
