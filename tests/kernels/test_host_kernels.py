"""The CUDA row kernels run on the host, thread by thread: barriers, pipelines, clusters, not only the mathematics."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective, TokenBatch
from revisual_fast.kernels.plan import CORRECTIONS, KL_FORMS, SURROGATES, Inline, Part
from revisual_fast.kernels.reference import TorchChunk, Transform
from revisual_fast.library import make_plan
from tests.kernels.test_host_rows import COMPILER, KINDS, ROOT, pointer
from tests.numerics import relative_error

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
MOST_BLOCKS = 4
GRPO = PolicyObjective(kl_coef=0.1, entropy_coef=0.05)
POINTER = ctypes.c_void_p


class Launch(ctypes.Structure):
    """What a kernel is launched with; as in host_kernels.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int)
            for name in ["kernel", "from", "to", "threads", "blocks", "clusters", "stages", "packs", "seed"]
        ),
        *((name, ctypes.c_int64) for name in ["n", "V", "places", "stride", "out_stride"]),
        *((name, POINTER) for name in ["z", "out", "bias", "targets", "index", "temperature", "mask"]),
        ("softcap", ctypes.c_float),
        *((name, POINTER) for name in ["logp", "entropy", "top", "sum", "losses", "c", "e"]),
        *((name, POINTER) for name in ["advantages", "old", "ref", "rollout", "weight"]),
        *((name, ctypes.c_int) for name in ["surrogate", "kl", "kl_bias", "correction"]),
        ("numbers", ctypes.c_float * 9),
    )


class Device:
    """Copies of the kernels, one for each block of a cluster."""

    def __init__(self, made: Path) -> None:
        self.copies = []
        for rank in range(MOST_BLOCKS):
            copy = made.with_name(f"block{rank}.so")
            shutil.copy(made, copy)
            self.copies.append(ctypes.CDLL(str(copy)))
        self.threads, self.anchors = (POINTER * MOST_BLOCKS)(), (POINTER * MOST_BLOCKS)()
        for rank, copy in enumerate(self.copies):
            copy.thread_address.restype = copy.anchor_address.restype = POINTER
            self.threads[rank], self.anchors[rank] = copy.thread_address(), copy.anchor_address()

    def run(self, **fields: Any) -> None:
        given = {name: pointer(value) if isinstance(value, Tensor) else value for name, value in fields.items()}
        launch, message = Launch(**given), ctypes.create_string_buffer(256)
        failed = self.copies[0].launch(ctypes.byref(launch), self.threads, self.anchors, message)
        assert not failed, message.value.decode()


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    made = tmp_path_factory.mktemp("host_kernels") / "kernels.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-fno-gnu-unique", "-Wl,-Bsymbolic", f"-I{ROOT}/csrc"]  # static variables are each copy's own
    source = Path(__file__).parent / "host_kernels.cpp"
    subprocess.run([str(COMPILER), *flags, str(source), "-o", str(made)], check=True)
    return Device(made)


