"""The fused head against verl's own torch path and float64 autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="needs verl: make test-dropin")
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel import linear_cross_entropy as kernel

from revisual_fast.integrations.verl.head import linear_cross_entropy, needed_rows
from tests.numerics import count_gemm_flops, relative_error

N, D, V = 24, 12, 40


def make(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=rng, dtype=torch.float64).to(dtype) for n in (N, V))
    upstream = [torch.randn(N, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2)]
    upstream[0][:10] = upstream[1][:10] = 0  # a prompt's rows
    labels = torch.randint(V, (1, N), generator=rng)
    return {
        "hidden": hidden[None].requires_grad_(),
        "weight": weight.requires_grad_(),
        "labels": labels,
        "upstream": upstream,
    }


def gradients(x: dict[str, Any], logp: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = (logp.flatten() * x["upstream"][0]).sum() + (entropy.flatten() * x["upstream"][1]).sum()
    return torch.autograd.grad(total, (x["hidden"], x["weight"]))


def exact(x: dict[str, Any], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = (x["hidden"][0] @ x["weight"].T / temperature).log_softmax(-1)
    return log_p.gather(1, x["labels"].T)[:, 0], -(log_p.exp() * log_p).sum(-1)


def test_it_is_in_verls_place():
    assert kernel.linear_cross_entropy is linear_cross_entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(temperature):
    x, wide = make(), make(torch.float64)
    ours = linear_cross_entropy(x["hidden"], x["weight"], x["labels"], temperature, "none")
    assert all(out.shape == (N,) and out.dtype == torch.float32 for out in ours)
    verls = FusedLinearForPPO(impl_backend="torch")(x["hidden"], x["weight"], x["labels"], temperature)
    truth = exact(wide, temperature)
    for a, b, t in zip(ours, verls, truth, strict=True):
        assert relative_error(a, b.flatten()) < 1e-5
        assert relative_error(a, t) < 1e-6
    found, stock, true = (gradients(y, *out) for y, out in ((x, ours), (x, verls), (wide, truth)))
    for a, b, t in zip(found, stock, true, strict=True):
        assert relative_error(a, b) < 1e-5
        assert relative_error(a, t) < 1e-6
        assert a.shape == b.shape


def test_rows_without_upstream_gradient_are_left_out_of_the_backward_products(monkeypatch):
    from revisual_fast.kernels import plan

    monkeypatch.setitem(plan.SAVED_BYTES, "cpu", 0)

    def flops(rows: int) -> float:
        x = make()
        for upstream in x["upstream"]:
            upstream[:] = 1.0
            upstream[: N - rows] = 0
        run = lambda: gradients(x, *linear_cross_entropy(x["hidden"], x["weight"], x["labels"]))  # noqa: E731
        return count_gemm_flops(run) / (2 * D * V)

    assert flops(N) == 4 * N
    assert flops(6) == N + 3 * 6


def test_only_the_needed_rows_are_computed():
    x = make()
    needed = torch.arange(N) >= 10
    every = linear_cross_entropy(x["hidden"], x["weight"], x["labels"])
    with needed_rows(needed):
        some = linear_cross_entropy(x["hidden"], x["weight"], x["labels"])
        other = linear_cross_entropy(x["hidden"][:, :5], x["weight"], x["labels"][:, :5])  # not these rows: all of them
    assert not other[0].isnan().any()
    for a, b in zip(some, every, strict=True):
        assert a[:10].isnan().all()
        assert relative_error(a[10:], b[10:]) < 1e-6
    cut = [out.masked_fill(~needed, 0) for out in some]
    for a, b in zip(gradients(x, *cut), gradients(x, *every), strict=True):
        assert relative_error(a, b) < 1e-6
    assert not linear_cross_entropy(x["hidden"], x["weight"], x["labels"])[0].isnan().any()


def test_a_weight_narrower_than_the_hidden_states():
    """As under autocast outside of FSDP: verl's kernel takes it."""
    x = make()
    logp, _ = linear_cross_entropy(x["hidden"], x["weight"].bfloat16(), x["labels"])
    expected, _ = linear_cross_entropy(x["hidden"].bfloat16(), x["weight"].bfloat16(), x["labels"])
    assert torch.equal(logp, expected)


@pytest.mark.parametrize("other", [{"reduction": "mean"}, {"dist_process_group": object()}])
def test_what_it_does_not_do_is_left_to_verl(other):
    """verl's own kernels, which refuse the CPU."""
    x = make()
    with pytest.warns(RuntimeWarning, match="is left to verl's own linear_cross_entropy"), pytest.raises(Exception):  # noqa: B017
        linear_cross_entropy(x["hidden"], x["weight"], x["labels"], **other)
