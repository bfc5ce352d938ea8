"""A policy over a model that another trainer owns, generates with and wraps.

Outside of a packed pass the model is as it was found: its attention, its masks, its vision tower. Inside, also where
gradient checkpointing computes a layer again during a backward pass, it attends as a :class:`Policy` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from revisual_fast.packing import PackedBatch
from revisual_fast.policy.attention import AttentionPlan, pick_attention
from revisual_fast.policy.families.vision import Windows
from revisual_fast.policy.model import Policy
from revisual_fast.policy.vision_cache import CACHE_BYTES

__all__ = ["BorrowedPolicy"]

_T = TypeVar("_T")
_METHODS = ("forward", "_deepstack_process")
"""What a family or this module replaces in a module."""


class BorrowedPolicy(Policy):
    """A :class:`Policy` that leaves the model to its owner; make at most one for each model.

    ``dtype`` is what attention computes in where that is not the weights' dtype: autocast's. Wrappers (DDP, accelerate,
    peft, FSDP) do their work in the model's forward, so a pass has to go through the outermost one: :meth:`run`.
    """

    def __init__(
        self, model: Any, *, attention: str = "auto", cache_bytes: int = CACHE_BYTES, dtype: torch.dtype | None = None
    ):
        self._before = [(m, {name: vars(m)[name] for name in _METHODS if name in vars(m)}) for m in model.modules()]
        before = [(c, c._attn_implementation) for c in _configs(model)]
        super().__init__(model, attention=attention, cache_bytes=cache_bytes)
        self.attention, self.why_attention = pick_attention(attention, self.device, dtype or self.head_weight.dtype)
        self._ours: list[tuple[Any, str]] = []
        for config, name in before:
            if config._attn_implementation != name:
                self._ours.append((config, config._attn_implementation))
                config._attn_implementation = name
        names = {id(config): name for config, name in self._ours}
        for module in self.family.attentions():
            _put_forward(module, partial(_attend, module.forward, module.config, names[id(module.config)]))
        _put_forward(self.base, partial(_run_or_forward, self.base.forward))

    def release(self) -> None:
        """Give the model back: every forward is its owner's again. The policy must not be used any more."""
        for module, methods in self._before:
            for name in _METHODS:
                vars(module).pop(name, None)
            vars(module).update(methods)

    def run(self, through: nn.Module, work: Callable[[], _T]) -> _T:
        """What ``work()`` returns, called inside the forward of ``through``: the model, or the outermost wrapper.

        A wrapper sees a keyword without tensors and hands it on; outputs pass it as those of any forward.
        """
        return through(revisual_fast_work=work)

    def states(self, batch: PackedBatch, plan: AttentionPlan | None = None) -> Tensor:
        with ExitStack() as stack:
            for config, name in self._ours:
                stack.enter_context(_implementation(config, name))
            return super().states(batch, plan)


def _configs(model: nn.Module) -> list[Any]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _put_forward(module: nn.Module, forward: partial[Any]) -> None:
    """``functools.partial``, unlike a closure, is copied with the module; generate() reads the wrapped signature."""
    vars(forward)["__wrapped__"] = module.forward
    module.forward = forward


def _attend(original: Callable[..., Any], config: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """An attention module's forward: ours where the call carries a plan for packed rows or windows."""
    if kwargs.get("packed") is None and not any(isinstance(x, Windows) for x in (*args, *kwargs.values())):
        return original(*args, **kwargs)
    with _implementation(config, name):
        return original(*args, **kwargs)


def _run_or_forward(
    original: Callable[..., Any], *args: Any, revisual_fast_work: Callable[[], Any] | None = None, **kwargs: Any
) -> Any:
    return original(*args, **kwargs) if revisual_fast_work is None else revisual_fast_work()


@contextmanager
def _implementation(config: Any, name: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