class Rows:
    """Logits somewhere in memory that holds nan elsewhere, and everything that belongs to the rows."""

    def __init__(
        self,
        n: int,
        v: int,
        dtype: torch.dtype,
        out_dtype: torch.dtype | None = None,
        offset: int = 0,
        gap: int = 0,
        masked: bool = False,
        full: bool = False,
    ) -> None:
        g = torch.Generator().manual_seed(n + v)
        size = n * (v + gap) + offset + 16
        self.memory = torch.full((size,), float("nan"), dtype=dtype)
        self.z = self.memory[offset:].as_strided((n, v), (v + gap, 1))
        self.z.copy_(torch.randn(n, v, generator=g) * 3)
        self.out_memory = torch.full((size,), float("nan"), dtype=out_dtype or dtype)
        self.out = self.out_memory[offset:].as_strided((n, v), (v + gap, 1))
        self.targets = torch.randint(v, (n,), generator=g)
        self.targets[0], self.targets[-1] = 0, v - 1
        self.mask = torch.arange(n) % 3 != 1 if masked else None
        self.temperature = torch.linspace(0.7, 1.3, n) if full else None
        self.softcap, self.bias = (5.0, torch.linspace(-1, 1, v)) if full else (0.0, None)
        advantages, old, ref = torch.randn(3, n, generator=g)
        self.tokens = TokenBatch(advantages, old - 7, ref - 7, mask=self.mask)
        self.vectors = {name: torch.full((n,), float("nan")) for name in ("logp", "entropy", "top", "sum", "losses")}
        self.c, self.e = torch.full((2, n), float("nan"))
        if self.mask is not None:
            self.z[~self.mask] = float("nan")
            self.targets[~self.mask] = -100

    def launch(self, device: Device, kernel: int, places: int | None = None, **fields: Any) -> None:
        n, v = self.z.shape
        of = {"kernel": kernel, "from": KINDS[self.z.dtype], "to": KINDS[self.out.dtype], "threads": 64, "blocks": 1}
        of |= {"n": n, "V": v, "places": n if places is None else places, "stride": self.z.stride(0)}
        of |= {"z": self.z, "out": self.out, "out_stride": self.out.stride(0), "targets": self.targets}
        of |= {"bias": self.bias, "temperature": self.temperature, "mask": self.mask, "softcap": self.softcap}
        device.run(**(of | self.vectors | {"c": self.c, "e": self.e} | fields))

    def solve(self, device: Device, o: PolicyObjective, **fields: Any) -> None:
        """The whole loss, in place of the logits where ``out`` is given."""
        _, plan = make_plan(o, self.tokens, self.z, skip=False)
        inline: Inline | None = plan.inline
        assert inline is not None
        names = ("advantages", "old", "ref", "rollout", "weight")
        of: dict[str, Any] = dict(zip(names, inline.vectors(slice(0, len(self.z))), strict=True))
        of |= {"surrogate": SURROGATES[inline.surrogate], "kl": KL_FORMS[inline.kl]}
        of |= {"kl_bias": inline.kl_bias_correction, "correction": CORRECTIONS[inline.correction]}
        of["numbers"] = (ctypes.c_float * 9)(*inline.numbers)
        of |= {} if inline.has_entropy else {"e": None}
        self.launch(device, **{"kernel": 2, **of, **fields})

    def check(self, z: Tensor, o: PolicyObjective) -> None:
        """Against float64; ``z``: the logits, if they have been overwritten."""
        temperature = None if self.temperature is None else self.temperature.double()
        bias = None if self.bias is None else self.bias.double()
        transform = Transform(temperature, self.softcap or None, self.mask)
        exact = TorchChunk(z.double(), self.targets, transform, bias)
        _, plan = make_plan(o, self.tokens, z.double(), skip=False)
        loss, c, e = plan.gradients(exact.logp, exact.entropy, Part(slice(0, len(z))))
        for name, wanted in (("logp", exact.logp), ("entropy", exact.entropy)):
            torch.testing.assert_close(self.vectors[name].double(), wanted, rtol=1e-6, atol=1e-6)
        assert self.vectors["losses"].sum().item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        assert relative_error(self.c, c) < 1e-4
        unit = torch.finfo(self.out.dtype).eps
        assert relative_error(self.out, exact.gradient(c, e)) < max(unit, 1e-5)
        if self.mask is not None:
            assert not self.out[~self.mask].any()

    def check_surroundings(self) -> None:
        """Nothing but the rows was written."""
        for memory, rows in ((self.memory, self.z), (self.out_memory, self.out)):
            beside = torch.ones(len(memory), dtype=torch.bool)
            beside[rows.storage_offset() :].as_strided(rows.shape, rows.stride()).fill_(False)
            assert memory[beside].isnan().all()


DTYPES = [(d, d) for d in KINDS] + [(torch.float32, torch.bfloat16)]
PLACES = [(0, 0), (3, 0), (5, 6)]  # of the first element, and what lies between rows


@pytest.mark.parametrize(("offset", "gap"), PLACES)
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 11, 701])
def test_the_loss_in_one_kernel(
    device: Device, v: int, dtype: torch.dtype, out_dtype: torch.dtype, offset: int, gap: int
) -> None:
    rows = Rows(4, v, dtype, out_dtype, offset, gap, masked=True)
    rows.solve(device, GRPO)
    rows.check(rows.z, GRPO)
    rows.check_surroundings()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_statistics_then_gradient(device: Device, dtype: torch.dtype, full: bool) -> None:
    rows = Rows(5, 401, dtype, masked=True, full=full)
    rows.launch(device, 0)
    exact = TorchChunk(
        rows.z.double(),
        rows.targets,
        Transform(None if rows.temperature is None else rows.temperature.double(), rows.softcap or None, rows.mask),
        None if rows.bias is None else rows.bias.double(),
    )
    assert relative_error(rows.vectors["logp"], exact.logp) < 1e-6
    assert relative_error(rows.vectors["entropy"], exact.entropy) < 1e-6
    rows.c.copy_(torch.randn(5))
    rows.e.copy_(torch.randn(5))
    index = torch.tensor([4, 1, 2])
    rows.launch(device, 1, places=3, index=index)
    wanted = exact.gradient(rows.c.double(), rows.e.double(), index)
    assert relative_error(rows.out[:3], wanted) < max(torch.finfo(dtype).eps, 1e-5)
    assert rows.out[3:].isnan().all()


