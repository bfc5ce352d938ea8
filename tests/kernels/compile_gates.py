"""Compiles every Triton kernel that is shipped to a cubin, without a GPU, and prints what it uses, one JSON line each.

Run by ``test_compile_gates.py`` in a process without ``TRITON_INTERPRET``; by hand: ``python compile_gates.py``.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = ("rows_triton", "kept_triton", "groups_triton", "packing_triton", "scaling_triton", "shared_attention_launch")
ARCHITECTURES = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack (where spills go), static shared and local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", out)}


def compiled(gate: tuple[Any, ...], architecture: int, aligned: bool) -> dict[str, Any]:
    """What a kernel uses; pointers are aligned to 16 bytes, as allocators give them, sizes if ``aligned``."""
    kernel, signature, constants, *launch = gate
    names = list(kernel.arg_names)
    places = {(names.index(name),): value for name, value in constants.items()}
    kinds = {name: "constexpr" if name in constants else signature[name] for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if kinds[name].startswith("*") or (aligned and kinds[name] in ("i32", "i64") and name != "n_rows")
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=places, attrs=attributes)
    options = dict(zip(("num_warps", "num_stages"), launch, strict=False))
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    what = {name: str(value) for name, value in constants.items() if value is not None}
    types = [kind for kind in signature.values() if kind.startswith("*")]
    where = {"kernel": kernel.__name__, "sm": architecture, "warps": launch[0], "aligned": aligned}
    return {
        **where,
        "constants": what,
        "pointers": types,
        **usage(built.asm["cubin"]),
        "dynamic_shared": built.metadata.shared,
    }


def main() -> Iterator[dict[str, Any]]:
    """Aligned sizes on every architecture, odd ones on Hopper (but for attention, whose heads are aligned)."""
    for module in MODULES:
        for gate in importlib.import_module(f"revisual_fast.kernels.{module}").gates():
            for architecture in ARCHITECTURES:
                yield compiled(gate, architecture, aligned=True)
            if module != "shared_attention_launch":
                yield compiled(gate, 90, aligned=False)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for row in main():
        print(json.dumps(row))
        sys.stdout.flush()
