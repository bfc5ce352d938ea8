"""Helpers of the numerical tests: an independent policy loss, error measures, and watchers of memory and FLOPs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from revisual_fast import PolicyObjective, TokenBatch, linear_policy_loss
from revisual_fast.losses import loss_gradients

Inputs = dict[str, Any]
CU = [0, 5, 5, 6, 9, 14]  # the second sequence has no rows


def make(
    n: int = 14, d: int = 6, v: int = 19, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu"
) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, d, generator=g, dtype=torch.float64) for rows in (n, v))
    return {
        "hidden": hidden.to(device, dtype).requires_grad_(),
        "weight": weight.mul(2 / d**0.5).to(device, dtype).requires_grad_(),
        "targets": torch.randint(v, (n,), generator=g).to(device),
    }


def make_tokens(x: Inputs, seed: int = 1, **fields: Any) -> TokenBatch:
    g = torch.Generator().manual_seed(seed)
    n = len(x["targets"])
    cpu = {name: tensor.detach().cpu() for name, tensor in x.items()}
    logp, _ = naive_logprob(**{k: t.double() for k, t in cpu.items() if k != "targets"}, targets=cpu["targets"])
    old, ref, rollout = (logp + s * torch.randn(n, generator=g, dtype=torch.float64) for s in (0.4, 0.6, 0.5))
    tokens = TokenBatch(torch.randn(n, generator=g, dtype=torch.float64), old, ref, rollout)
    return replace(tokens, **{"cu_seqlens": torch.tensor(CU, dtype=torch.int32) if n == CU[-1] else None, **fields})


def grads(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def naive_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """logp and entropy ``[N]`` through full logits, in the dtype of the inputs."""
    z = hidden @ weight.T
    z = z if bias is None else z + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    return log_p[torch.arange(len(targets)), targets], -(log_p.exp() * log_p).sum(-1)


def naive_policy_loss(logp: Tensor, entropy: Tensor, tokens: Any, o: Any) -> Tensor:
    """The objective ``o`` token by token with Python loops and scalars, from the published formulas."""
    bounds = [0, len(logp)] if tokens.cu_seqlens is None else tokens.cu_seqlens.tolist()
    n_sequences = len(bounds) - 1
    old = logp.detach() if tokens.old_logp is None else tokens.old_logp
    total = logp.sum() * 0
    for s in range(n_sequences):
        rows = range(bounds[s], bounds[s + 1])
        if not len(rows):
            continue
        advantage = {t: tokens.advantages[s if len(tokens.advantages) == n_sequences else t] for t in rows}
        ratio = {t: (logp[t] - old[t]).exp() for t in rows}
        correction = {t: _naive_correction(t, rows, old, tokens, o) for t in rows}
        seen = _naive_sequence(ratio, advantage, correction, o)
        if o.level == "sequence":
            ratio = dict.fromkeys(rows, math.prod(ratio.values()) ** (1 / len(rows)))
        drift = _naive_drift(logp, rows, tokens)
        for t in rows:
            row = _naive_surrogate(ratio[t], logp[t], advantage[t], seen, o) * correction[t]
            if o.off_policy_mask and advantage[t] < 0 and drift > o.off_policy_mask:
                row = row * 0
            if o.kl_coef:
                d = tokens.ref_logp[t] - logp[t]
                kl = {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - d - 1}[o.kl]
                row = row + o.kl_coef * kl * (ratio[t] if o.kl_bias_correction else 1)
            row = row - o.entropy_coef * entropy[t]
            share = {
                "token_mean": 1 / len(logp),
                "sequence_mean": 1 / (n_sequences * len(rows)),
                "sequence_sum": 1 / n_sequences,
                "constant": 1 / (n_sequences * (o.constant_length or 1)),
            }[o.aggregation]
            total = total + (share if tokens.weight is None else tokens.weight[t]) * row
    return total


def _naive_correction(t: int, rows: range, old: Tensor, tokens: Any, o: Any) -> float:
    if not o.rollout_correction:
        return 1.0
    gaps = rows if o.rollout_level == "sequence" else [t]
    w = math.exp(sum((old[u] - tokens.rollout_logp[u]).item() for u in gaps))
    if o.rollout_correction == "truncate":
        return min(w, o.rollout_cap)
    return w if w <= o.rollout_cap else 0.0


def _naive_drift(logp: Tensor, rows: range, tokens: Any) -> float:
    """Mean over the sequence of log(pi_sampling / pi); 0 where nothing says what the sampling policy was."""
    sampled = tokens.old_logp if tokens.rollout_logp is None else tokens.rollout_logp
    return 0.0 if sampled is None else sum((sampled[t] - logp[t]).item() for t in rows) / len(rows)


def _naive_sequence(ratio: dict, advantage: dict, correction: dict, o: Any) -> Any:
    """What gmpo and vespo know of a sequence: the geometric mean of bounded ratios; W. vespo takes the correction."""
    if o.surrogate == "vespo":
        w = math.prod(r.item() for r in ratio.values())
        for t in correction:
            w, correction[t] = w * max(correction[t], 1e-8), 1.0
        return w
    if o.surrogate != "gmpo":
        return None
    product = 1.0
    for t, r in ratio.items():
        sign = -1 if advantage[t] < 0 else 1
        bounded = min(max(r, math.exp(-o.clip_low)), math.exp(o.clip_high))
        product = product * min(r**sign, bounded**sign) ** sign
    return product ** (1 / len(ratio))


def _naive_surrogate(r: Tensor, logp: Tensor, a: Tensor, seen: Any, o: Any) -> Tensor:
    if o.surrogate == "clip":
        first = r if o.delta is None or r < o.delta else torch.tensor(o.delta, dtype=r.dtype)
        second = min(max(r, 1 - o.clip_low), 1 + o.clip_high)
        loss = -(first * a) if first * a <= second * a else -(second * a)
        return -o.dual_clip * a if o.dual_clip and a < 0 and loss > -o.dual_clip * a else loss
    if o.surrogate == "cispo":
        return -min(r.item(), 1 + o.clip_high) * a * logp
    if o.surrogate == "sapo":
        tau = o.sapo_tau_pos if a > 0 else o.sapo_tau_neg
        return -(4 / tau) / (1 + torch.exp(-tau * (r - 1))) * a
    if o.surrogate == "gmpo":
        return -seen * a
    if o.surrogate == "vespo":
        k, decay = (o.vespo_k_pos, o.vespo_lambda_pos) if a >= 0 else (o.vespo_k_neg, o.vespo_lambda_neg)
        return -math.exp(decay) * seen**k * math.exp(-decay * seen) * a * logp
    return -logp if o.surrogate == "sft" else -a * logp


def loss_batch(lengths: tuple[int, ...] = (3, 0, 1, 4), seed: int = 9) -> tuple[Tensor, Tensor, TokenBatch]:
    """logp ``[N]``, entropy ``[N]`` and all fields of a batch, float64, whose policies differ by about half a nat."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(n, generator=g, dtype=torch.float64)

    logp, cu = noise(1.0).abs().neg(), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = TokenBatch(noise(1.0), logp + noise(0.4), logp + noise(0.6), logp + noise(0.5), cu)
    return logp, noise(1.0).abs(), tokens