# V, blocks and stages of a cluster, clusters; with more rows than clusters times stages the barriers are used again.
SHAPES = [(16, 1, 2, 1), (203, 2, 2, 1), (203, 4, 2, 1), (203, 4, 1, 1), (203, 2, 2, 3), (9, 4, 2, 1), (203, 2, 1, 12)]
SHAPES += [(1203, 2, 2, 1)]  # both warps of a block have a part of the row


@pytest.mark.parametrize(("v", "blocks", "stages", "clusters"), SHAPES)
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES, ids=str)
def test_the_loss_in_clusters(
    device: Device, dtype: torch.dtype, out_dtype: torch.dtype, v: int, blocks: int, stages: int, clusters: int
) -> None:
    packs = -(-(v * dtype.itemsize // 16) // blocks)
    of = {"kernel": 3, "blocks": blocks, "stages": stages, "clusters": clusters, "packs": packs}
    for masked, offset in ((False, 0), (True, 3)):
        rows = Rows(9, v, dtype, out_dtype, offset, gap=5 * masked, masked=masked)
        rows.solve(device, GRPO, **of, seed=v)
        rows.check(rows.z, GRPO)
        rows.check_surroundings()


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("full", [False, True])
def test_in_place(device: Device, full: bool, kernel: int) -> None:
    rows = Rows(7, 131, torch.bfloat16, offset=1, full=full)
    z, rows.out = rows.z.clone(), rows.z
    rows.solve(device, GRPO, kernel=kernel, blocks=2, stages=2, clusters=1, packs=8)
    rows.check(z, GRPO)
    rows.check_surroundings()


@pytest.mark.parametrize("settings", [{"surrogate": "sft"}, {"surrogate": "cispo"}, {"kl_coef": 0.3, "kl": "k2"}])
def test_other_objectives_in_clusters(device: Device, settings: dict[str, Any]) -> None:
    rows, o = Rows(5, 131, torch.float32), PolicyObjective(**settings)
    rows.tokens = replace(rows.tokens, old_logp=None)
    rows.solve(device, o, kernel=3, blocks=2, stages=2, clusters=1, packs=17)
    rows.check(rows.z, o)


@pytest.mark.parametrize(("offset", "gap"), PLACES)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_scaling(device: Device, dtype: torch.dtype, offset: int, gap: int) -> None:
    for v, blocks, down in ((1, 1, 1), (13, 1, 2), (1203, 2, 2)):
        for factor in (1.0, -0.3):
            rows = Rows(5, v, dtype, offset=offset, gap=gap)
            rows.out.copy_(rows.z)
            if factor == 1.0:
                rows.out[2] = float("nan")  # which nobody looks at
            rows.launch(device, 4, places=blocks * down, blocks=blocks, weight=torch.tensor([factor]))
            wanted = (rows.z.float() * factor).to(dtype)
            if factor == 1.0:
                wanted[2] = float("nan")
            assert torch.equal(rows.out.nan_to_num(99), wanted.nan_to_num(99))
            rows.check_surroundings()


def test_rows_without_gradient_are_not_read_again(device: Device) -> None:
    """Zeros where c and e are 0: from statistics, whatever the logits have become since; and in one kernel."""
    rows = Rows(4, 301, torch.bfloat16)
    rows.launch(device, 0)
    rows.c.copy_(torch.tensor([1.0, 0.0, 0.0, 2.0]))
    rows.e.copy_(torch.tensor([0.5, 0.0, 0.3, 0.0]))
    rows.z[1] = float("nan")
    rows.launch(device, 1)
    assert rows.out.isfinite().all()
    assert [bool(row.any()) for row in rows.out] == [True, False, True, True]
    for kernel in (2, 3):
        rows, o = Rows(6, 301, torch.float32, offset=1), PolicyObjective()
        advantages = torch.tensor([1.0, 0.0, -1.0, 0.0, 0.0, 2.0])
        rows.tokens = TokenBatch(advantages)
        rows.solve(device, o, kernel=kernel, blocks=2, stages=2, clusters=1, packs=38)
        rows.check(rows.z, o)
        assert [bool(row.any()) for row in rows.out] == (advantages != 0).tolist()
        rows.check_surroundings()
