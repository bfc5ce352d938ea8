"""What a built library holds: the kernels' use of registers and memory, and their instructions, read by cuobjdump."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """One kernel's on one architecture; ``stack`` (where spills and local arrays lie), ``shared``, ``local``: bytes."""

    kernel: str
    variant: str  # the mangled name
    architecture: str
    registers: int
    stack: int
    shared: int
    local: int


def find_cuobjdump() -> str | None:
    """Triton's package brings it; the toolkit does as well."""
    spec = importlib.util.find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(path) if path is not None and path.exists() else shutil.which("cuobjdump")


def cuobjdump(*arguments: str | Path) -> str:
    """What cuobjdump, which is there, prints."""
    command = [find_cuobjdump() or "cuobjdump", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernel_name(mangled: str) -> str:
    """The function's own name: ``_ZN8revisual11loss_kernelIfLi4EEEvPT_`` -> ``loss_kernel``."""
    rest, name = re.sub(r"^_ZN?[KL]*", "", mangled), mangled
    while number := re.match(r"L?(\d+)", rest):
        start, end = number.end(), number.end() + int(number[1])
        name, rest = rest[start:end], rest[end:]
    return name


def own_name(mangled: str) -> str:
    """The mangled name from the function's own on: ``loss_kernelIfLi4EEEvPT_``."""
    return mangled[mangled.index(kernel_name(mangled)) :]


def usages(text: str) -> Iterator[Usage]:
    """Of every kernel in the output of ``cuobjdump -res-usage``."""
    architecture = mangled = ""
    for line in text.splitlines():
        if found := re.search(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            mangled = found[1]
        elif line.lstrip().startswith("REG:"):
            used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
            numbers = (used["REG"], used["STACK"], used["SHARED"], used["LOCAL"])
            yield Usage(kernel_name(mangled), mangled, architecture, *numbers)


def instructions(text: str) -> dict[str, set[str]]:
    """Mangled name -> the instructions that occur in it, in the output of ``cuobjdump -sass``."""
    found: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in text.splitlines():
        if function := re.search(r"Function : (\S+)", line):
            current = found.setdefault(function[1], set())
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
            current.add(instruction[1])
    return found


def lacking(present: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """The wanted ones that no present one is. ``STG.128`` is ``STG.E.EF.128``, ``UCGABAR`` is ``UCGABAR_WAIT``."""
    parts = [instruction.split(".") for instruction in present]

    def there(pattern: str) -> bool:
        first, *rest = pattern.split(".")
        return any(of[0].split("_")[0] == first and set(rest) <= set(of[1:]) for of in parts)

    return [pattern for pattern in wanted if not there(pattern)]


def table(rows: list[Usage]) -> list[str]:
    """One line for each kernel and architecture: variants, registers from the least to the most, bytes on the stack."""
    lines = []
    width = max(len(row.kernel) for row in rows)
    for kernel, architecture in dict.fromkeys((row.kernel, row.architecture) for row in rows):
        of = [row for row in rows if (row.kernel, row.architecture) == (kernel, architecture)]
        registers, stack = [row.registers for row in of], max(row.stack + row.local for row in of)
        used = f"{min(registers)} to {max(registers)} registers, {stack} bytes of stack"
        lines.append(f"{kernel:{width}} {architecture:6} {len(of):3} variants, {used}")
    return sorted(lines)
