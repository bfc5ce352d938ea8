"""The CUDA row kernels on a device: every way a row can be cut, pipelines that wrap around, the same bits each time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective, TokenBatch
from revisual_fast import policy_loss_from_logits as from_logits
from revisual_fast.kernels.dispatch import backend_problem
from tests.numerics import relative_error

PROBLEM = backend_problem("cuda", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(PROBLEM is not None, reason=f"the CUDA kernels are {PROBLEM}")]
GRPO = PolicyObjective(kl_coef=0.1, entropy_coef=0.05)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=[2, 1, 0], ids=["two blocks", "one block", "read twice"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """With the row in a cluster's shared memory, two blocks or one on a multiprocessor, and without."""
    from revisual_fast.kernels import rows_cuda

    monkeypatch.setattr(rows_cuda, "BLOCKS_PER_MULTIPROCESSOR", request.param)
    return request.param


def batch(n: int, v: int, dtype: torch.dtype, offset: int = 0, stride: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits ``[n, v]`` whose first element lies ``offset`` elements into the memory, and targets."""
    g = torch.Generator("cuda").manual_seed(v + n)
    memory = torch.full((n * (stride or v) + offset + 64,), float("nan"), device="cuda", dtype=dtype)
    z = memory[offset:].as_strided((n, v), (stride or v, 1))
    z.copy_(torch.randn(n, v, generator=g, device="cuda") * 3)
    return z, torch.randint(v, (n,), generator=g, device="cuda")


def tokens_for(n: int) -> TokenBatch:
    g = torch.Generator("cuda").manual_seed(n)
    advantages, old, ref = torch.randn(3, n, generator=g, device="cuda")
    return TokenBatch(advantages, old - 9, ref - 9, weight=torch.ones(n, device="cuda"))  # 1/n: fp16 underflows


def outputs(z: Tensor, targets: Tensor, tokens: TokenBatch, backend: str = "cuda") -> list[Tensor]:
    leaf = z.detach().requires_grad_()
    out = from_logits(leaf, targets, tokens, GRPO, backend=backend)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return [out.loss, out.logp, out.entropy, gradient]


def check(got: list[Tensor], z: Tensor, targets: Tensor, tokens: TokenBatch) -> None:
    """Against float64, with what rounding the gradient to its dtype costs."""
    exact = outputs(z.double(), targets, tokens, backend="torch")
    for a, x in zip(got[:3], exact[:3], strict=True):
        assert relative_error(a, x) < 1e-5
    unit = torch.finfo(z.dtype).eps if z.dtype != torch.float32 else 1e-5
    assert relative_error(got[3], exact[3]) < unit


# Shortest row that a cluster takes: 32 KiB. Sizes on both sides of what 1, 2, 4 and 8 blocks of 227 KiB hold twice.
WIDTHS = [1, 7, 127, 4097, 16_384, 33_001, 56_001, 110_003, 151_936, 152_064, 230_001, 248_320]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", WIDTHS)
def test_widths(v: int, dtype: torch.dtype, blocks: int) -> None:
    z, targets = batch(5, v, dtype)
    targets[0], targets[1] = 0, v - 1
    check(outputs(z, targets, tokens_for(5)), z, targets, tokens_for(5))


@pytest.mark.parametrize(("offset", "stride"), [(1, None), (3, 40_005), (5, 40_008), (8, 40_000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_begin_anywhere(dtype: torch.dtype, offset: int, stride: int | None, blocks: int) -> None:
    z, targets = batch(9, 33_003, dtype, offset, stride)
    memory = z.clone()
    got = outputs(z, targets, tokens_for(9))
    check(got, memory, targets, tokens_for(9))
    assert torch.equal(z, memory)


@pytest.mark.parametrize("v", [20_001, 152_064])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_and_nothing_beside_the_rows(dtype: torch.dtype, v: int, blocks: int) -> None:
    z, targets = batch(40, v, dtype, offset=3, stride=v + 5)
    tokens, beside = tokens_for(40), outputs(z, targets, tokens_for(40))
    out = from_logits(z.detach().requires_grad_(), targets, tokens, GRPO, inplace=True, backend="cuda")
    assert torch.equal(out.loss, beside[0])
    assert torch.equal(z, beside[3])
    between = z.as_strided((39, 5), (v + 5, 1), z.storage_offset() + v)
    assert between.isnan().all()


@pytest.mark.parametrize("v", [16_500, 60_001, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_many_rows_give_the_same_bits_every_time(dtype: torch.dtype, v: int, blocks: int) -> None:
    """More rows than clusters times stages, so that every barrier is used again and again; some rows do not count."""
    n = 1500
    z, targets = batch(n, v, dtype)
    tokens = tokens_for(n)
    mask = torch.arange(n, device="cuda") % 7 != 3
    tokens = replace(tokens, mask=mask)
    first = outputs(z, targets, tokens)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs(z, targets, tokens), strict=True))
    assert not first[3][~mask].any()
    some = torch.tensor([0, 1, 2, 701, 702, n - 2, n - 1], device="cuda")
    some = some[mask[some]]
    log_p = z[some].double().log_softmax(-1)
    assert relative_error(first[1][some], log_p.gather(1, targets[some, None])[:, 0]) < 1e-6
    assert relative_error(first[2][some], -(log_p.exp() * log_p).sum(-1)) < 1e-6
    streamed = outputs(z, targets, tokens, backend="triton")
    assert relative_error(first[3], streamed[3]) < 2 * torch.finfo(dtype).eps + 1e-5


def test_reading_once_and_twice_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from revisual_fast.kernels import rows_cuda

    z, targets = batch(64, 151_936, torch.bfloat16)
    found = []
    for blocks in (2, 1, 0):
        monkeypatch.setattr(rows_cuda, "BLOCKS_PER_MULTIPROCESSOR", blocks)
        found.append(outputs(z, targets, tokens_for(64)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert relative_error(a, b) < 2**-8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_numbers_are_loud(dtype: torch.dtype, blocks: int) -> None:
    for bad, column in itertools.product((float("nan"), float("inf")), (0, 5, 33_002)):
        z, targets = batch(3, 33_003, dtype)
        z[1, column] = bad
        loss, logp, entropy, gradient = outputs(z, targets, tokens_for(3))
        assert loss.isnan()
        assert logp.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
        assert gradient.isnan().any(dim=1).tolist() == [False, True, False]


def test_a_cuda_graph_replays_it(blocks: int) -> None:
    z, targets = batch(300, 33_001, torch.bfloat16)
    tokens = TokenBatch(torch.ones(300, device="cuda"))
    wanted = outputs(z, targets, tokens)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        outputs(z, targets, tokens)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(z, targets, tokens)
    graph.replay()
    for a, b in zip(captured, wanted, strict=True):
        assert torch.equal(a, b)
