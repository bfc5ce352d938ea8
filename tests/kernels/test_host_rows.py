"""The mathematics of the CUDA row kernels, run on the host: csrc/objective.cuh and csrc/rows.cuh, without a GPU."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective
from revisual_fast.kernels.plan import CORRECTIONS, KL_FORMS, SURROGATES, Part
from revisual_fast.kernels.reference import TorchChunk, Transform
from revisual_fast.library import make_plan
from tests.numerics import INLINED_SETTINGS, inlined_objectives, make_tokens, relative_error

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
PAIRS = [*((dtype, dtype) for dtype in KINDS), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    made = tmp_path_factory.mktemp("host") / "rows.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{ROOT}/csrc"]
    subprocess.run([str(COMPILER), *flags, str(Path(__file__).parent / "host_rows.cpp"), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    assert t is None or t.stride(-1) == 1
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def row_pass(
    host: ctypes.CDLL,
    z: Tensor,  # [V]
    out: Tensor,  # [V]
    target: int,
    c: float,
    e: float,
    blocks: int = 1,
    threads: int = 64,
    temperature: float = 1.0,
    softcap: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[float, float]:
    """logp and entropy of a row; its gradient goes to ``out``."""
    statistics = torch.empty(2)
    of = (KINDS[z.dtype], KINDS[out.dtype], pointer(z), pointer(out), len(z), target, blocks, threads)
    numbers = [ctypes.c_float(x) for x in (temperature, softcap)]
    host.row_pass(*of, *numbers, pointer(bias), ctypes.c_float(c), ctypes.c_float(e), pointer(statistics))
    return statistics[0].item(), statistics[1].item()


def logits_of(kind: str, v: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    z = torch.randn(v, generator=torch.Generator().manual_seed(v)) * 3
    target = v // 2
    if kind == "peaked":
        z, target = z * 30, int(z.argmax())
    elif kind == "all negative":
        z -= 1000
    elif kind == "minus infinity":
        z[torch.arange(v) % 3 != target % 3] = -float("inf")
    return z.to(dtype), target


def exact(z: Tensor, target: int, c: float, e: float) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and gradient in the dtype of ``z``."""
    z = z.detach().requires_grad_()
    log_p = z.log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum()
    (dz,) = torch.autograd.grad(c * log_p[target] + e * entropy, z)
    return log_p[target].detach(), entropy.detach(), dz


def rounding(z: Tensor, target: int, c: float, e: float, terms: float) -> Tensor:
    """``[V]`` what fp32 may cost an entry of the gradient, whose terms have this size: some units in the last place for
    the arithmetic, for the exponent ``log2 p``, and ``2 sqrt(n)`` for sums of n terms (Higham and Mary, SIAM J. Sci.
    Comput. 41, 2019).
    """
    log_p = z.double().log_softmax(-1).clamp(min=-1e30)
    size = log_p.exp() * (abs(c) + abs(e) * (log_p.abs() - (log_p.exp() * log_p).sum()))
    return (2**-22 + 2**-24 * (log_p.abs() + 2 * terms**0.5)) * (size + abs(c) * (torch.arange(len(z)) == target))


# Where the elements of a row begin: aligned to 16 bytes, and off by some of its elements.
OFFSETS = (0, 1, 3)


