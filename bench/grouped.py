"""Work on vectors: advantages of groups, PAD's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import counts
from bench.checks import Outputs
from bench.harness import Call, Case, Problem, Variant
from bench.machine import ceilings
from bench.ours import by_device
from bench.plain import COMPILED, detached
from revisual_fast.kernels import groups

GROUP = 8  # completions a prompt
EPS = 1e-6
KERNELS = ("triton", "torch")


def advantages(case: Case) -> Problem:
    """Group normalisation of N rewards, 0 or 1 with a shaped part, in groups of 8 that are given by their bounds."""
    g = torch.Generator(case.device).manual_seed(0)
    uniform = torch.rand(2, case.n, generator=g, device=case.device)
    rewards = (uniform[0] > 0.5).float() + 0.1 * uniform[1]
    bounds = torch.arange(0, case.n + 1, GROUP, device=case.device)

    def plain_torch(rewards: Tensor) -> Tensor:
        grouped = rewards.view(-1, GROUP)
        return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + EPS)).view(-1)

    def call(function: Callable[[Tensor], Tensor]) -> Callable[[], Call]:
        return lambda: Call(lambda: detached(advantages=function(rewards)))

    def mine(backend: str) -> Callable[[], Call]:
        return call(lambda rewards: groups.group_advantages(rewards, bounds, eps=EPS, backend=backend))

    compiled: Any = torch.compile(plain_torch, dynamic=False)
    variants = [
        *by_device(case, mine, "groups of any size; the baselines take equal groups only", KERNELS),
        Variant("eager", "plain", call(plain_torch)),
        Variant("torch.compile", "plain", call(compiled), note=COMPILED, slow_start=True),
    ]

    def answer() -> Outputs:
        return {"advantages": plain_torch(rewards.double())}

    return Problem(case, variants, answer, 0, counts.advantages_bytes(case.n, case.n // GROUP), ceilings(case))


def pad_selection(case: Case) -> Problem:
    """PAD's choice of half the completions by ``|A|``, with the same uniform noise for all (arXiv 2506.04207)."""
    g = torch.Generator(case.device).manual_seed(0)
    advantages = torch.randn(case.n, generator=g, device=case.device)
    noise = torch.rand(case.n, generator=g, device=case.device, dtype=torch.float64).clamp_(min=EPS)
    rho, t_low, tau = 0.5, 0.1, 0.3

    def plain_torch() -> Tensor:
        size = advantages.abs()
        keys = size.double() / tau - (-noise.log()).log()
        keys = keys.masked_fill(size < t_low, -torch.inf)
        keep = torch.zeros_like(size, dtype=torch.bool)
        return keep.scatter_(0, keys.topk(case.n // 2).indices, True)

    def mine(backend: str) -> Callable[[], Call]:
        options: dict[str, Any] = {"rho": rho, "t_low": t_low, "tau": tau, "noise": noise, "backend": backend}
        return lambda: Call(lambda: {"keep": groups.pad_mask(advantages, **options).keep})

    note = "counts what falls outside the thresholds, too"
    eager = Variant("eager", "plain", lambda: Call(lambda: {"keep": plain_torch()}))
    variants = [*by_device(case, mine, note, KERNELS), eager]
    return Problem(case, variants, lambda: {"keep": plain_torch()}, 0, counts.pad_bytes(case.n), ceilings(case))
