"""The fused ops on the torch backend against full logits in float64, and what they promise about FLOPs and memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective, TokenBatch, linear_logprob, linear_policy_loss, policy_loss_from_logits
from revisual_fast.kernels import plan
from revisual_fast.ops import OPS, available_backends, resolve_backend
from tests.numerics import (
    Inputs,
    LargestTensor,
    count_gemm_flops,
    flops_of,
    grads,
    make,
    make_tokens,
    naive_logprob,
    relative_error,
)

CLIP = PolicyObjective()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows of 19 float64 logits a chunk."""
    monkeypatch.setitem(plan.CHUNK_BYTES, "cpu", 5 * 19 * 8)


def logit_case(kind: str, v: int, n: int = 12, d: int = 8) -> Inputs:
    x = make(n, d, v, torch.float32, seed=v)
    with torch.no_grad():
        if kind == "last column":
            x["targets"].fill_(v - 1)
        elif kind == "peaked":
            x["weight"].mul_(30)
            x["targets"][::2] = (x["hidden"] @ x["weight"].T).argmax(-1)[::2]
        elif kind == "all negative":
            x["hidden"].abs_()
            x["weight"].abs_().mul_(-5)
    return x


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("v", [1, 2, 127, 1000, 1001])
@pytest.mark.parametrize("kind", ["plain", "last column", "peaked", "all negative"])
def test_statistics_and_gradients_in_float32(kind: str, v: int, backend: str) -> None:
    x = logit_case(kind, v)
    exact = {name: t.detach().double().requires_grad_(t.is_floating_point()) for name, t in x.items()}
    exact["targets"] = x["targets"]
    logp, entropy = linear_logprob(**x, backend=backend)
    expected = naive_logprob(**exact)
    torch.testing.assert_close((logp.double(), entropy.double()), expected, rtol=2e-5, atol=2e-5)
    assert logp.dtype == torch.float32
    assert (logp <= 0).all()
    assert (entropy >= 0).all()
    got = grads(logp.mean() + 0.3 * entropy.mean(), x["hidden"], x["weight"])
    wanted = grads(expected[0].mean() + 0.3 * expected[1].mean(), exact["hidden"], exact["weight"])
    torch.testing.assert_close([g.double() for g in got], list(wanted), rtol=1e-3, atol=2e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(temperature: float, softcap: float | None, with_bias: bool) -> None:
    x = make(7, 4, 19)
    bias = torch.linspace(-1, 1, 19, dtype=torch.float64).requires_grad_() if with_bias else None
    tokens = make_tokens(x)
    o = PolicyObjective.preset("sapo", kl_coef=0.1, entropy_coef=0.05)
    options: dict[str, Any] = {"temperature": temperature, "softcap": softcap}

    def loss(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        b = bias[0] if bias else None
        return linear_policy_loss(hidden, weight, x["targets"], tokens, o, bias=b, **options).loss

    def logprob(hidden: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden, weight, x["targets"], bias=bias[0] if bias else None, **options)

    inputs = (x["hidden"], x["weight"], *([] if bias is None else [bias]))
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradcheck(logprob, inputs)
    expected = naive_logprob(**x, bias=bias, **options)
    torch.testing.assert_close(logprob(*inputs), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_logits_op_equals_linear_op(level: str) -> None:
    x = make()
    o, tokens = PolicyObjective(level=level, kl_coef=0.2, entropy_coef=0.1), make_tokens(x)
    out = linear_policy_loss(**x, tokens=tokens, objective=o, temperature=0.8)
    wanted = grads(out.loss, x["hidden"], x["weight"])
    for inplace in (False, True):
        logits = x["hidden"] @ x["weight"].T
        before, pointer = logits.detach().clone(), logits.data_ptr()
        same = policy_loss_from_logits(logits, x["targets"], tokens, o, temperature=0.8, inplace=inplace)
        assert torch.equal(logits.detach(), before) != inplace
        assert logits.data_ptr() == pointer
        torch.testing.assert_close((same.loss, same.logp, same.entropy), (out.loss, out.logp, out.entropy))
        got = torch.autograd.grad(3 * same.loss, [x["hidden"], x["weight"]])
        torch.testing.assert_close(got, tuple(3 * g for g in wanted), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_without_gradient_are_zero_in_the_gradient_of_logits(inplace: bool) -> None:
    x = make()
    tokens = make_tokens(x, advantages=torch.tensor([0.0, 0.0, 1.0, 0.0, -1.0]))
    leaf = (x["hidden"] @ x["weight"].T).detach().requires_grad_()
    logits = leaf * 1  # its backward pass does not need the product
    (gradient,) = grads(policy_loss_from_logits(logits, x["targets"], tokens, CLIP, inplace=inplace).loss, leaf)
    assert torch.equal(gradient[:5], torch.zeros(5, 19, dtype=torch.float64))
    assert torch.equal(gradient[6:9], torch.zeros(3, 19, dtype=torch.float64))
    assert gradient[5].abs().sum() > 0


def test_inplace_allows_one_backward_and_spares_logits_without_gradient() -> None:
    x = make()
    tokens = make_tokens(x)
    logits = (x["hidden"] @ x["weight"].T).detach().requires_grad_()
    out = policy_loss_from_logits(logits, x["targets"], tokens, CLIP, inplace=True)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()
    frozen = (x["hidden"] @ x["weight"].T).detach()
    before = frozen.clone()
    assert not policy_loss_from_logits(frozen, x["targets"], tokens, CLIP, inplace=True).loss.requires_grad
    assert torch.equal(frozen, before)


def test_upstream_gradient_scales_and_repeats() -> None:
    x, o = make(), PolicyObjective(entropy_coef=0.1)
    tokens = make_tokens(x)
    loss = linear_policy_loss(**x, tokens=tokens, objective=o).loss
    unit = torch.autograd.grad(loss, [x["hidden"], x["weight"]], retain_graph=True)
    scaled = torch.autograd.grad(-2.5 * loss, [x["hidden"], x["weight"]], retain_graph=True)
    torch.testing.assert_close(scaled, tuple(-2.5 * g for g in unit))
    torch.testing.assert_close(torch.autograd.grad(loss, [x["hidden"], x["weight"]]), unit)


def test_only_the_inputs_that_ask_get_a_gradient() -> None:
    x = make()
    bias = torch.zeros(19, dtype=torch.float64, requires_grad=True)
    tokens = make_tokens(x)
    whole = linear_policy_loss(**x, tokens=tokens, objective=CLIP, bias=bias)
    wanted = dict(zip(("hidden", "weight", "bias"), grads(whole.loss, x["hidden"], x["weight"], bias), strict=True))
    for name in wanted:
        inputs = {
            k: t.detach().clone().requires_grad_(k == name) for k, t in (("bias", bias), *x.items()) if k != "targets"
        }
        linear_policy_loss(**inputs, targets=x["targets"], tokens=tokens, objective=CLIP).loss.backward()
        torch.testing.assert_close(inputs[name].grad, wanted[name])
        assert all(t.grad is None for k, t in inputs.items() if k != name)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo", "luspo", "reinforce", "sft"])
def test_empty_batch(name: str) -> None:
    x = make(0)
    none = torch.zeros(0, dtype=torch.float64)
    o = PolicyObjective.preset(name, constant_length=4, kl_coef=0.1, rollout_correction="mask")
    tokens = TokenBatch(none, None, none, none, cu_seqlens=torch.tensor([0], dtype=torch.int32))
    out = linear_policy_loss(**x, tokens=tokens, objective=o)
    out.loss.backward()
    assert out.loss.item() == 0
    assert x["hidden"].grad is not None
    assert x["hidden"].grad.shape == (0, 6)
    assert x["weight"].grad is not None
    assert torch.equal(x["weight"].grad, torch.zeros_like(x["weight"]))
    assert all(value.item() == 0 for value in out.metrics.values())
    logits = torch.zeros(0, 19, requires_grad=True)
    policy_loss_from_logits(logits, x["targets"], tokens, o, inplace=True).loss.backward()
    logp, entropy = linear_logprob(**x)
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == (0,)


# What is not computed


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("from_logits", [False, True])
def test_without_gradient_the_objective_is_only_evaluated(from_logits: bool, kept: bool) -> None:
    x, seen = make(7), []
    tokens, indices = make_tokens(x), torch.arange(19).repeat(7)
    mask = (torch.arange(8) * 19, indices) if kept else None

    def own(logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
        seen.append(torch.is_grad_enabled() and logp.requires_grad)
        return -(tokens.advantages * logp).mean()

    def loss() -> Tensor:
        if from_logits:
            logits = x["hidden"] @ x["weight"].T
            return policy_loss_from_logits(logits, x["targets"], tokens, own, sampling_mask=mask).loss
        return linear_policy_loss(**x, tokens=tokens, objective=own, sampling_mask=mask).loss

    wanted = loss()
    with torch.no_grad():
        assert torch.equal(loss(), wanted)
    assert seen == [True, False]


@pytest.mark.usefixtures("small_chunks")
def test_flops() -> None:
    x, gspo = make(), PolicyObjective.preset("gspo", clip_low=9.0, clip_high=9.0)
    tokens = make_tokens(x)
    wide = PolicyObjective(clip_low=9.0, clip_high=9.0)  # nothing is clipped, so every row is active
    assert flops_of(x, wide, tokens) == 6
    assert flops_of(x, replace(wide, rollout_correction="truncate", rollout_level="sequence"), tokens) == 6
    with torch.no_grad():
        assert flops_of(x, wide, tokens) == 2
        assert flops_of(x, gspo, tokens) == 2
    frozen_head = {**x, "weight": x["weight"].detach()}
    assert flops_of(frozen_head, wide, tokens) == 4
    assert flops_of({**x, "hidden": x["hidden"].detach()}, wide, tokens) == 4
    assert flops_of({**frozen_head, "hidden": x["hidden"].detach()}, wide, tokens) == 2


def test_flops_of_sequence_level(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gspo = make(), PolicyObjective.preset("gspo", clip_low=9.0, clip_high=9.0)
    tokens = make_tokens(x)  # sequences of 5, 0, 1, 3 and 5 rows
    assert flops_of(x, gspo, tokens) == 6
    monkeypatch.setitem(plan.CHUNK_BYTES, "cpu", 5 * 19 * 8)
    assert flops_of(x, gspo, tokens) == 6  # whole sequences in chunks
    monkeypatch.setitem(plan.CHUNK_BYTES, "cpu", 4 * 19 * 8)
    assert flops_of(x, gspo, tokens) == pytest.approx(6 + 2 * 10 / 14)  # the two long ones are computed again
    assert flops_of(x, lambda logp, entropy, tokens: -logp.mean(), tokens) == 8  # nobody knows what it couples


def test_flops_of_logprob(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make()
    unit = 14 * 6 * 19
    upstream = (torch.arange(14) % 2).double()

    def both() -> None:
        (linear_logprob(**x)[0] * upstream).sum().backward()

    assert count_gemm_flops(lambda: linear_logprob(**x)) == 2 * unit
    assert count_gemm_flops(both) == (2 + 2) * unit  # half of the rows have a gradient
    monkeypatch.setitem(plan.SAVED_BYTES, "cpu", 14 * 19 * 8 - 1)
    assert count_gemm_flops(both) == (2 + 3) * unit  # their logits are computed again
    with torch.no_grad():
        assert count_gemm_flops(lambda: linear_logprob(**x)) == 2 * unit


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_skip_inactive_changes_flops_and_nothing_else(
    chunked: bool, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setitem(plan.CHUNK_BYTES, "cpu", 5 * 19 * 8)
    x = make()
    tokens = make_tokens(x, advantages=torch.tensor([1.0, 0.0, -2.0, 0.0, 0.0]))
    o = PolicyObjective(level=level, clip_low=9.0, clip_high=9.0)
    bias = torch.zeros(19, dtype=torch.float64, requires_grad=True)
    results = []
    for skip in (True, False):
        out = linear_policy_loss(**x, tokens=tokens, objective=o, bias=bias, skip_inactive=skip)
        results.append((out.loss, out.logp, out.entropy, *grads(out.loss, x["hidden"], x["weight"], bias)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    assert torch.equal(results[0][3][6:], torch.zeros(8, 6, dtype=torch.float64))
    assert flops_of(x, o, tokens) == pytest.approx(2 + 4 * 6 / 14)
    assert flops_of(x, o, tokens, skip_inactive=False) == 6


def test_all_advantages_zero() -> None:
    x = make()
    tokens = make_tokens(x, advantages=torch.zeros(14))
    out = linear_policy_loss(**x, tokens=tokens, objective=CLIP)
    assert out.loss.item() == 0
    for gradient in grads(out.loss, x["hidden"], x["weight"]):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert flops_of(x, CLIP, tokens) == 2
    assert flops_of(x, replace(CLIP, entropy_coef=0.1), tokens) == 6


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_memory_never_holds_all_logits(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n, v = 210, 500
    monkeypatch.setitem(plan.CHUNK_BYTES, "cpu", 10 * v * 8)
    monkeypatch.setitem(plan.SAVED_BYTES, "cpu", 0)
    x = make(n, 8, v)
    o = PolicyObjective(level=level, entropy_coef=0.1)
    tokens = make_tokens(x, cu_seqlens=torch.arange(0, n + 1, 10))
    with LargestTensor() as watch:
        linear_policy_loss(**x, tokens=tokens, objective=o, softcap=5.0).loss.backward()
        linear_logprob(**x)[1].sum().backward()
    assert watch.numel == max(10 * v, v * 8)
    logits = (x["hidden"] @ x["weight"].T).detach().requires_grad_()
    with LargestTensor(logits) as watch:
        policy_loss_from_logits(logits, x["targets"], tokens, o, inplace=True).loss.backward()
    assert watch.numel == 10 * v
    naive = LargestTensor()
    with naive:
        naive_logprob(**x)
    assert naive.numel == n * v  # the watcher does see full logits


# Precision


def bf16_case(n: int = 96, d: int = 64, v: int = 1001) -> tuple[Inputs, TokenBatch, PolicyObjective]:
    x = make(n, d, v, torch.bfloat16, seed=5)
    return x, make_tokens(x, rollout_logp=None), PolicyObjective(kl_coef=0.1, entropy_coef=0.05)


def errors(loss: Tensor, logp: Tensor, x: Inputs, exact: tuple[Tensor, ...]) -> list[float]:
    got = (logp, *torch.autograd.grad(loss, [x["hidden"], x["weight"]]))
    return [relative_error(g, e) for g, e in zip(got, exact, strict=True)]


@pytest.mark.parametrize("rows", [96, 1])
@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_bf16_error_is_bounded_by_plain_torch(logits_dtype: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.CHUNK_BYTES, "cpu", rows * 1001 * 6)
    x, tokens, o = bf16_case()
    wide = {k: t.detach().double().requires_grad_() if k != "targets" else t for k, t in x.items()}
    whole = linear_policy_loss(**wide, tokens=tokens, objective=o)
    exact = (whole.logp, *grads(whole.loss, wide["hidden"], wide["weight"]))

    log_p = torch.log_softmax((x["hidden"] @ x["weight"].T).float(), dim=-1)
    logp, entropy = log_p.gather(1, x["targets"][:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    plain_tokens, _ = o.prepare(tokens, 96, torch.float32, logp.device)
    plain = errors(o(logp, entropy, plain_tokens), logp.detach(), x, exact)

    out = linear_policy_loss(**x, tokens=tokens, objective=o, logits_dtype=logits_dtype)
    ours = errors(out.loss, out.logp, x, exact)
    assert all(a <= 2 * b for a, b in zip(ours, plain, strict=True)), (ours, plain)
    if logits_dtype == "float32":
        assert ours[0] < 1e-6
        roundings = 2 if rows == 96 else 3  # dL/dz and the result; a CPU's GEMM also rounds each chunk's share of dW
        assert max(ours[1:]) < roundings * 2**-9


def test_fp32_master_weight_gets_an_fp32_gradient() -> None:
    x, tokens, o = bf16_case()
    rounded = linear_policy_loss(**x, tokens=tokens, objective=o)
    master = (x["weight"].detach().float() * (1 + 2**-12)).requires_grad_()
    assert torch.equal(master.bfloat16(), x["weight"])
    assert not torch.equal(master, x["weight"].float())
    out = linear_policy_loss(x["hidden"], master, x["targets"], tokens, o)
    assert torch.equal(out.loss, rounded.loss)
    (gradient,) = grads(out.loss, master)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient.bfloat16(), *grads(rounded.loss, x["weight"]))


def test_autocast_does_not_touch_the_precision() -> None:
    x = make(dtype=torch.float32)
    tokens, o = make_tokens(x), PolicyObjective(entropy_coef=0.1)
    outside = linear_policy_loss(**x, tokens=tokens, objective=o)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_policy_loss(**x, tokens=tokens, objective=o)
        again = grads(linear_logprob(**x)[0].sum(), x["hidden"], x["weight"])
    assert torch.equal(inside.loss, outside.loss)
    both = [grads(out.loss, x["hidden"], x["weight"]) for out in (inside, outside)]
    torch.testing.assert_close(*both, rtol=0, atol=0)
    torch.testing.assert_close(again, grads(linear_logprob(**x)[0].sum(), x["hidden"], x["weight"]), rtol=0, atol=0)


def test_masked_logits_count_as_probability_zero() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = logits[:, :6].clone().requires_grad_()
    logits[:, 6:] = -torch.inf
    logits.requires_grad_()
    targets, o = torch.tensor([0, 5, 2, 2]), PolicyObjective(entropy_coef=0.3)
    tokens = TokenBatch(torch.tensor([1.0, -1.0, 0.5, 2.0]))
    out, small = (policy_loss_from_logits(z, targets, tokens, o) for z in (logits, kept))
    torch.testing.assert_close((out.loss, out.entropy), (small.loss, small.entropy))
    (got,), (wanted,) = grads(out.loss, logits), grads(small.loss, kept)
    torch.testing.assert_close(got[:, :6], wanted)
    assert torch.equal(got[:, 6:], torch.zeros(4, 3, dtype=torch.float64))


# Arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 7, 6)}, r"hidden must be \[N, D\]"),
        ({"hidden": torch.zeros(14, 6, dtype=torch.int32)}, "bfloat16, float16, float32 or float64"),
        ({"weight": torch.zeros(19, 7)}, r"weight must be \[V, D\] with D = 6"),
        ({"weight": torch.zeros(19, 6, dtype=torch.bfloat16)}, "narrower than hidden"),
        ({"bias": torch.zeros(18)}, r"bias must be \[V\]"),
        ({"targets": torch.zeros(13, dtype=torch.int64)}, r"targets must be \[14\], one for each row"),
        ({"targets": torch.zeros(14, dtype=torch.int32)}, r"targets must be int64; got torch.int32: targets.long\(\)"),
        ({"targets": torch.full((14,), -100)}, "drop the rows without a target"),
        ({"targets": torch.full((14,), 19)}, r"lie in \[0, 19\)"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"softcap": -1.0}, "softcap must be > 0"),
        ({"logits_dtype": "float16"}, "logits_dtype='float16' is unknown"),
        ({"logits_dtype": "bfloat16"}, "needs bf16 hidden"),
        ({"backend": "cuda"}, "is (not built|made for CUDA)"),
        ({"weight": torch.zeros(19, 6, device="meta")}, "weight is on meta, the rows on cpu: move it"),
        ({"bias": torch.zeros(19, device="meta")}, "bias is on meta"),
        ({"bias": torch.zeros(19, dtype=torch.int64)}, "bias must be bfloat16"),
        ({"weight": torch.nn.Linear(6, 19)}, "got Linear: pass head.weight"),
        ({"temperature": torch.zeros(14)}, "its least value is 0.0"),
        ({"temperature": torch.ones(13)}, r"a number or \[N\] = \[14\]"),
        ({"sampling_mask": torch.ones(14, 19, dtype=torch.bool)}, "CSR, not a mask"),
        ({"backend": "numpy"}, "backend='numpy' is unknown"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    x: dict[str, Any] = {**make(dtype=torch.float32), **change}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**x)
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**x, tokens=TokenBatch(torch.zeros(14)), objective=CLIP)


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in OPS:
        states = available_backends(op)
        assert set(states) == {"cuda", "triton", "torch"}
        assert states["torch"] == "yes"
        assert resolve_backend(op, rows=torch.zeros(1)) == "torch"  # not the interpreter, which is for tests
        assert resolve_backend(op, "triton", torch.zeros(1)) == "triton"
        with pytest.raises(ValueError, match="fp32 statistics; these rows are float64"):
            resolve_backend(op, "triton", torch.zeros(1, dtype=torch.float64))
        with pytest.raises(
            ValueError, match=r"backend=.cuda. of .* is (not built: run|made for CUDA, the tensors are on)"
        ):
            resolve_backend(op, "cuda", torch.zeros(1))
    with pytest.raises(ValueError, match="op_name='softmax' is unknown"):
        available_backends("softmax")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="made for CUDA, the tensors are on cpu; use backend='auto'"):
        resolve_backend("linear_logprob", "triton", torch.zeros(1))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.ones(14), "tokens must be a TokenBatch; got Tensor"),
        (TokenBatch([1.0] * 14), "tokens.advantages must be a tensor; got list"),  # type: ignore[arg-type]
        (TokenBatch(torch.ones(14), cu_seqlens=[0, 14]), "tokens.cu_seqlens must be a tensor"),  # type: ignore[arg-type]
        (TokenBatch(torch.ones(14, device="meta")), "tokens.advantages is on the meta device"),
        (TokenBatch(torch.ones(14), cu_seqlens=torch.zeros(2, device="meta")), "tokens.cu_seqlens is on the meta"),
    ],
)
def test_batches_of_the_wrong_kind(tokens: Any, message: str) -> None:
    x = make(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**x, tokens=tokens, objective=CLIP)
    with pytest.raises(ValueError, match=message):
        policy_loss_from_logits(x["hidden"] @ x["weight"].T, x["targets"], tokens, CLIP)


def test_logits_dtype_may_be_a_dtype() -> None:
    x = make(dtype=torch.bfloat16)
    named, typed = (linear_logprob(**x, logits_dtype=dtype)[0] for dtype in ("bfloat16", torch.bfloat16))
    assert torch.equal(named, typed)


def test_fp16_needs_its_scale_in_the_weights() -> None:
    n, v, scale = 512, 300, 65536.0
    x = make(n, 32, v, torch.float16)
    tokens = TokenBatch(torch.randn(n, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="before a GradScaler could scale it"):
        linear_policy_loss(**x, tokens=tokens, objective=CLIP)
    wide = {k: t if k == "targets" else t.detach().double().requires_grad_() for k, t in x.items()}
    exact = grads(linear_policy_loss(**wide, tokens=tokens, objective=CLIP).loss, wide["hidden"], wide["weight"])
    scaled = replace(tokens, weight=torch.full((n,), scale / n))
    ours = grads(linear_policy_loss(**x, tokens=scaled, objective=CLIP).loss, x["hidden"], x["weight"])
    logp = (x["hidden"] @ x["weight"].T).float().log_softmax(-1).gather(1, x["targets"][:, None])[:, 0]
    plain = grads(-(tokens.advantages * logp).mean() * scale, x["hidden"], x["weight"])
    for a, b, wanted in zip(ours, plain, exact, strict=True):
        assert relative_error(a.double() / scale, wanted) <= 2 * relative_error(b.double() / scale, wanted)


def test_a_completion_of_more_than_65536_tokens() -> None:
    n = 65_700
    x = make(n, 2, 3, torch.float32)
    cu = torch.tensor([0, n - 20, n], dtype=torch.int32)
    tokens = make_tokens(x, cu_seqlens=cu, advantages=torch.tensor([1.0, -0.5]))
    o = PolicyObjective.preset("gspo", kl_coef=0.1, clip_low=0.2, clip_high=0.2)
    wide = {k: t if k == "targets" else t.detach().double().requires_grad_() for k, t in x.items()}
    logp, entropy = naive_logprob(**wide)
    prepared, _ = o.prepare(tokens, n, torch.float64, logp.device)
    expected = o(logp, entropy, prepared)
    out = linear_policy_loss(**x, tokens=tokens, objective=o)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = grads(expected, wide["hidden"], wide["weight"])
    for got, gradient in zip(grads(out.loss, x["hidden"], x["weight"]), wanted, strict=True):
        assert relative_error(got, gradient) < 1e-4
