"""Qwen2.5-VL as the packed policy sees it: embeddings, vision tower, text tower, head, M-RoPE positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Qwen2_5VL"]


class Qwen2_5VL:
    """Names the parts of a ``Qwen2_5_VLForConditionalGeneration`` (a peft wrapper's base model works as well)."""

    def __init__(self, model: Any):
        self.model = model
        self.image_token_id: int = model.config.image_token_id
        self.merge_size: int = model.config.vision_config.spatial_merge_size

    @property
    def visual(self) -> nn.Module:
        """The vision tower with its merger."""
        return self.model.model.visual

    @property
    def text(self) -> Any:
        """The text tower, embedding to final norm."""
        return self.model.model.language_model

    @property
    def embedding(self) -> nn.Module:
        return self.text.embed_tokens

    @property
    def head(self) -> nn.Linear:
        return self.model.lm_head

    def norms(self) -> list[Any]:
        """Every RMSNorm of both towers: ``weight * (x / rms(x)).to(x.dtype)`` with ``variance_epsilon``."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

        return [module for module in self.model.modules() if isinstance(module, Qwen2_5_VLRMSNorm)]

    def swiglu_mlps(self) -> list[Any]:
        """Every ``down_proj(silu(gate_proj(x)) * up_proj(x))`` of both towers."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP, Qwen2MLP

        mlps: list[Any] = [module for module in self.model.modules() if isinstance(module, (Qwen2_5_VLMLP, Qwen2MLP))]
        return [mlp for mlp in mlps if isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation"]

    def use_rotary(self, rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> int:
        """Let the text tower's attention rotate by ``rotary(q [1, H, T, d], k [1, Hkv, T, d], cos, sin) -> (q, k)``.

        cos and sin, each [1, T, d], hold the M-RoPE sections already, so an ordinary RoPE is right for packed rows and
        images. transformers looks the rotation up as a global of its module, which every model shares; so each layer
        gets its own forward with just that name bound to ``rotary``. Returns the number of layers. Raises ValueError
        for a version of transformers whose attention does it another way.
        """
        name = "apply_rotary_pos_emb"
        for layer in self.text.layers:
            forward = inspect.unwrap(type(layer.self_attn).forward)
            if name not in forward.__code__.co_names:
                raise ValueError(
                    f"this version of transformers has no {name} in its Qwen2.5-VL attention: set model.liger_kernels "
                    "to false, or install transformers 5.17 to 5.19"
                )
            scope = {**forward.__globals__, name: rotary}
            own = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            layer.self_attn.forward = MethodType(own, layer.self_attn)
        return len(self.text.layers)

    def is_vision(self, name: str) -> bool:
        """Whether a parameter of this (qualified) name belongs to the vision tower."""
        return ".visual." in f".{name}"

    def encode_images(self, pixel_values: Tensor, grids: Tensor) -> Tensor:
        """pixel_values [patches, C], grids [I, 3] -> features [sum(t*h*w)/merge², D], image after image."""
        visual: Any = self.visual
        return visual(pixel_values.to(visual.dtype), grid_thw=grids).pooler_output

    def run_text(self, embeddings: Tensor, positions: Tensor, plan: Any) -> Tensor:
        """embeddings [1, T, D], positions [4, 1, T] -> final hidden states [T, D]."""
        output = self.text(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask={"full_attention": None},
            use_cache=False,
            packed=plan,
        )
        return output.last_hidden_state[0]

    def positions(self, ids: Tensor, grids: Tensor) -> Tensor:
        """M-RoPE positions of a prompt with images: ids [P], grids [I, 3] -> [3, P] int64.

        Text counts on in all three axes; an image of a grid (t, h, w) spans t, h / merge, w / merge from the next free
        position, and the text after it goes on at the largest position + 1 (Qwen2-VL, arXiv 2409.12191, section 2.1).
        """
        is_image = (ids == self.image_token_id).tolist()
        parts, i, position, shapes = [], 0, 0, iter(grids.tolist())
        while i < len(is_image):
            if is_image[i]:
                t, h, w = next(shapes)
                h, w = h // self.merge_size, w // self.merge_size
                axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
                parts.append(torch.stack(axes).reshape(3, -1) + position)
                i += t * h * w
                position += max(t, h, w)
            else:
                end = next((j for j in range(i, len(is_image)) if is_image[j]), len(is_image))
                parts.append(torch.arange(position, position + end - i).expand(3, -1))
                position, i = position + end - i, end
        return torch.cat(parts, 1)
