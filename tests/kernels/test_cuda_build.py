"""The built CUDA library loads anywhere, has all ops, spills no register and uses the instructions meant for it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from revisual_fast.kernels.cuda_library import ARCHITECTURES, BUILD, LIBRARY, load
from tests.conftest import CUDA_TABLE
from tests.kernels.cuda_gates import (
    Usage,
    cuobjdump,
    find_cuobjdump,
    instructions,
    kernel_name,
    lacking,
    own_name,
    table,
    usages,
)
from tests.processes import run_code

CSRC = Path(__file__).parents[2] / "csrc"
built = pytest.mark.skipif(not LIBRARY.exists(), reason=f"the CUDA kernels are not built: {BUILD}")
needs_cuobjdump = pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump: pip install triton")

OPS = {  # op -> the arguments it writes into
    "architectures": [],
    "row_statistics": ["logp", "entropy", "top", "total"],
    "row_gradient": ["out"],
    "row_loss": ["out", "logp", "entropy", "losses", "c", "e"],
    "scale_": ["x"],
    "pack_embeddings": ["out"],
    "gather_pair": ["key_out", "value_out"],
    "segment_sums": ["first_out", "second_out"],
    "mrope": ["q_out", "k_out"],
}
EVERYWHERE, CLUSTERS = ("sm_80", "sm_90a", "sm_100"), ("sm_90a", "sm_100")
VECTOR = "ILi[48]E"  # a first template argument that says how many elements go in one access
EXPECTED = {  # how a kernel's name and template arguments begin -> where, and what every such kernel is meant to have
    "cluster_loss_kernel": (CLUSTERS, "UBLKCP SYNCS STAS UCGABAR LDS.128 STG.128 MUFU.EX2"),  # bulk copy, mbarrier, ...
    "loss_kernel": (EVERYWHERE, "LDG.128 STG.128 MUFU.EX2"),
    "gradient_kernel": (EVERYWHERE, "LDG.128 STG.128 MUFU.EX2"),
    "statistics_kernel": (EVERYWHERE, "LDG.128 MUFU.EX2"),
    "scale_kernel": (EVERYWHERE, "LDG.128 STG.128"),
    f"pack_embeddings_kernel{VECTOR}": (EVERYWHERE, "LDG.128 STG.128"),
    f"gather_pair_kernel{VECTOR}": (EVERYWHERE, "LDG.128 STG.128"),
    f"mrope_kernel{VECTOR}": (EVERYWHERE, "LDG.128 STG.128"),
    f"segment_sums_kernel{VECTOR}": (EVERYWHERE, "LDG.128 STG.128"),
    f"long_sums_kernel{VECTOR}": (EVERYWHERE, "LDG.128 STG.128"),
}


@pytest.fixture(scope="module")
def kernels() -> list[Usage]:
    rows = list(usages(cuobjdump("-res-usage", LIBRARY)))
    CUDA_TABLE.parent.mkdir(exist_ok=True)
    CUDA_TABLE.write_text("\n".join(table(rows)) + "\n")
    return rows


@pytest.fixture(scope="module")
def sass() -> dict[str, dict[str, set[str]]]:
    """Architecture -> variant -> its instructions."""
    made = [name for name in ARCHITECTURES.split("+") if name in EVERYWHERE]
    return {name: instructions(cuobjdump("-sass", "-arch", name, LIBRARY)) for name in made}


def schemas() -> Iterator[Any]:
    return (s for s in torch._C._jit_get_all_schemas() if s.name.startswith("revisual_fast_cuda::"))


@built
def test_the_library_is_loaded_and_newer_than_its_sources() -> None:
    assert load() is None
    stale = [
        path.name
        for path in [*CSRC.iterdir(), CSRC.parent / "setup.py"]
        if path.stat().st_mtime > LIBRARY.stat().st_mtime
    ]
    assert not stale, f"{LIBRARY.name} is older than {', '.join(sorted(stale))}: run `make cuda`"


@built
def test_it_loads_in_a_process_of_its_own_without_a_device() -> None:
    code = "from revisual_fast.kernels import cuda_library as c; print(c.load(), c.ARCHITECTURES)"
    assert run_code(code, CUDA_VISIBLE_DEVICES="").split() == ["None", ARCHITECTURES]


@built
def test_the_ops_and_what_they_write_into() -> None:
    found = {}
    for schema in schemas():
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        places = [a.alias_info.before_set for a in schema.arguments if a.alias_info is not None]
        assert len(set().union(*places)) == len(written), f"{schema}: two arguments are declared to be the same memory"
        found[schema.name.removeprefix("revisual_fast_cuda::")] = written
        assert len(schema.returns) == (not written), f"{schema}: results go into arguments"
    assert found == OPS


@built
@needs_cuobjdump
def test_no_kernel_spills(kernels: list[Usage]) -> None:
    made = {name for name in ARCHITECTURES.split("+") if name.startswith("sm_")}
    assert {row.architecture for row in kernels} == made
    assert len({(row.variant, row.architecture) for row in kernels}) == len(kernels) > 0
    spilled = {f"{row.variant} {row.architecture}": row.stack + row.local for row in kernels}
    assert not {name: f"{size} bytes" for name, size in spilled.items() if size}, "registers spill to the stack"


@built
@needs_cuobjdump
@pytest.mark.parametrize("kernel", EXPECTED)
def test_kernels_have_the_instructions_meant_for_them(sass: dict[str, dict[str, set[str]]], kernel: str) -> None:
    architectures, wanted = EXPECTED[kernel]
    if not sass.keys() & architectures:
        pytest.skip(f"the library was built for {ARCHITECTURES}")
    for architecture in sass.keys() & architectures:
        variants = {name: found for name, found in sass[architecture].items() if re.match(kernel, own_name(name))}
        assert variants, f"{architecture} has {sorted({kernel_name(name) for name in sass[architecture]})}"
        missing = {name: lacking(found, wanted.split()) for name, found in variants.items()}
        assert not {name: words for name, words in missing.items() if words}, architecture


USAGE = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN8revisual11loss_kernelIfLi4EEEvPT_:
  REG:40 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN8revisual11loss_kernelI6__halfLi4EEEvPT_:
  REG:32 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_80
"""
SASS = """
	code for sm_90a
		Function : _Z11placeholderPf
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00000a00ff017b82 */
                                                                      /* 0x000ff00000000800 */
        /*0010*/              @!P0 STG.E.EF.128 desc[UR4][R2.64], R4 ; /* 0x0000820000047ab9 */
        /*0020*/                   UCGABAR_ARV ;                      /* 0x0000000502007986 */
		Function : _Z5otherPf
        /*0000*/                   EXIT ;                             /* 0x000000000000794d */
"""


