"""A policy over a model that another trainer owns, generates with and wraps.

Outside of a packed pass the model is as it was found: its attention, its masks, its vision tower. Inside, also where
gradient checkpointing computes a layer again during a backward pass, it attends as a :class:`Policy` does.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
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
_NUMBERS = itertools.count()


class _Loan:
    """What was replaced in a model, once for all who borrow it. It is kept in the model, and so copied with it."""

    def __init__(self, forward: Callable[..., Any]):
        self.key = f"_revisual_fast_loan_{next(_NUMBERS)}"  # of the model's attribute
        self.forward = forward  # the model's own
        self.replaced: list[tuple[nn.Module, str, Any, Any]] = []  # module, name, what it had (or None), what we put
        self.borrowers = 0


class BorrowedPolicy(Policy):
    """A :class:`Policy` that leaves the model to its owner; several may borrow one model.

    ``dtype`` is what attention computes in where that is not the weights' dtype: autocast's. Wrappers (DDP, accelerate,
    peft, FSDP) do their work in the model's forward, so a pass has to go through the outermost one: :meth:`run`.
    """

    def __init__(
        self, model: Any, *, attention: str = "auto", cache_bytes: int = CACHE_BYTES, dtype: torch.dtype | None = None
    ):
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        loan = next((x for x in vars(base).values() if isinstance(x, _Loan) and x.borrowers), None)
        before = [(c, c._attn_implementation) for c in _configs(model)]
        found = {(m, n): vars(m).get(n) for m in base.modules() for n in _METHODS}
        super().__init__(model, attention=attention, cache_bytes=cache_bytes)
        self.attention, _ = pick_attention(attention, self.device, dtype or self.head_weight.dtype)
        self._ours: list[tuple[Any, str]] = []
        for config, name in before:
            if config._attn_implementation != name:
                self._ours.append((config, config._attn_implementation))
                config._attn_implementation = name
        if loan is None:
            loan = self._lend(found)
        else:  # what a family has put into the model is there already
            for (module, name), own in found.items():
                _restore(module, name, own)
        loan.borrowers += 1
        self._release = weakref.finalize(self, _give_back, base, loan)
        self._release.atexit = False

    def _lend(self, found: dict[tuple[nn.Module, str], Any]) -> _Loan:
        """Replace what has to be replaced; ``found`` is what modules had of their own before."""
        names = {id(config): name for config, name in self._ours}
        for module in self.family.attentions():
            _put_forward(module, partial(_attend, module.forward, module.config, names[id(module.config)]))
        loan = _Loan(self.base.forward)
        setattr(self.base, loan.key, loan)
        forward = partial(_run_or_forward, loan.key)
        functools.update_wrapper(forward, type(self.base).forward)
        self.base.forward = MethodType(forward, self.base)  # accelerate takes it apart as it does a model's own
        for (module, name), own in found.items():
            if vars(module).get(name) is not own:
                loan.replaced.append((module, name, own, vars(module)[name]))
        return loan

    def release(self) -> None:
        """Give the model back: what nobody else borrows or has replaced since is its owner's again. The policy must not
        be used any more. Also done when the policy is collected."""
        self._release()

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
    key: str, self: Any, /, *args: Any, revisual_fast_work: Callable[[], Any] | None = None, **kwargs: Any
) -> Any:
    """A borrowed model's forward."""
    loan = vars(self)[key]
    if revisual_fast_work is None:
        return loan.forward(*args, **kwargs)
    if not loan.borrowers:
        raise ValueError("this model was given back: make another BorrowedPolicy")
    return revisual_fast_work()


def _give_back(base: nn.Module, loan: _Loan) -> None:
    """What is in somebody's wrapper by now stays there, and calls the model's own forward."""
    loan.borrowers -= 1
    if loan.borrowers:
        return
    for module, name, own, ours in loan.replaced:
        if vars(module).get(name) is ours:
            _restore(module, name, own)
    if vars(base).get("forward") is loan.forward or "forward" not in vars(base):
        vars(base).pop(loan.key, None)


def _restore(module: nn.Module, name: str, own: Any) -> None:
    if own is not None:
        setattr(module, name, own)
    elif name in vars(module):
        delattr(module, name)


@contextmanager
def _implementation(config: Any, name: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