def evaluate(o: PolicyObjective, logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dL/dlogp and dL/dentropy (0 where the loss does not contain it)."""
    prepared, _ = o.prepare(tokens, len(logp), logp.dtype, logp.device)
    loss, c, e = loss_gradients(o, logp, entropy, prepared)
    return loss, c, torch.zeros_like(entropy) if e is None else e


def relative_error(value: Tensor | None, reference: Tensor | None) -> float:
    """Norm of the difference over the norm of the reference, in fp64; nan if the value has a nan."""
    assert value is not None
    assert reference is not None
    difference = (value.double() - reference.double()).norm()
    return (difference / reference.double().norm().clamp(min=1e-300)).item()


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor made under it has, but for views of the storages to ignore."""

    def __init__(self, *ignore: Tensor) -> None:
        super().__init__()
        self.ignore = {tensor.untyped_storage().data_ptr() for tensor in ignore}
        self.numel = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        sizes = [leaf.numel() for leaf in made if leaf.untyped_storage().data_ptr() not in self.ignore]
        self.numel = max([self.numel, *sizes])
        return out


def count_gemm_flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products in ``run``, forward and backward (2 a multiply-add)."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def flops_of(x: Inputs, o: Any, tokens: TokenBatch, **options: Any) -> float:
    """In units of N D V."""
    n, d, v = len(x["hidden"]), x["hidden"].shape[1], len(x["weight"])

    def run() -> None:
        loss = linear_policy_loss(**x, tokens=tokens, objective=o, **options).loss
        if loss.requires_grad:
            loss.backward()

    return count_gemm_flops(run) / (n * d * v)


INLINED_SETTINGS: list[dict[str, Any]] = [
    {},
    {"clip_low": 0.1, "clip_high": 0.3, "delta": 1.5},
    {"dual_clip": 1.3},
    {"delta": 1.2, "dual_clip": 1.1},
    {"surrogate": "cispo", "clip_high": 0.1},
    {"surrogate": "sapo"},
    {"surrogate": "reinforce"},
    {"surrogate": "sft"},
]
"""Surrogates of the one-kernel path, with their bounds."""


def inlined_objectives(settings: dict[str, Any], tokens: TokenBatch) -> Iterator[tuple[PolicyObjective, TokenBatch]]:
    """``settings`` with every KL, bias correction, rollout correction (derived and given) and entropy term."""
    given = torch.linspace(0, 2, len(tokens.advantages))
    kinds = itertools.product((None, "k1", "k2", "k3"), (False, True), (None, "truncate", "mask", "given"), (0.0, 0.05))
    for kl, bias, correction, entropy in kinds:
        o = PolicyObjective(
            **settings,
            kl=kl or "k3",
            kl_coef=0.0 if kl is None else 0.3,
            kl_bias_correction=bias,
            rollout_correction="truncate" if correction == "given" else correction,
            rollout_cap=1.1,
            entropy_coef=entropy,
        )
        yield o, replace(tokens, importance=given) if correction == "given" else tokens
