"""The fused ops on a CUDA device at sizes of real models: accuracy, offsets, synchronisation, compilation, memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective, TokenBatch, gather_rows, linear_logprob, linear_policy_loss
from revisual_fast import policy_loss_from_logits as from_logits
from revisual_fast.kernels import plan
from revisual_fast.ops import available_backends, resolve_backend
from tests.devices import KERNELS
from tests.numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCABULARIES = [127, 1001, 151_936, 152_064, 248_320]
GRPO = PolicyObjective(kl_coef=0.1, entropy_coef=0.05)
GSPO = PolicyObjective.preset("gspo", clip_low=0.2, clip_high=0.2)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any operation that waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def inputs(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, TokenBatch]:
    g = torch.Generator("cuda").manual_seed(v)
    hidden = torch.randn(n, d, generator=g, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=g, device="cuda") * 2 / d**0.5).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=g, device="cuda")
    with torch.no_grad():
        logp, _ = linear_logprob(hidden, weight, targets, backend="torch")
    old, ref = (logp + 0.1 * torch.randn(n, generator=g, device="cuda") for _ in range(2))
    cu = torch.linspace(0, n, 9, dtype=torch.int32)
    advantages = torch.randn(8, generator=g, device="cuda")
    weights = torch.ones(n, device="cuda") if dtype == torch.float16 else None  # 1/n: fp16 underflows
    return hidden, weight, targets, TokenBatch(advantages, old, ref, cu_seqlens=cu, weight=weights)


def results(out: object, *leaves: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(out.loss, leaves)
    return [out.loss, out.logp, out.entropy, *gradients]


@pytest.mark.parametrize("objective", [GRPO, GSPO], ids=["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("backend", KERNELS)
def test_error_is_bounded_by_plain_torch(backend: str, v: int, dtype: torch.dtype, objective: PolicyObjective) -> None:
    hidden, weight, targets, tokens = inputs(72, 256, v, dtype)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = results(linear_policy_loss(*wide, targets, tokens, objective), *wide)
    ours = results(linear_policy_loss(hidden, weight, targets, tokens, objective, backend=backend), hidden, weight)
    logits = hidden @ weight.T
    log_p = logits.float().log_softmax(-1)
    logp, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    prepared, _ = objective.prepare(tokens, len(targets), torch.float32, targets.device)
    loss = objective(logp, entropy, prepared)
    c, *gradients = torch.autograd.grad(loss, (logp, hidden, weight))
    sizes = [x.double().norm() for x in exact]
    sizes[0] = c.norm() * logp.detach().norm()  # errors of a sum cancel by luck, so its own size says nothing
    plain = [loss, logp, entropy, *gradients]
    for name, a, b, x, size in zip(("loss", "logp", "entropy", "dX", "dW"), ours, plain, exact, sizes, strict=True):
        error, allowed = (float((y.detach().double() - x).norm() / size) for y in (a, b))
        assert error <= 2 * allowed + 1e-6, name


@pytest.mark.parametrize("objective", [GRPO, GSPO], ids=["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("backend", ["torch", *KERNELS])
def test_gradient_of_logits(backend: str, v: int, dtype: torch.dtype, objective: PolicyObjective) -> None:
    hidden, weight, targets, tokens = inputs(72, 64, v, dtype)
    logits = (hidden @ weight.T).detach()
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    exact = results(from_logits(wide, targets, tokens, objective), wide)
    ours = results(from_logits(leaf, targets, tokens, objective, backend=backend), leaf)
    step = 1e-5 if dtype == torch.float32 else 2**-8
    assert abs(ours[0] - exact[0]) < 1e-6  # a mean of terms near 1, which may cancel
    for a, x in zip(ours[1:], exact[1:], strict=True):
        assert relative_error(a, x) < (step if a.numel() == leaf.numel() else 1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_identical_policies_have_a_ratio_of_one(backend: str) -> None:
    hidden, weight, targets, tokens = inputs(512, 1024, 152_064, torch.bfloat16)
    old, _ = linear_logprob(hidden.detach(), weight.detach(), targets, backend=backend)
    tokens = TokenBatch(tokens.advantages, old, cu_seqlens=tokens.cu_seqlens)
    out = linear_policy_loss(hidden, weight, targets, tokens, GSPO, backend=backend)
    assert ((out.logp - old).exp() - 1).abs().max() < 1e-5
    assert abs(out.metrics["ratio/max"] - 1) < 1e-5


@pytest.mark.parametrize("backend", KERNELS)
def test_more_logits_than_two_to_the_31(backend: str) -> None:
    n, v = 14_500, 151_936
    logits = torch.randn(n, v, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(v, (n,), device="cuda")
    tokens = TokenBatch(torch.ones(n, device="cuda"))
    last = logits[-4:].float()
    leaf = logits.requires_grad_()
    out = from_logits(leaf, targets, tokens, PolicyObjective(), inplace=False, backend=backend)
    assert torch.allclose(out.logp[-4:], last.log_softmax(-1).gather(1, targets[-4:, None])[:, 0], atol=1e-4)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    wide = last.requires_grad_()
    (expected,) = torch.autograd.grad(-wide.log_softmax(-1).gather(1, targets[-4:, None]).sum() / n, wide)
    assert relative_error(gradient[-4:], expected) < 2**-7


@pytest.mark.parametrize("host_boundaries", [False, True])
@pytest.mark.parametrize("objective", [GRPO, GSPO], ids=["token", "sequence"])
@pytest.mark.parametrize("backend", KERNELS)
def test_nothing_waits_for_the_device(
    backend: str, objective: PolicyObjective, host_boundaries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plan.CHUNK_BYTES, "cuda", 16 * 1001 * 4)
    monkeypatch.setitem(plan.SUPERCHUNK_BYTES, "cuda", 48 * 1001 * 2)
    hidden, weight, targets, tokens = inputs(128, 64, 1001, torch.bfloat16)
    if not host_boundaries:
        tokens = TokenBatch(tokens.advantages, tokens.old_logp, tokens.ref_logp, cu_seqlens=tokens.cu_seqlens.cuda())
    for skip in (True, False):
        for _ in range(2):  # the first call compiles
            with no_synchronisation():
                of = (hidden, weight, targets, tokens, objective)
                linear_policy_loss(*of, skip_inactive=skip, backend=backend).loss.backward()
                logp, entropy = linear_logprob(hidden, weight, targets, backend=backend)
                (logp.sum() + entropy.sum()).backward()
                logits = (hidden @ weight.T) * 1
                from_logits(logits, targets, tokens, objective, inplace=True, backend=backend).loss.backward()


def test_inactive_rows_leave_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.CHUNK_BYTES, "cuda", 16 * 1001 * 4)
    monkeypatch.setitem(plan.SUPERCHUNK_BYTES, "cuda", 48 * 1001 * 2)
    hidden, weight, targets, tokens = inputs(128, 64, 1001, torch.bfloat16)
    advantages = torch.tensor([0.0, 1.0, 0.0, 0.0, -1.0, 0.0, 0.0, 2.0], device="cuda")
    tokens = TokenBatch(advantages, tokens.old_logp, cu_seqlens=tokens.cu_seqlens)
    both = [
        results(linear_policy_loss(hidden, weight, targets, tokens, o, skip_inactive=skip), hidden, weight)
        for o in (PolicyObjective(),)
        for skip in (True, False)
    ]
    for a, b in zip(*both, strict=True):
        assert relative_error(a, b) < 2**-8


@pytest.mark.parametrize("objective", [GRPO, GSPO], ids=["token", "sequence"])
@pytest.mark.parametrize("backend", ["auto", *KERNELS])
def test_torch_compile(backend: str, objective: PolicyObjective) -> None:
    hidden, weight, targets, tokens = inputs(96, 128, 1001, torch.bfloat16)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_policy_loss(hidden * 1.5, weight, targets, tokens, objective, backend=backend).loss

    eager = step(hidden, weight)
    compiled = torch.compile(step, fullgraph=True)(hidden, weight)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (compiled, eager)), strict=True):
        assert relative_error(a, b) < 2**-8


def test_no_recompilation_for_another_length() -> None:
    from revisual_fast.kernels.rows_triton import loss_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for cache in loss_kernel.device_caches.values())

    counts = []
    for n in (100, 101, 128, 333):
        hidden, weight, targets, tokens = inputs(n, 64, 1001, torch.bfloat16)
        linear_policy_loss(hidden, weight, targets, tokens, GRPO, backend="triton").loss.backward()
        counts.append(compiled())
    assert counts[0] == counts[-1]


def test_memory_stays_within_the_chunks() -> None:
    n, d, v = 8192, 512, 151_936
    hidden, weight, targets, tokens = inputs(n, d, v, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_policy_loss(hidden, weight, targets, tokens, GRPO).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < plan.CHUNK_BYTES["cuda"] + plan.SUPERCHUNK_BYTES["cuda"] + (256 << 20)


def test_auto_takes_the_cuda_kernels_where_they_are_built() -> None:
    states = available_backends("linear_policy_loss")
    best = next(name for name, state in states.items() if state == "yes")
    assert resolve_backend("linear_policy_loss", rows=torch.zeros(1, device="cuda")) == best
    assert best in ("cuda", "triton")


def test_gather_rows_adds_repeats_up_in_fp32_and_deterministically() -> None:
    hidden = torch.randn(200, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rows = torch.randint(200, (3000,), device="cuda")
    upstream = torch.randn(3000, 96, device="cuda", dtype=torch.bfloat16)
    first, second = (torch.autograd.grad(gather_rows(hidden, rows), hidden, upstream)[0] for _ in range(2))
    exact = torch.zeros(200, 96, device="cuda", dtype=torch.float64).index_add(0, rows, upstream.double())
    assert torch.equal(first, second)
    assert relative_error(first, exact) < 2**-8
