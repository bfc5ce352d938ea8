"""AdamW with fp32 master copies of half-precision weights, a learning rate per tower, and a state without pickle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from revisual_fast.config import OptimizerConfig
from revisual_fast.distributed import owners, world
from revisual_fast.ranges import ranged, span

__all__ = ["Optimizer", "held_bytes", "lr_factor"]


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

    Among several ranks, each has the master copies and AdamW's state of its own share of the parameters (ZeRO stage 1,
    arXiv 1910.02054): gradients are summed to the rank that owns their parameter, and its new weights go to all.
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
        self.world = world()
        self.owner = owners(((n, p.numel()) for n, p in self.parameters.items()), self.world.size)
        self.masters = {
            n: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for n, p in self.parameters.items()
            if self.owner[n] == self.world.rank
        }
        self.sums: dict[str, nn.Parameter | _Sum] = {}  # what holds the gradient, in fp32
        for name, parameter in self.parameters.items():
            if parameter.dtype == torch.float32:
                self.sums[name] = parameter
            else:
                self.sums[name] = self.masters.get(name, _Sum())
                parameter.register_post_accumulate_grad_hook(_adds_to(self.sums[name]))
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
        self._sum_up()
        norm = self._clip()
        if math.isfinite(norm):
            for group, lr in zip(self.adamw.param_groups, self.base_lrs, strict=True):
                group["lr"] = lr * factor
            self.adamw.step()
            self._write_back()
        self.zero_grad()
        return norm

    @torch.no_grad()
    def _sum_up(self) -> None:
        """Every owner has the sum of all ranks' gradients; a parameter that has none on any rank keeps none."""
        if self.world.size == 1:
            return
        there = torch.tensor([held.grad is not None for held in self.sums.values()], dtype=torch.int32)
        with span("gradients"):
            for (name, held), count in zip(self.sums.items(), self.world.sum(there).tolist(), strict=True):
                if not count:
                    continue
                if held.grad is None:
                    held.grad = torch.zeros_like(self.parameters[name], dtype=torch.float32)
                held.grad = held.grad.contiguous()
                self.world.reduce(held.grad, self.owner[name])
                if name not in self.masters:
                    held.grad = None

    def _clip(self) -> float:
        """The norm of all gradients, which are scaled down where it is too large."""
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.world.size > 1:
            norm = self.world.sum(norm.double().square().to(next(iter(self.parameters.values())).device)).sqrt().float()
        nn.utils.clip_grads_with_norm_(self.masters.values(), self.config.max_grad_norm, norm)
        return float(norm)

    @torch.no_grad()
    def _write_back(self) -> None:
        with span("weights"):
            for name, parameter in self.parameters.items():
                master = self.masters.get(name)
                if master is not None and master is not parameter:
                    parameter.copy_(master)
                self.world.broadcast(parameter.data, self.owner[name])

    def zero_grad(self) -> None:
        for held in self.sums.values():
            held.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name: ``exp_avg/<name>``, ``step/<name>``, ``master/<name>``...; of
        this rank's share."""
        tensors = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
            if master is not self.parameters[name]:
                tensors[f"master/{name}"] = master.detach()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Undo :meth:`state_tensors`, of all ranks together. Raises ValueError if a tensor belongs to no trainable
        parameter."""
        for full, tensor in tensors.items():
            key, name = full.split("/", 1)
            if name not in self.parameters:
                raise ValueError(f"the checkpoint holds {full!r}, but {name!r} is not a trainable parameter now")
            if name not in self.masters:
                continue
            master = self.masters[name]
            if key == "master":
                master.copy_(tensor)
            else:
                self.adamw.state[master][key] = tensor.to(master.device)
        self._write_back()


def held_bytes(parameters: Iterable[nn.Parameter], ranks: int = 1) -> int:
    """What training takes on a rank besides activations: all weights and, of those that are trained, the gradient in
    fp32, AdamW's two moments and (of weights that are not fp32) the master copy, divided among the ranks."""
    total = 0
    for parameter in parameters:
        total += parameter.numel() * parameter.itemsize
        if parameter.requires_grad:
            divided = 8 if parameter.dtype == torch.float32 else 12
            total += parameter.numel() * 4 + parameter.numel() * divided // ranks
    return total


class _Sum:
    """Holds the gradient of a parameter that another rank updates."""

    grad: Tensor | None = None


def _adds_to(held: nn.Parameter | _Sum) -> Callable[[Tensor], None]:
    """A hook that moves a parameter's gradient to where it is added up, in fp32, as soon as a backward pass has made
    it."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        # a gradient to be added is widened on the way
        held.grad = parameter.grad.float() if held.grad is None else held.grad.add_(parameter.grad)
        parameter.grad = None

    return add
