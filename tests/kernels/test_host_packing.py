"""What can be run of the packing kernels without a CUDA device: the kernels themselves, compiled for the host, against
torch; and all of Python's side.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from revisual_fast.kernels import cuda_library, embed, gather, prefix, row_sums
from revisual_fast.kernels import mrope as mrope_module
from revisual_fast.kernels.mrope import mrope, mrope_axis
from revisual_fast.kernels.row_sums import transposed

HERE = Path(__file__).parent
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SHAPES = pytest.mark.parametrize(("width", "wide"), [(64, True), (264, True), (64, False), (7, False)])
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Undefined behaviour, misaligned accesses among it, ends the process."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("host") / "packing.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover", "-static-libubsan"]
    source = [HERE / "host_packing.cpp", "-I", HERE.parents[1] / "csrc"]
    subprocess.run(["g++", *flags, *source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


class Matrix(ctypes.Structure):
    """A tensor ``[count, width]``; as in host_packing.cpp."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("count", "stride", "width")))


class Heads(ctypes.Structure):
    """Tensors ``[T, count, d]``; as in host_packing.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("given", "out")),
        ("count", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 4),
    )


def matrix(x: Tensor) -> Matrix:
    return Matrix(x.data_ptr(), len(x), x.stride(0), x.shape[1])


def matrices(*tensors: Tensor) -> ctypes.Array[Matrix]:
    return (Matrix * len(tensors))(*map(matrix, tensors))


def heads(given: Tensor, out: Tensor) -> Heads:
    strides = (ctypes.c_int64 * 4)(*given.stride()[:2], *out.stride()[:2])
    return Heads(given.data_ptr(), out.data_ptr(), given.shape[1], strides)


def call(function: Any, *arguments: Any) -> None:
    """Vectors go as pointers, structures by reference, integers as int64 but for flags."""
    kinds = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_float}
    given = []
    for a in arguments:
        if isinstance(a, Tensor):
            given.append(ctypes.c_void_p(a.data_ptr()))
        else:
            given.append(
                kinds[type(a)](a) if type(a) in kinds else a if isinstance(a, ctypes.Array) else ctypes.byref(a)
            )
    assert not function(*given), "the reason stands on stderr"


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@SHAPES
@TYPES
def test_embeddings(host, width, wide, dtype):
    g = torch.Generator().manual_seed(0)
    table, features = random(30, width + 8, dtype=dtype)[:, :width], random(9, width, dtype=dtype, seed=1)
    ids, index = torch.randint(30, (50,), generator=g), torch.full((50,), -1)
    index[10:30] = torch.randint(9, (20,), generator=g)
    expected = torch.where((index == -1)[:, None], table[ids], features[index])
    bad = [(3, 30, -1), (4, -1, -1), (12, 0, 9), (13, 0, -2)]
    for row, token, feature in bad:
        ids[row], index[row], expected[row] = token, feature, torch.nan
    out = torch.full((50, width), 7.0, dtype=dtype)
    call(host.pack_embeddings, DTYPES[dtype], wide, 32, ids, index, matrix(table), matrix(features), matrix(out))
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@SHAPES
@TYPES
def test_keys_and_values(host, width, wide, dtype):
    widths = width, 2 * width
    sources = [random(9, w + 8, dtype=dtype, seed=w)[:, :w] for w in widths]
    index = torch.tensor([8, 0, 3, 3, 9, -1, 7, 1 << 40])
    outs = [torch.full((len(index), w), 7.0, dtype=dtype) for w in widths]
    call(host.gather_pair, DTYPES[dtype], wide, 32, index, *map(matrix, (*sources, *outs)))
    for source, out in zip(sources, outs, strict=True):
        torch.testing.assert_close(out, row_sums.rows_or_nan(source, index), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("to_float", [False, True])
@SHAPES
@TYPES
def test_sums(host, width, wide, dtype, to_float):
    index = torch.tensor([2] * 100 + [0, 5, 5, -1, 6, 5, 9] + [3] * 31 + [4] * 32)  # rows 2 and 4 are long, 1 is empty
    known = (index >= 0) & (index < 7)
    order, indptr = transposed(index, 7)
    entries = torch.bincount(index[known], minlength=7)[:, None]
    for widths in ((width,), (32 if wide else 1, width)):  # the second of two tensors is the wider one
        sources = [random(len(index), w + 8, dtype=dtype, seed=w)[:, :w] for w in widths]
        outs = [torch.full((7, w), 7.0, dtype=torch.float32 if to_float else dtype) for w in widths]
        where = (order, len(order), indptr, len(widths), matrices(*sources), matrices(*outs))
        call(host.segment_sums, DTYPES[dtype], wide, 64, to_float, *where)
        for source, out in zip(sources, outs, strict=True):
            exact, size = (
                torch.zeros(out.shape, dtype=torch.float64).index_add_(0, index[known], x[known].double())
                for x in (source, source.abs())
            )
            # additions in fp32 in any order (Higham, Accuracy and Stability, section 4.2), and one rounding
            bound = entries * 2**-24 * size + torch.finfo(out.dtype).eps * exact.abs()
            assert bool(((out - exact).abs() <= bound).all())
            in_order = torch.zeros(out.shape).index_add_(0, index[known], source[known].float()).to(out.dtype)
            short = [0, 1, 3, 5, 6]
            assert torch.equal(out[short], in_order[short])
            assert bool((out[1] == 0).all())


def test_long_segments_wherever_they_begin(host):
    """Every long segment is found once, whatever lies before it; a sum that nobody makes stays 7."""
    g = torch.Generator().manual_seed(0)
    for lengths in ([32], [31, 32], [1, 32, 32], [0, 33, 0, 31, 64, 0], torch.randint(70, (20,), generator=g).tolist()):
        for before in (0, 1, 31, 32, 33):
            index = torch.cat(
                [torch.full((before,), -1), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))]
            )
            order, indptr = transposed(index, len(lengths))
            source, out = torch.ones(len(index), 1), torch.full((len(lengths), 1), 7.0)
            where = (order, len(order), indptr, 1, matrices(source), matrices(out))
            call(host.segment_sums, 2, False, 32, False, *where)
            assert out.flatten().tolist() == lengths


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("half", "wide"), [(64, True), (8, True), (64, False), (3, False)])
@TYPES
def test_mrope(host, half, wide, dtype, inverse):
    tokens, counts = 12, (3, 2)
    inputs = [random(n, tokens, 2 * half, dtype=dtype, seed=n).transpose(0, 1) for n in counts]
    positions = torch.randint(131_072, (3, tokens), generator=torch.Generator().manual_seed(1))
    inv_freq = 1e6 ** -(torch.arange(half) / half)
    axis = mrope_axis([half - 2 * (half // 3), half // 3, half // 3])
    turned = []
    for dtype_there in (dtype, torch.float64):
        given = [x.to(dtype_there).requires_grad_() for x in inputs]
        out = mrope(*given, positions, inv_freq, axis, 1.25)
        up = [x.to(dtype_there) for x in inputs]
        turned.append(torch.autograd.grad(out, given, up) if inverse else [x.detach() for x in out])
    fresh = [torch.zeros(tokens, n, 2 * half, dtype=dtype) for n in counts]
    for outs in (fresh, inputs):  # the last in place
        angles = (positions, tokens, tokens, inv_freq, axis, half, 1.25, inverse)
        call(host.mrope, DTYPES[dtype], wide, 32, *angles, *map(heads, inputs, outs))
        for out, plain, exact in zip(outs, *turned, strict=True):
            assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_an_axis_that_is_none_gives_nan(host):
    x, positions = torch.ones(1, 1, 4), torch.zeros(3, 1, dtype=torch.int64)
    axis = torch.tensor([0, 3], dtype=torch.int8)
    angles = (positions, 1, 1, torch.ones(2), axis, 2, 1.0, False)
    call(host.mrope, 2, False, 32, *angles, heads(x, x), heads(x[:, :0], x[:, :0]))
    assert x.flatten().isnan().tolist() == [False, True, False, True]


def test_cosines_and_sines_of_large_angles(host):
    """One unit in the last place of 1: the argument is rounded once, and so are the two terms of each result."""
    g = torch.Generator().manual_seed(0)
    n = 200_000
    positions = torch.randint(1 << 20, (n,), generator=g)
    positions[: n // 2] %= 1000
    inv_freq = (1e6 ** -torch.rand(n, generator=g)).clone()
    inv_freq[::5] = 1.0
    cosine, sine = torch.empty(2, n).unbind()
    call(host.cos_sins, positions, inv_freq, n, cosine, sine)
    angle = positions.double() * inv_freq.double()
    for got, exact in ((cosine, angle.cos()), (sine, angle.sin())):
        assert (got - exact).abs().max() <= torch.finfo(torch.float32).eps
    assert bool((cosine[positions == 0] == 1).all())
    assert bool((sine[positions == 0] == 0).all())


def test_the_ops_are_called_as_their_schemas_say(monkeypatch):
    """Through tensors without data, forward and backward: what the CUDA backend does but for its kernels."""
    if (problem := cuda_library.load()) is not None:
        pytest.skip(f"the CUDA kernels are {problem}")
    for module in (embed, gather, mrope_module, prefix, row_sums):
        monkeypatch.setattr(module, "packing_backend", lambda *_: "cuda")
    monkeypatch.setattr(embed, "_check", lambda *_: None)
    called = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "revisual_fast_cuda":
                called.add(function._opname)
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        index = torch.zeros(5, dtype=torch.int64)
        table = torch.zeros(7, 8, dtype=torch.bfloat16, requires_grad=True)
        features = torch.zeros(3, 8, dtype=torch.float16, requires_grad=True)
        out = embed.pack_embeddings(index, table, features, index)
        assert (out.shape, out.dtype) == ((5, 8), torch.bfloat16)
        gradients = torch.autograd.grad(
            out.sum() + gather.GatherRows.apply(table, index, "cuda").sum(), (table, features)
        )
        assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in (table, features)]
        key, rows = torch.zeros(7, 2, 8, requires_grad=True), prefix.KVRows(index, 7, *transposed(index, 7))
        for wanted in (slice(2), slice(1)):
            copies = prefix.gather_kv(key, key, rows)
            assert [x.shape for x in copies] == [(5, 2, 8), (5, 2, 8)]
            assert torch.autograd.grad(sum(x.sum() for x in copies[wanted]), key)[0].shape == key.shape
        angles = (torch.zeros(3, 7, dtype=torch.int64), torch.zeros(4), torch.zeros(4, dtype=torch.int8))
        for turned in (mrope(key, key, *angles), mrope_module.mrope_(key * 1, key * 1, *angles)):
            assert torch.autograd.grad(turned[0].sum() + turned[1].sum(), key)[0].shape == key.shape
    assert called == {"pack_embeddings", "gather_pair", "segment_sums", "mrope"}
