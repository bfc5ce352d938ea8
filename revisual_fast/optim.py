"""AdamW with fp32 master copies of half-precision weights, a learning rate per tower, and a state without pickle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from revisual_fast.config import OptimizerConfig
from revisual_fast.ranges import ranged

__all__ = ["Optimizer", "lr_factor"]


def lr_factor(config: OptimizerConfig, update: int, total: int) -> float:
    """Share of the learning rate at the 0-based ``update`` of ``total``: linear warm-up, then the schedule."""
    warmup = math.ceil(config.warmup * total)
    if update < warmup:
        return (update + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    fall = progress if config.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - config.min_lr_ratio) * fall


class Optimizer:
    """Updates the trainable ones of ``named_parameters``; matrices decay, vectors (norms, biases) do not.

    Weights that are not fp32 get an fp32 master copy, which is what AdamW updates: at a learning rate of 1e-6 an update
    is far below the resolution of bf16 and would be lost. Their gradients are added up in fp32 as well, one backward
    pass after the other: a sum over many micro-batches stops growing in bf16.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        is_vision: Callable[[str], bool],
    ):
        self.config = config
        self.parameters = {n: p for n, p in named_parameters if p.requires_grad}
        if not self.parameters:
            raise ValueError("nothing to train: every parameter is frozen")
        self.masters = {
            n: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for n, p in self.parameters.items()
        }
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].register_post_accumulate_grad_hook(_adds_to(master))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            groups.setdefault((is_vision(name), master.ndim > 1), []).append(master)
        self.base_lrs = [(config.vision_lr or config.lr) if vision else config.lr for vision, _ in groups]
        self.adamw = torch.optim.AdamW(
            [
                {"params": members, "weight_decay": config.weight_decay if decays else 0.0}
                for (_, decays), members in groups.items()
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    @ranged("optimizer")
    def step(self, factor: float) -> float:
        """Clip, update with ``factor`` times the learning rates, and clear the gradients; returns the gradient norm.

        If the norm is not finite nothing is updated.
        """
        norm = float(nn.utils.clip_grad_norm_(self.masters.values(), self.config.max_grad_norm))
        if math.isfinite(norm):
            for group, lr in zip(self.adamw.param_groups, self.base_lrs, strict=True):
                group["lr"] = lr * factor
            self.adamw.step()
            self._write_back()
        self.zero_grad()
        return norm

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)

    def zero_grad(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name: ``exp_avg/<name>``, ``step/<name>``, ``master/<name>``..."""
        tensors = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
            if master is not self.parameters[name]:
                tensors[f"master/{name}"] = master.detach()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Undo :meth:`state_tensors`. Raises ValueError if a tensor belongs to no trainable parameter."""
        for full, tensor in tensors.items():
            key, name = full.split("/", 1)
            if name not in self.masters:
                raise ValueError(f"the checkpoint holds {full!r}, but {name!r} is not a trainable parameter now")
            master = self.masters[name]
            if key == "master":
                master.copy_(tensor)
            else:
                self.adamw.state[master][key] = tensor.to(master.device)
        self._write_back()


def _adds_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that moves a parameter's gradient into its master's, in fp32, as soon as a backward pass has made it."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        # a gradient to be added is widened on the way
        master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
        parameter.grad = None

    return add