@pytest.mark.parametrize("v", [1, 2, 7, 8, 9, 31, 127, 1000, 4097, 33_001])
@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "peaked", "all negative", "minus infinity"])
def test_error_is_bounded_by_plain_torch(
    host: ctypes.CDLL, kind: str, dtype: torch.dtype, out_dtype: torch.dtype, v: int
) -> None:
    """logp, entropy and gradient against float64, beside fp32 torch; nothing but the row is written."""
    z, target = logits_of(kind, v, dtype)
    c, e = 1.3, 0.4
    wanted, plain = exact(z.double(), target, c, e), exact(z.float(), target, c, e)
    for offset, (blocks, threads) in itertools.product(OFFSETS, ((1, 32), (1, 96), (4, 64))):
        memory = torch.full((v + 32,), float("nan"), dtype=dtype)
        out_memory = torch.full((v + 32,), float("nan"), dtype=out_dtype)
        row, out = memory[offset : offset + v], out_memory[offset : offset + v]
        row.copy_(z)
        logp, entropy = row_pass(host, row, out, target, c, e, blocks, threads)
        scale = z.float().clamp(min=-2e3).abs().max().item()
        assert abs(logp - wanted[0]) <= 2 * abs(plain[0] - wanted[0]) + 2**-23 * scale + 2**-21
        assert abs(entropy - wanted[1]) <= 2 * abs(plain[1] - wanted[1]) + 2**-20
        allowed = 2 * (plain[2].to(out_dtype).double() - wanted[2]).abs().max()
        assert ((out.double() - wanted[2]).abs() <= allowed + rounding(z, target, c, e, v / threads / blocks)).all()
        assert out_memory[:offset].isnan().all()
        assert out_memory[offset + v :].isnan().all()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_in_place_is_the_same(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    z, target = logits_of("plain", 1003, dtype)
    out = torch.empty_like(z)
    beside = row_pass(host, z, out, target, 1.0, -0.5, blocks=2)
    assert row_pass(host, z, z, target, 1.0, -0.5, blocks=2) == beside
    assert torch.equal(z, out)


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_transform_and_bias_as_in_the_reference(
    host: ctypes.CDLL, temperature: float, softcap: float, bias: bool, blocks: int
) -> None:
    z, target = logits_of("plain", 1003, torch.float32)
    b = torch.linspace(-2, 2, 1003) if bias else None
    if b is not None:
        b[17] = -float("inf")
    c, e = torch.tensor([1.3]).double(), torch.tensor([0.4]).double()
    transform = Transform(torch.tensor([temperature]).double(), softcap or None)
    wide = TorchChunk(z.double()[None], torch.tensor([target]), transform, None if b is None else b.double())
    out = torch.full_like(z, float("nan"))
    logp, entropy = row_pass(host, z, out, target, 1.3, 0.4, blocks, 64, temperature, softcap, b)
    assert abs(logp - wide.logp.item()) < 2e-6
    assert abs(entropy - wide.entropy.item()) < 2e-6
    assert relative_error(out, wide.gradient(c, e)[0]) < 2e-6


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("temperature", [0.01, 1.0, 1.45, 1.5, 1.9, 2.0, 2.7, 3.0, 5.3, 7.0, 20.0, 1000.0])
def test_columns_that_cannot_be_drawn(host: ctypes.CDLL, temperature: float, dtype: torch.dtype) -> None:
    """Minus infinity in whole packs, at temperatures on both sides of those that bring its stand-in nearer to 0."""
    for threads, hidden in itertools.product((32, 512), (slice(64, 72), slice(0, 4800), slice(200, 5000))):
        z, target = logits_of("plain", 5000, dtype)
        z[hidden], target = -float("inf"), 100 if hidden.start == 64 else (4900 if hidden.start == 0 else 7)
        out = torch.empty_like(z)
        c, e = 1000 * temperature, 500 * temperature  # so that no gradient underflows
        logp, entropy = row_pass(host, z, out, target, c, e, 1, threads, temperature)
        wanted = exact(z.double() / temperature, target, c, e)
        assert abs(logp - wanted[0]) < 1e-5 * (1 + abs(wanted[0]))
        assert abs(entropy - wanted[1]) < 1e-5
        assert relative_error(out, wanted[2] / temperature) < max(torch.finfo(dtype).eps, 1e-5)


def test_nothing_can_be_drawn(host: ctypes.CDLL) -> None:
    for dtype, temperature in itertools.product(KINDS, (0.5, 1.0, 3.0)):
        z = torch.full((1003,), -float("inf"), dtype=dtype)
        out = torch.zeros_like(z)
        _, entropy = row_pass(host, z, out, 5, 1.0, 0.5, temperature=temperature)
        assert entropy != entropy
        assert out.isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 4, 500])
def test_what_is_not_finite_is_loud(host: ctypes.CDLL, column: int, bad: float) -> None:
    for dtype in KINDS:
        z, target = logits_of("plain", 1003, dtype)
        z[column] = bad
        out = torch.zeros_like(z)
        logp, entropy = row_pass(host, z, out, target, 1.0, 0.5)
        assert logp != logp
        assert entropy != entropy
        assert out.isnan().all()


