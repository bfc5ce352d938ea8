"""The row kernels of every backend and the fused ops on them: against float64, with errors bounded by plain torch's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective, TokenBatch, linear_policy_loss, policy_loss_from_logits
from revisual_fast.kernels import plan
from revisual_fast.kernels.reference import TorchChunk, Transform
from revisual_fast.kernels.rows import KernelChunk, RawRows, row_kernels
from revisual_fast.losses import loss_gradients
from tests.devices import ALL_BACKENDS, DEVICE, KERNELS, ON_DEVICE
from tests.numerics import INLINED_SETTINGS, inlined_objectives, make, make_tokens, relative_error

pytestmark = ON_DEVICE


def kernel_chunk(
    backend: str,
    z: Tensor,
    targets: Tensor,
    transform: Transform | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> KernelChunk:
    return KernelChunk(row_kernels(backend), RawRows(z, targets, transform or Transform(), bias), out)


def random_logits(kind: str, n: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(v)
    z, targets = torch.randn(n, v, generator=g) * 3, torch.randint(v, (n,), generator=g)
    if kind == "last column":
        targets.fill_(v - 1)
    elif kind == "peaked":
        targets[::2] = z.argmax(dim=1)[::2]
        z *= 30
    elif kind == "all negative":
        z -= 1000
    elif kind == "minus infinity":
        z[:, 1::2] = -float("inf")
        targets -= targets % 2
    return z.to(DEVICE, dtype), targets.to(DEVICE)


def exact(z: Tensor, targets: Tensor, c: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = z.double().requires_grad_()
    log_p = z.log_softmax(dim=-1)
    logp = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -torch.where(log_p.isinf(), 0, log_p.exp() * log_p.clamp(min=-1e300)).sum(-1)
    (dz,) = torch.autograd.grad((logp * c + entropy * e).sum(), z)
    return logp.detach(), entropy.detach(), dz


def plain(z: Tensor, targets: Tensor, c: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch in fp32, its gradient rounded to the dtype of the logits."""
    wide = z.float().requires_grad_()
    log_p = wide.log_softmax(dim=-1)
    logp = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -torch.where(log_p.isinf(), 0, log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    (dz,) = torch.autograd.grad((logp * c + entropy * e).sum(), wide)
    return logp.detach(), entropy.detach(), dz.to(z.dtype)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("v", [1, 3, 127, 1000, 4097, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "last column", "peaked", "all negative", "minus infinity"])
def test_error_is_bounded_by_plain_torch(backend: str, kind: str, dtype: torch.dtype, v: int) -> None:
    n = 3 if v > 10_000 else 8
    z, targets = random_logits(kind, n, v, dtype)
    c, e = torch.linspace(-1, 2, n, device=DEVICE), torch.linspace(0.5, -0.5, n, device=DEVICE)
    wanted = exact(z, targets, c.double(), e.double())
    allowed = plain(z, targets, c, e)
    chunk = kernel_chunk(backend, z.clone(), targets)
    got = (chunk.logp, chunk.entropy, chunk.gradient(c, e))
    # The interpreter's casts to 16 bits truncate, a device's round: one unit in the last place instead of a half.
    steps = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    floors = (2**-23 * z.float().clamp(min=-2e3).abs().max().item(), 2e-6, 0.0)
    for name, a, b, x, floor in zip(("logp", "entropy", "dz"), got, allowed, wanted, floors, strict=True):
        assert a.isfinite().all(), name
        unit = steps[dtype] if name == "dz" else 0.0
        error, bound = (a.double() - x).abs().max(), 2 * (b.double() - x).abs().max()
        assert error <= bound + floor + unit * x.abs().max(), (name, float(error), float(bound))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("temperature", [False, True])
def test_transform_and_bias_as_in_the_reference(
    backend: str, temperature: bool, softcap: float | None, bias: bool
) -> None:
    n, v = 6, 1003
    z, targets = random_logits("plain", n, v, torch.float32)
    t = torch.linspace(0.5, 1.6, n, device=DEVICE) if temperature else None
    b = torch.linspace(-2, 2, v, device=DEVICE) if bias else None
    c, e = torch.linspace(-1, 2, n, device=DEVICE), torch.linspace(0.5, -0.5, n, device=DEVICE)
    index = torch.tensor([1, 2, 5], device=DEVICE)
    for rows in (None, index):
        for coefficient in (None, e):
            wide = TorchChunk(
                z.double(),
                targets,
                Transform(None if t is None else t.double(), softcap),
                None if b is None else b.double(),
            )
            wanted = wide.gradient(c.double(), None if coefficient is None else coefficient.double(), rows)
            chunk = kernel_chunk(backend, z.clone(), targets, Transform(t, softcap), b)
            assert relative_error(chunk.logp, wide.logp) < 1e-6
            assert relative_error(chunk.entropy, wide.entropy) < 1e-6
            assert relative_error(chunk.gradient(c, coefficient, rows), wanted) < 2e-6


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.usefixtures("poisoned")
def test_gradient_in_place_and_in_rows_of_any_stride(backend: str) -> None:
    z, targets = random_logits("plain", 4, 304, torch.bfloat16)  # whole 16 bytes: added up in the same order anywhere
    c = torch.ones(4, device=DEVICE)
    beside = kernel_chunk(backend, z, targets).gradient(c, None)
    wide = torch.full((4, 776), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    strided = wide[:, :304]
    strided.copy_(z)
    chunk = kernel_chunk(backend, strided, targets, out=strided)
    assert chunk.gradient(c, None).data_ptr() == wide.data_ptr()
    assert torch.equal(strided, beside)
    assert wide[:, 304:].isnan().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_rows_without_gradient_are_not_read_again(backend: str) -> None:
    z, targets = random_logits("plain", 4, 5000, torch.bfloat16)
    chunk = kernel_chunk(backend, z, targets)
    c, e = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.5, 0.0, 0.3, 0.0]], device=DEVICE)
    z[1] = float("nan")
    for entropy, wanted in ((e, [True, False, True, True]), (None, [True, False, False, True])):
        gradient = chunk.gradient(c, entropy)
        assert gradient.isfinite().all()
        assert gradient.any(dim=1).tolist() == wanted


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter's host memory")
def test_offsets_beyond_two_to_the_31(backend: str, tmp_path: Path) -> None:
    """Rows so far apart that row times stride does not fit in 32 bits; the file they lie in has holes."""
    stride, v = 2**31 + 11, 40
    memory = torch.from_file(str(tmp_path / "z"), shared=True, size=2 * stride + v, dtype=torch.bfloat16)
    far = memory.as_strided((3, v), (stride, 1))
    z, targets = random_logits("plain", 3, v, torch.bfloat16)
    far.copy_(z.cpu())
    c, e = torch.ones(3), torch.full((3,), 0.5)
    near = kernel_chunk(backend, z.cpu().clone(), targets.cpu())
    chunk = kernel_chunk(backend, far, targets.cpu(), out=far)
    assert torch.equal(chunk.logp, near.logp)
    chunk.gradient(c, e)
    assert torch.equal(far, near.gradient(c, e))


