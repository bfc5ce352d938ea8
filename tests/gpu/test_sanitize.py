"""Every CUDA kernel once, on small shapes, for compute-sanitizer (``make sanitize``); other tests check the results."""

from __future__ import annotations

import pytest
import torch

from revisual_fast import PolicyObjective, TokenBatch, linear_policy_loss
from revisual_fast import policy_loss_from_logits as from_logits
from revisual_fast.kernels import embed, mrope, prefix
from revisual_fast.kernels.dispatch import backend_problem
from revisual_fast.kernels.gather import gather_rows

PROBLEM = backend_problem("cuda", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(PROBLEM is not None, reason=f"the CUDA kernels are {PROBLEM}")]


# A width that streams, one in clusters of one block, one of several; odd, so that rows begin anywhere.
@pytest.mark.parametrize(("n", "v"), [(5, 1001), (280, 17_001), (150, 130_003)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])  # in one kernel; statistics first, then the gradient
def test_rows(n: int, v: int, dtype: torch.dtype, level: str) -> None:
    z = torch.randn(n, v, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(v, (n,), device="cuda")
    mask = torch.arange(n, device="cuda") % 4 != 1
    cu = torch.tensor([0, n // 2, n], dtype=torch.int32)
    tokens = TokenBatch(torch.randn(n, device="cuda"), torch.full((n,), -10.0, device="cuda"), cu_seqlens=cu, mask=mask)
    o = PolicyObjective(level=level, entropy_coef=0.1)
    (2 * from_logits(z, targets, tokens, o, backend="cuda").loss).backward()
    from_logits(z * 1, targets, tokens, o, softcap=10.0, inplace=True, backend="cuda").loss.backward()
    torch.cuda.synchronize()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_linear_path() -> None:
    hidden = torch.randn(40, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(501, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets, advantages = torch.randint(501, (40,), device="cuda"), torch.randn(40, device="cuda")
    advantages[::3] = 0
    bias = torch.randn(501, device="cuda", requires_grad=True)
    tokens = TokenBatch(advantages)
    linear_policy_loss(hidden, weight, targets, tokens, PolicyObjective(), bias=bias, backend="cuda").loss.backward()
    torch.cuda.synchronize()


@pytest.mark.parametrize("d", [64, 33])
def test_around_packed_rows(d: int) -> None:
    table = torch.randn(50, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    features = torch.randn(6, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids, index = torch.randint(50, (30,), device="cuda"), torch.arange(30, device="cuda") % 9 - 3
    x = embed.pack_embeddings(ids, table, features, index.clamp(min=-1), backend="cuda")
    repeats = torch.cat([torch.arange(40, device="cuda") % 30, torch.full((70,), 3, device="cuda")])  # one long sum
    gather_rows(x, repeats, backend="cuda").float().square().sum().backward()
    head = 2 * (d // 2)
    key, value = torch.randn(2, 30, 2, head, device="cuda", dtype=torch.bfloat16, requires_grad=True).unbind()
    rows = prefix.KVRows.checked(torch.arange(45, device="cuda") % 30, 30)
    k, v = prefix.gather_kv(key, value, rows, backend="cuda")
    q = torch.randn(45, 4, head, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    axis = torch.arange(head // 2, device="cuda").remainder(3).to(torch.int8)
    inv_freq = torch.rand(head // 2, device="cuda")
    positions = torch.arange(45, device="cuda").expand(3, -1)
    q, k = mrope.mrope_(q * 1, k * 1, positions, inv_freq, axis, backend="cuda")
    (q.float().sum() + k.float().square().sum() + v.float().square().sum()).backward()
    torch.cuda.synchronize()