def test_the_use_of_registers_is_read() -> None:
    first, second = usages(USAGE)
    assert (first.kernel, first.architecture) == ("loss_kernel", "sm_90a")
    assert (first.registers, first.stack, first.shared, first.local) == (40, 16, 1024, 8)
    assert (second.registers, second.stack) == (32, 0)
    assert table([first, second]) == ["loss_kernel sm_90a   2 variants, 32 to 40 registers, 24 bytes of stack"]


def test_instructions_are_read() -> None:
    found = instructions(SASS)
    assert found == {"_Z11placeholderPf": {"LDC", "STG.E.EF.128", "UCGABAR_ARV"}, "_Z5otherPf": {"EXIT"}}
    wanted = ("STG.128", "UCGABAR", "LDC", "STG.64", "UCGA", "LDG.128")
    assert lacking(found["_Z11placeholderPf"], wanted) == ["STG.64", "UCGA", "LDG.128"]


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_Z11placeholderPf", "placeholder"),
        ("_ZL11placeholderPf", "placeholder"),
        ("_ZN8revisual11loss_kernelIfLi4EEEvPT_", "loss_kernel"),
        ("_ZN8revisual12_GLOBAL__N_111loss_kernelEPf", "loss_kernel"),
        ("main", "main"),
    ],
)
def test_a_kernels_own_name(mangled: str, name: str) -> None:
    assert kernel_name(mangled) == name
    assert own_name(mangled) == mangled[mangled.index(name) :]