# The objective in the kernel


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("settings", INLINED_SETTINGS, ids=lambda s: "-".join(map(str, s.values())) or "clip")
@pytest.mark.parametrize("on_policy", [False, True], ids=["off", "on"])
def test_every_combination_of_the_inlined_objective(backend: str, settings: dict[str, Any], on_policy: bool) -> None:
    """Loss and gradient of rows in the kernel against the same objective in float64, through ``losses``."""
    n, v = 10, 5
    logits = torch.randn(n, v, generator=torch.Generator().manual_seed(3))
    targets = torch.arange(n) % v
    tokens = make_tokens({"hidden": logits, "weight": torch.eye(v), "targets": targets}, cu_seqlens=None)
    tokens = replace(tokens, old_logp=None) if on_policy else tokens
    logits, targets = logits.to(DEVICE), targets.to(DEVICE)
    for o, batch in inlined_objectives(settings, tokens):
        leaf = logits.clone().requires_grad_()
        out = policy_loss_from_logits(leaf, targets, batch, o, backend=backend)
        out.loss.backward()
        wide = logits.double().requires_grad_()
        wanted = policy_loss_from_logits(wide, targets, batch, o, backend="torch")
        wanted.loss.backward()
        assert torch.allclose(out.loss.double(), wanted.loss, rtol=1e-5, atol=1e-6), o
        assert relative_error(leaf.grad, wide.grad) < 1e-5, o


