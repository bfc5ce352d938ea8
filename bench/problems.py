"""Every op that is benchmarked: its inputs, its variants, its float64 answer, and the cases of the suites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import counts, machine, peers
from bench.checks import Outputs
from bench.harness import Call, Case, Problem, Variant
from bench.inputs import (
    KEPT,
    OBJECTIVE,
    SEQUENCES,
    clip_loss,
    cross_entropy,
    distinct_kept,
    make_inputs,
    reference,
    weighted_sum,
)
from bench.ours import (
    INTERPRETED,
    NAME,
    linear_loss,
    linear_values,
    logits_dtypes,
    loss_from_logits,
    ours,
    ratio_error,
    replay_loss,
)
from bench.plain import COMPILED, detached, plain
from revisual_fast import PolicyObjective
from revisual_fast.kernels import gather, groups

GROUP = 8  # completions a prompt
EPS = 1e-6


def linear_policy_loss(case: Case) -> Problem:
    """Forward and backward of the clip objective from hidden states."""
    x = make_inputs(case)
    loss_of = clip_loss(x)
    variants = [
        *ours(case, "linear_policy_loss", linear_loss(x, OBJECTIVE), logits_dtypes(case), ratio_error(x)),
        *plain(case, x, loss_of),
        *peers.trl_chunked(case, x, loss_of),
        *peers.liger_linear_grpo(case, x),
        *peers.liger_scaled_ce(case, x, loss_of),
        *peers.cut_cross_entropy(case, x, loss_of),
    ]
    return _head_problem(case, variants, lambda: reference(x, loss_of))


def linear_logprob(case: Case) -> Problem:
    """Log-prob and entropy, and the backward pass of the log-prob."""
    x = make_inputs(case)
    loss_of = weighted_sum(x)
    variants = [
        *ours(case, "linear_logprob", linear_values(x, loss_of), logits_dtypes(case)),
        *plain(case, x, loss_of),
        *peers.trl_chunked(case, x, loss_of),
        *peers.liger_scaled_ce(case, x, loss_of),
        *peers.cut_cross_entropy(case, x, loss_of),
    ]
    return _head_problem(case, variants, lambda: reference(x, loss_of))


def linear_cross_entropy(case: Case) -> Problem:
    """``linear_policy_loss`` with the objective "sft", against the peers that know only cross-entropy."""
    x = make_inputs(case)
    loss_of = cross_entropy(x)
    make = linear_loss(x, PolicyObjective.preset("sft"))
    variants = [
        *ours(case, "linear_policy_loss", make, logits_dtypes(case)),
        *plain(case, x, loss_of),
        *peers.liger_linear_ce(case, x),
        *peers.liger_scaled_ce(case, x, loss_of),
        *peers.cut_cross_entropy(case, x, loss_of),
        peers.quack_linear_ce(case, x),
    ]
    return _head_problem(case, variants, lambda: reference(x, loss_of))


def policy_loss_from_logits(case: Case) -> Problem:
    """Forward and backward of the clip objective from logits."""
    x = make_inputs(case)
    loss_of = clip_loss(x)
    settings: dict[str, dict[str, Any]] = {"": {"inplace": False}, ", in place": {"inplace": True}}
    variants = [
        *ours(case, "policy_loss_from_logits", loss_from_logits(x), settings),
        *plain(case, x, loss_of),
        peers.liger_triton_grpo(case, x),
    ]
    n_bytes = counts.logits_bytes(case.n, case.v, case.torch_dtype.itemsize)
    return Problem(case, variants, lambda: reference(x, loss_of), 0, n_bytes, _ceilings(case))


def sampling_mask_replay(case: Case) -> Problem:
    """The clip objective of log-probs renormalised over the ids that sampling kept; plain torch masks full logits."""
    x = make_inputs(case)
    loss_of = clip_loss(x)
    mine = ours(case, "linear_policy_loss", replay_loss(x), {"": {}})
    variants = [*mine, *plain(case, x, loss_of, entropy=False)]
    flops = counts.replay_flops(case.n, case.d, KEPT)
    n_bytes = counts.replay_bytes(case.n, case.d, case.v, KEPT, distinct_kept(x), case.torch_dtype.itemsize)
    return Problem(case, variants, lambda: reference(x, loss_of), flops, n_bytes, _ceilings(case))


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
        *_ours_by_device(case, mine, "groups of any size; the baselines take equal groups only"),
        Variant("eager", "plain", call(plain_torch)),
        Variant("torch.compile", "plain", call(compiled), note=COMPILED),
    ]

    def answer() -> Outputs:
        return {"advantages": plain_torch(rewards.double())}

    return Problem(case, variants, answer, 0, counts.advantages_bytes(case.n, case.n // GROUP), _ceilings(case))


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
    variants = [*_ours_by_device(case, mine, note), eager]
    n_bytes = counts.pad_bytes(case.n)
    return Problem(case, variants, lambda: {"keep": plain_torch()}, 0, n_bytes, _ceilings(case))


def gather_rows(case: Case) -> Problem:
    """N rows of N hidden states, in order, a fifth of them repeats as with shared prompts; and the gradient back."""
    g = torch.Generator(case.device).manual_seed(0)
    hidden = torch.randn(case.n, case.d, generator=g, device=case.device).to(case.torch_dtype).requires_grad_()
    upstream = torch.randn(case.n, case.d, generator=g, device=case.device).to(case.torch_dtype)
    rows = torch.arange(case.n, device=case.device) * 4 // 5

    def call(function: Callable[[Tensor], Tensor]) -> Callable[[], Call]:
        def run() -> Outputs:
            out = function(hidden)
            (d_hidden,) = torch.autograd.grad(out, [hidden], upstream)
            return detached(rows=out, d_hidden=d_hidden)

        return lambda: Call(run)

    variants = [
        *_ours_by_device(case, lambda backend: call(lambda hidden: gather.gather_rows(hidden, rows, backend))),
        Variant("eager", "plain", call(lambda hidden: hidden[rows])),
        Variant("index_select", "plain", call(lambda hidden: hidden.index_select(0, rows))),
    ]

    def answer() -> Outputs:
        d_hidden = torch.zeros(case.n, case.d, dtype=torch.float64, device=case.device)
        return {"rows": hidden.detach()[rows], "d_hidden": d_hidden.index_add_(0, rows, upstream.double())}

    n_bytes = counts.gather_bytes(case.n, len(rows.unique()), case.d, case.torch_dtype.itemsize)
    return Problem(case, variants, answer, 0, n_bytes, {"copy": machine.copy_ceiling(case.device)})


def _ours_by_device(case: Case, make: Callable[[str], Callable[[], Call]], note: str = "") -> list[Variant]:
    why = "" if case.device == "cuda" else INTERPRETED
    return [
        Variant(f"{NAME} torch", "ours", make("torch"), note=note),
        Variant(f"{NAME} triton", "ours", None if why else make("triton"), why, note),
    ]


def _head_problem(case: Case, variants: Sequence[Variant], answer: Callable[[], Outputs]) -> Problem:
    flops = counts.head_flops(case.n, case.d, case.v)
    n_bytes = counts.head_bytes(case.n, case.d, case.v, case.torch_dtype.itemsize)
    return Problem(case, variants, answer, flops, n_bytes, _ceilings(case))


def _ceilings(case: Case) -> dict[str, tuple[Callable[[], Any], int]]:
    ceilings: dict[str, tuple[Callable[[], Any], int]] = {"copy": machine.copy_ceiling(case.device)}
    if case.d and case.v:
        ceilings["gemm"] = machine.gemm_ceiling(case.n, case.d, case.v, case.torch_dtype, case.device)
    return ceilings


OPS: dict[str, Callable[[Case], Problem]] = {
    "linear_policy_loss": linear_policy_loss,
    "linear_logprob": linear_logprob,
    "policy_loss_from_logits": policy_loss_from_logits,
    "sampling_mask_replay": sampling_mask_replay,
    "linear_cross_entropy": linear_cross_entropy,
    "group_advantages": advantages,
    "pad_selection": pad_selection,
    "gather_rows": gather_rows,
}
HEADLESS = {"policy_loss_from_logits", "group_advantages", "pad_selection"}  # have no D
WORDLESS = {"group_advantages", "pad_selection", "gather_rows"}  # have no V
UNGROUPED = {"pad_selection", "gather_rows"}  # take any N
FP32_ONLY = {"group_advantages", "pad_selection"}

SHAPES: dict[str, dict[str, list[tuple[int, int, int]]]] = {  # N, D, V
    "cpu": {
        "linear_policy_loss": [(2048, 512, 32000)],
        "linear_logprob": [(512, 512, 32000)],
        "policy_loss_from_logits": [(512, 0, 32000)],
        "sampling_mask_replay": [(512, 512, 32000)],
        "linear_cross_entropy": [],  # for quack, which needs CUDA
        "group_advantages": [(65536, 0, 0)],
        "pad_selection": [(65536, 0, 0)],
        "gather_rows": [(2048, 512, 0)],
    },
    "gpu": {  # heads of Qwen2.5-VL 7B and 3B
        "linear_policy_loss": [(8192, 3584, 152064), (8192, 2048, 151936)],
        "linear_logprob": [(8192, 3584, 152064)],
        "policy_loss_from_logits": [(8192, 0, 151936)],
        "sampling_mask_replay": [(8192, 3584, 152064)],
        "linear_cross_entropy": [(8192, 3584, 152064)],
        "group_advantages": [(1 << 20, 0, 0)],
        "pad_selection": [(1 << 20, 0, 0)],
        "gather_rows": [(16384, 3584, 0)],
    },
}
DTYPES = {"cpu": ["float32", "bfloat16"], "gpu": ["bfloat16"]}


def cases(
    suite: str,
    ops: Sequence[str] = (),
    shape: tuple[int, int, int] | None = None,
    dtypes: Sequence[str] = (),
) -> list[Case]:
    """The suite's cases, for the named ops (default all), one shape and some dtypes instead of its own.

    Raises ValueError for a shape that an op cannot take, or if no case is left.
    """
    device = "cpu" if suite == "cpu" else "cuda"
    out = []
    for op in ops or OPS:
        for n, d, v in [shape] if shape else SHAPES[suite][op]:
            sizes = (n, 0 if op in HEADLESS else d, 0 if op in WORDLESS else v)
            allowed = ["float32"] if op in FP32_ONLY else dtypes or DTYPES[suite]
            out += [Case(op, *sizes, dtype, device) for dtype in allowed]
    if not out:
        raise ValueError(f"no case of {', '.join(ops)} in the {suite} suite; give --shape N,D,V")
    for case in out:
        check(case)
    return out


def check(case: Case) -> None:
    """Raises ValueError for a shape that the op cannot take."""
    if case.op not in UNGROUPED and case.n % SEQUENCES:
        raise ValueError(f"{case.op} takes {SEQUENCES} completions of equal length: N = {case.n} is no multiple of it")
    if case.op == "sampling_mask_replay" and case.v < 2 * KEPT:
        raise ValueError(f"{case.op} keeps {KEPT} ids a row of a vocabulary of at least {2 * KEPT}; got V = {case.v}")