def test_conversions_are_those_of_torch(host: ctypes.CDLL) -> None:
    bits = torch.arange(1 << 16).to(torch.int32).to(torch.uint16)
    x = torch.cat(
        [torch.randn(20_000) * 10.0 ** torch.randint(-8, 6, (20_000,)), torch.tensor([0.0, -0.0, 1e38, 65520.0])]
    )
    for dtype, kind in ((torch.bfloat16, 0), (torch.float16, 1)):
        wide, narrow = torch.empty(1 << 16), torch.empty(len(x), dtype=dtype)
        host.widen(kind, len(bits), pointer(bits), pointer(wide))
        torch.testing.assert_close(wide, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
        host.narrow(kind, len(x), pointer(x), pointer(narrow))
        assert torch.equal(narrow, x.to(dtype))


# Shared memory of a block alone on one of Hopper's multiprocessors, and of one of two, less what the kernel itself has.
WHOLE, HALF = 227 * 1024 - 640, (228 * 1024 // 2 - 1024) - 640


@pytest.mark.parametrize(
    ("v", "bytes_each", "two", "one"),
    [  # blocks and stages of the cluster: with two blocks on a multiprocessor, with one
        (151_936, 2, (8, 2), (4, 2)),
        (152_064, 2, (8, 2), (4, 2)),
        (248_320, 2, (8, 1), (8, 2)),
        (151_936, 4, (8, 1), (8, 2)),
        (248_320, 4, (8, 1), (8, 1)),
        (32_000, 2, (2, 2), (1, 2)),
        (1000, 2, (0, 0), (0, 0)),  # short rows stay in the first cache
        (1_000_000, 4, (0, 0), (0, 0)),  # eight blocks cannot hold it
    ],
)
def test_the_row_is_laid_into_a_cluster(
    host: ctypes.CDLL, v: int, bytes_each: int, two: tuple[int, int], one: tuple[int, int]
) -> None:
    plan = (ctypes.c_int * 3)()
    for half, wanted in ((HALF, two), (0, one)):
        host.cluster_plan(v, bytes_each, half, WHOLE, plan)
        blocks, stages, packs = plan
        assert (blocks, stages) == wanted
        assert packs * 16 * stages <= WHOLE
        assert packs * blocks * 16 >= (v * bytes_each // 16 * 16 if blocks else 0)


# The objective


@pytest.mark.parametrize("settings", INLINED_SETTINGS, ids=lambda s: "-".join(map(str, s.values())) or "clip")
@pytest.mark.parametrize("on_policy", [False, True], ids=["off", "on"])
def test_every_combination_of_the_objective(host: ctypes.CDLL, settings: dict[str, Any], on_policy: bool) -> None:
    """Loss, c and e of rows in float64 against autograd through ``revisual_fast.losses``."""
    n = 40
    rows = torch.randn(n, 5, generator=torch.Generator().manual_seed(3)).double()
    targets = torch.arange(n) % 5
    tokens = make_tokens({"hidden": rows, "weight": torch.eye(5), "targets": targets}, cu_seqlens=None)
    logp = rows.log_softmax(-1)[torch.arange(n), targets]
    entropy = -(rows.softmax(-1) * rows.log_softmax(-1)).sum(-1)
    advantages = torch.where(torch.arange(n) % 7 == 0, 0, tokens.advantages)
    tokens = replace(tokens, advantages=advantages, old_logp=None if on_policy else tokens.old_logp)
    for o, batch in inlined_objectives(settings, tokens):
        check_objective(host, o, batch, logp, entropy)


def check_objective(host: ctypes.CDLL, o: PolicyObjective, tokens: Any, logp: Tensor, entropy: Tensor) -> None:
    n = len(logp)
    _, plan = make_plan(o, tokens, logp[:, None], skip=False)
    inline = plan.inline
    assert inline is not None
    kinds = (SURROGATES[inline.surrogate], KL_FORMS[inline.kl], int(inline.kl_bias_correction))
    numbers = torch.tensor(inline.numbers, dtype=torch.float64)
    vectors = [logp, entropy, *inline.vectors(slice(0, n))]
    loss, c, e = (torch.full((n,), float("nan"), dtype=torch.float64) for _ in range(3))
    out = [pointer(t) for t in (numbers, *vectors, loss, c, e)]
    host.objective_rows(n, *kinds, CORRECTIONS[inline.correction], int(inline.has_entropy), *out)
    total, wanted_c, wanted_e = plan.gradients(logp, entropy, Part(slice(0, n)))
    torch.testing.assert_close(loss.sum(), total, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(c, wanted_c, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(e, torch.zeros_like(e) if wanted_e is None else wanted_e, rtol=1e-12, atol=1e-14)


def test_a_nan_ratio_is_loud(host: ctypes.CDLL) -> None:
    logp = torch.tensor([float("nan"), -1.0]).double()
    for surrogate in ("clip", "cispo", "sapo", "reinforce"):
        tokens = make_tokens({"hidden": torch.eye(2), "weight": torch.eye(2), "targets": torch.arange(2)})
        _, plan = make_plan(PolicyObjective(surrogate=surrogate), tokens, logp[:, None], skip=False)
        inline = plan.inline
        assert inline is not None
        run: Callable[..., Any] = host.objective_rows
        loss, c, e = (torch.zeros(2).double() for _ in range(3))
        vectors = [logp, -logp, *inline.vectors(slice(0, 2)), loss, c, e]
        numbers = torch.tensor(inline.numbers, dtype=torch.float64)
        run(2, SURROGATES[surrogate], 0, 0, 0, 0, pointer(numbers), *(pointer(t) for t in vectors))
        assert loss.isnan().tolist() == c.isnan().tolist() == [True, False]
