"""The decoder as the packed policy sees it: what all families share, and the families without a vision tower."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from types import FunctionType, MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import SiLUActivation

from revisual_fast.packing.cost import ModelShape
from revisual_fast.policy.families.shapes import model_shape

__all__ = ["Family", "TextOnly"]

Rotary = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q [1, H, T, d], k [1, Hkv, T, d], cos [1, T, d], sin [1, T, d]) -> (q, k)."""


class Family:
    """Names the parts of a transformers model (a peft wrapper's base model works as well).

    The model's RMSNorms compute ``weight * (x / rms(x)).to(x.dtype)`` and its MLPs
    ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``. Raises ValueError for a configuration :meth:`check` refuses.
    """

    loader: ClassVar[Any]
    """The class of transformers that loads such a model."""
    image_token_id: int | None = None
    merge_size: int = 1
    deepstack: int = 0
    """Layers of the text tower that take image features of their own."""

    def __init__(self, model: Any):
        self.check(model.config)
        self.model = model

    @classmethod
    def check(cls, config: Any) -> None:
        """Raises ValueError for a model whose attention is not causal over everything before or drops some of it, or
        whose rotation depends on the length of the row: none would be the same in a packed row."""
        text = config.get_text_config()
        if getattr(text, "attention_dropout", 0):
            raise ValueError(
                f"{config.model_type} with attention_dropout {text.attention_dropout} is not supported: packed "
                "attention drops nothing; set it to 0 in the model's config.json"
            )
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            raise ValueError(
                f"{config.model_type} with a sliding window is not supported: packed attention has no window; "
                "set use_sliding_window to false in the model's config.json if no text is longer than the window"
            )
        kind = (text.rope_parameters or {}).get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"{config.model_type} with rope_type {kind!r} is not supported: its rotation depends on the length of "
                "the row, and a packed row holds many sequences; yarn, linear and llama3 do not depend on it"
            )

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes that cost and memory estimates need."""
        return model_shape(self.model.config)

    @property
    def visual(self) -> nn.Module | None:
        """The vision tower with its merger; None if there is none."""
        return None

    @property
    def text(self) -> Any:
        """The text tower, embedding to final norm."""
        raise NotImplementedError

    @property
    def embedding(self) -> nn.Module:
        return self.text.embed_tokens

    @property
    def head(self) -> nn.Linear:
        return self.model.lm_head

    def attentions(self) -> list[Any]:
        """Every attention module of the model; each has a ``config``."""
        return [layer.self_attn for layer in self.text.layers]

    def norms(self) -> list[Any]:
        """Every RMSNorm of the model; each has ``weight`` and ``variance_epsilon``."""
        return [module for module in self.model.modules() if type(module) is type(self.text.norm)]

    def swiglu_mlps(self) -> list[Any]:
        """Every MLP whose ``act_fn`` is SiLU."""
        silu = (nn.SiLU, SiLUActivation)
        return [mlp for mlp in self._mlps() if isinstance(mlp.act_fn, silu)]

    def _mlps(self) -> list[Any]:
        return [layer.mlp for layer in self.text.layers]

    def use_rotary(self, rotary: Rotary) -> int:
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
                    f"this version of transformers has no {name} in its {type(layer.self_attn).__name__}: set "
                    "model.liger_kernels to false, or install transformers 5.17 to 5.19"
                )
            scope = {**forward.__globals__, name: rotary}
            own = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            layer.self_attn.forward = MethodType(own, layer.self_attn)
        return len(self.text.layers)

    def is_vision(self, name: str) -> bool:
        """Whether a parameter of this (qualified) name belongs to the vision tower."""
        return self.visual is not None and ".visual." in f".{name}"

    def positions(self, ids: Tensor, grids: Tensor) -> Tensor:
        """Positions of a prompt: ids [P], grids [I, 3] -> [3, P] int64; text counts on in all three axes."""
        return torch.arange(len(ids)).expand(3, -1)

    def encode_images(self, pixel_values: Tensor, grids: Tensor) -> Tensor:
        """pixel_values [patches, C], grids [I, 3] on the CPU -> features [M, (1 + deepstack) * D], image after image,
        M = sum(t*h*w) / merge²; the deepstack features stand to the right of the ordinary ones."""
        raise ValueError(f"{self.model.config.model_type}: this model has no vision tower; leave the images out")

    def run_text(
        self,
        embeddings: Tensor,  # [1, T, D]
        positions: Tensor,  # [4, 1, T]
        plan: Any,  # the attention
        deepstack: tuple[Tensor, Tensor] | None = None,  # rows [M'] int64 and features [M', deepstack, D]
    ) -> Tensor:
        """Final hidden states [T, D].

        No mask is built: transformers builds none for an attention that has no mask function registered under its name.
        """
        assert deepstack is None, "this family has no deepstack features"
        return self._run(embeddings, positions, plan)

    def _run(self, embeddings: Tensor, positions: Tensor, plan: Any, **more: Any) -> Tensor:
        output = self.text(inputs_embeds=embeddings, position_ids=positions, use_cache=False, packed=plan, **more)
        return output.last_hidden_state[0]


class TextOnly(Family):
    """``Qwen2ForCausalLM`` (Qwen2 and Qwen2.5), ``Qwen3ForCausalLM`` and ``LlamaForCausalLM``."""

    loader = AutoModelForCausalLM

    @property
    def text(self) -> Any:
        return self.model.model

    def run_text(
        self, embeddings: Tensor, positions: Tensor, plan: Any, deepstack: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """embeddings [1, T, D], positions [4, 1, T] (all alike) -> final hidden states [T, D]."""
        return super().run_text(embeddings, positions[0], plan, deepstack)