# The ops on this backend


CASES: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"kl_coef": 0.1}),
    ("gspo", {"kl_coef": 0.1, "kl_bias_correction": True}),
    ("sapo", {"entropy_coef": 0.1}),
    ("cispo", {"rollout_correction": "mask", "rollout_level": "sequence"}),
]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("chunk", [None, 5], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("preset", "fields"), CASES, ids=lambda c: c if isinstance(c, str) else "")
def test_ops_against_the_torch_backend(
    backend: str,
    preset: str,
    fields: dict[str, Any],
    dtype: torch.dtype,
    chunk: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if chunk is not None:
        monkeypatch.setitem(plan.CHUNK_BYTES, DEVICE, chunk * 19 * (4 if dtype == torch.float32 else 6))
    x = make(dtype=dtype, device=DEVICE)
    tokens, o = (
        make_tokens(x, advantages=torch.tensor([1.0, 1.0, -2.0, 0.0, 0.5])),
        PolicyObjective.preset(preset, **fields),
    )
    wide = {k: t if k == "targets" else t.detach().double().requires_grad_() for k, t in x.items()}
    bias = torch.linspace(-1, 1, 19).to(DEVICE, dtype).requires_grad_()
    results = []
    for inputs, b, which in (
        (x, bias, "torch"),
        (x, bias, backend),
        (wide, bias.detach().double().requires_grad_(), "torch"),
    ):
        temperature = torch.linspace(0.8, 1.2, 14)
        out = linear_policy_loss(
            **inputs, tokens=tokens, objective=o, bias=b, softcap=5.0, temperature=temperature, backend=which
        )
        gradients = torch.autograd.grad(2 * out.loss, [inputs["hidden"], inputs["weight"], b])
        results.append((out.loss, out.logp, out.entropy, *gradients))
    step = 2**-8 if dtype == torch.bfloat16 else 1e-6  # an interpreter's cast truncates
    for reference, ours, wanted in zip(*results, strict=True):
        assert relative_error(ours, wanted) <= 2 * relative_error(reference, wanted) + step


@pytest.mark.parametrize("backend", KERNELS)
def test_two_phase_and_one_kernel_agree(backend: str) -> None:
    x = make(dtype=torch.float32, device=DEVICE)
    tokens, o = make_tokens(x), PolicyObjective(kl_coef=0.1, entropy_coef=0.1)
    prepared, _ = o.prepare(tokens, 14, torch.float32, torch.device(DEVICE))

    def own(logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
        return o(logp, entropy, prepared)

    results = []
    for goal in (o, own):
        out = linear_policy_loss(**x, tokens=tokens, objective=goal, backend=backend)
        results.append((out.loss, *torch.autograd.grad(out.loss, [x["hidden"], x["weight"]])))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    _, c, e = loss_gradients(o, *torch.zeros(2, 14, device=DEVICE), prepared)
    assert c.shape == (14,)
    assert e is not None


# What a kernel that reads ``pointer + row`` could get wrong


def spread(t: Tensor) -> Tensor:
    """The same values with a stride of 2."""
    return torch.stack([t, torch.full_like(t, 99 if t.is_floating_point() else 0)], dim=-1)[..., 0]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_strided_inputs(backend: str) -> None:
    x = make(dtype=torch.float32, device=DEVICE)
    tokens, o = make_tokens(x), PolicyObjective(kl_coef=0.1, rollout_correction="truncate")
    tokens = tokens.expanded(14, torch.float32, torch.device("cpu"))
    tokens = replace(tokens, weight=torch.rand(14, generator=torch.Generator().manual_seed(0)), cu_seqlens=None)
    bias, temperature = torch.linspace(-1, 1, 19, device=DEVICE), torch.linspace(0.8, 1.2, 14, device=DEVICE)

    def run(hidden: Tensor, weight: Tensor, change: Any) -> list[Tensor]:
        fields = {name: change(value) for name, value in vars(tokens).items() if value is not None}
        options = {"bias": change(bias), "temperature": change(temperature), "backend": backend}
        out = linear_policy_loss(hidden, weight, change(x["targets"]), TokenBatch(**fields), o, **options)
        logits = change(hidden @ weight.T)
        other = policy_loss_from_logits(logits, change(x["targets"]), TokenBatch(**fields), o, backend=backend)
        leaves = (x["hidden"], x["weight"])
        return [out.loss, out.logp, *torch.autograd.grad(out.loss, leaves), *torch.autograd.grad(other.loss, leaves)]

    wanted = run(x["hidden"], x["weight"], lambda t: t)
    for hidden, weight in ((spread(x["hidden"]), spread(x["weight"])), (x["hidden"].T.contiguous().T, x["weight"])):
        torch.testing.assert_close(run(hidden, weight, spread), wanted, rtol=1e-5, atol=1e-6)
    everywhere = TokenBatch(torch.tensor(1.0).expand(14))
    for goal in (everywhere, TokenBatch(torch.ones(14))):
        out = linear_policy_loss(**x, tokens=goal, objective=PolicyObjective(), backend=backend)
        assert out.loss.item() == pytest.approx(-1.0)
    columns = (x["hidden"] @ x["weight"].T).detach().T.contiguous().T
    leaf = columns.requires_grad_() * 1
    with pytest.raises(ValueError, match="rows are contiguous"):
        policy_loss_from_logits(leaf, x["targets"], everywhere, PolicyObjective(), inplace=True, backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_nan_is_not_hidden(backend: str) -> None:
    tokens, o = TokenBatch(torch.tensor([1.0, -1.0, 1.0])), PolicyObjective()
    old = TokenBatch(tokens.advantages, torch.zeros(3))
    targets = torch.tensor([0, 1, 2], device=DEVICE)
    for column in (4, 0):  # of no target, of the first target
        for batch in (tokens, old):
            logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
            logits[0, column] = float("nan")
            leaf = logits.to(DEVICE).requires_grad_()
            out = policy_loss_from_logits(leaf, targets, batch, o, backend=backend)
            (gradient,) = torch.autograd.grad(out.loss, leaf)
            assert out.loss.isnan()
            assert out.logp.isnan().tolist() == [True, False, False]
            assert gradient.isnan().any(dim=1).tolist() == [True, False, False]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(("scale", "cap", "temperature"), [(10, 5, 1.0), (10, 5, 3.0), (100, 30, 1.0), (100, 5, 3.0)])
def test_a_saturated_softcap(scale: float, cap: float, temperature: float, backend: str) -> None:
    z, targets = random_logits("plain", 16, 501, torch.float32)
    z, c, e = z * scale / 3, torch.ones(16, device=DEVICE), torch.full((16,), 0.1, device=DEVICE)

    def gradient(z: Tensor) -> Tensor:
        z = z.requires_grad_()
        log_p = (cap * torch.tanh(z / cap) / temperature).log_softmax(-1)
        logp, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        return torch.autograd.grad((logp * c.to(z) + entropy * e.to(z)).sum(), z)[0]

    exact, plain = gradient(z.double()), gradient(z.clone())
    of = (z.clone(), targets, Transform(torch.full((16,), temperature, device=DEVICE), float(cap)))
    chunk = TorchChunk(*of) if backend == "torch" else kernel_chunk(backend, *of)
    assert relative_error(chunk.gradient(c, e), exact) <= 2 * relative_error(plain, exact)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_logits_overwritten_in_place_cannot_be_used_elsewhere(backend: str) -> None:
    x = make(dtype=torch.float32, device=DEVICE)
    logits = x["hidden"] @ x["weight"].T
    other = (logits * logits).sum()
    policy_loss_from_logits(logits, x["targets"], make_tokens(x), PolicyObjective(), inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("backend", KERNELS)
def test_targets_outside_the_vocabulary_are_loud(backend: str) -> None:
    """On the device, where nobody may look at them."""
    z, _ = random_logits("plain", 4, 50, torch.float32)
    chunk = kernel_chunk(backend, z, torch.tensor([-100, 50, 3, 2**40], device=DEVICE))
    assert chunk.logp.isnan().tolist() == [True, True, False, True]
