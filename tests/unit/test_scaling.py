"""A gradient times a factor that is read where it lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective, TokenBatch, linear_policy_loss, policy_loss_from_logits
from revisual_fast.kernels.scaling import scale_
from tests.devices import ALL_BACKENDS, DEVICE, ON_DEVICE

pytestmark = ON_DEVICE
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def factor(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1.0, 0.0, -0.37, float("nan")])
def test_the_product_is_rounded_once(value: float, dtype: torch.dtype, backend: str) -> None:
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels are for bf16, fp16 and fp32")
    g = torch.Generator().manual_seed(0)
    for shape in ((0, 7), (1, 1), (3, 5000), (70_001,)):
        x = torch.randn(shape, generator=g).to(DEVICE, dtype)
        wanted = (x.to(torch.promote_types(dtype, torch.float32)) * value).to(dtype)
        place = x.data_ptr()
        got = scale_(x, factor(value, dtype), backend)
        assert got.data_ptr() == place
        # the interpreter's casts to 16 bits truncate
        rtol = torch.finfo(dtype).eps if backend == "triton" and DEVICE == "cpu" else 0.0
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_rows_with_a_gap(backend: str) -> None:
    memory = torch.full((4, 300), float("nan"), device=DEVICE)
    rows = memory[:, 3:293]
    rows.copy_(torch.arange(290))
    scale_(rows, factor(2.0, torch.float32), backend)
    assert torch.equal(rows, 2 * torch.arange(290.0, device=DEVICE).expand(4, -1))
    assert memory[:, :3].isnan().all()
    assert memory[:, 293:].isnan().all()


def problem() -> tuple[Tensor, Tensor, Tensor, TokenBatch]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=g).to(DEVICE).requires_grad_() for n in (14, 19))
    targets, advantages = torch.randint(19, (14,), generator=g), torch.randn(14, generator=g)
    return hidden, weight, targets.to(DEVICE), TokenBatch(advantages.to(DEVICE))


def test_the_gradient_is_handed_on_and_copied_only_where_the_graph_is_kept() -> None:
    """Once, the gradients that were made with the loss are the ones that arrive; kept, each pass has its own."""
    hidden, weight, targets, tokens = problem()
    loss = linear_policy_loss(hidden, weight, targets, tokens, PolicyObjective()).loss
    saved = [t.data_ptr() for t in loss.grad_fn.saved_tensors]  # type: ignore[union-attr]
    first = torch.autograd.grad(3 * loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    assert not {t.data_ptr() for t in (*first, *second)}.intersection(saved)
    torch.testing.assert_close(first, tuple(3 * t for t in second))
    last = torch.autograd.grad(3 * loss, [hidden, weight])
    assert [t.data_ptr() for t in last] == saved
    torch.testing.assert_close(last, first)


def test_gradients_accumulate_over_losses() -> None:
    """What a leaf was handed is added to later, and nothing else changes with it."""
    hidden, weight, targets, tokens = problem()
    for _ in range(3):
        linear_policy_loss(hidden, weight, targets, tokens, PolicyObjective()).loss.backward()
    once = torch.autograd.grad(
        linear_policy_loss(hidden, weight, targets, tokens, PolicyObjective()).loss, [hidden, weight]
    )
    torch.testing.assert_close([hidden.grad, weight.grad], [3 * t for t in once])


@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_in_place_there_is_one_backward_pass(upstream: float) -> None:
    hidden, weight, targets, tokens = problem()
    loss = policy_loss_from_logits(hidden @ weight.T, targets, tokens, PolicyObjective(), inplace=True).loss
    (upstream * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (upstream * loss).backward()
