"""What the build makes, why the CUDA kernels cannot run somewhere, and which backend runs instead."""

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from setuptools.errors import OptionError

from revisual_fast.kernels import cuda_library, dispatch
from revisual_fast.kernels.cuda_library import BUILD, capability_problem, cuda_problem, load_library
from revisual_fast.kernels.dispatch import pick_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DEFAULT = "sm_80+compute_80+sm_90a+sm_100"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py, which builds only as a program."""
    spec = importlib.util.spec_from_file_location("setup_script", Path(__file__).parents[2] / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("8.0", {"compute_80": ["sm_80"]}),
        ("9.0a", {"compute_90a": ["sm_90a"]}),
        ("8.6;9.0a", {"compute_86": ["sm_86"], "compute_90a": ["sm_90a"]}),
        (" 8.0  10.0+PTX ; 12.1", {
            "compute_80": ["sm_80"], "compute_100": ["sm_100", "compute_100"], "compute_121": ["sm_121"]
        }),
    ],
)  # fmt: skip
def test_architectures(build: ModuleType, text: str, made: dict[str, list[str]]) -> None:
    assert build.architectures(text) == made


def test_the_default_architectures(build: ModuleType) -> None:
    made = build.architectures(build.ARCHITECTURES).values()
    assert "+".join(name for names in made for name in names) == DEFAULT


@pytest.mark.parametrize("text", ["7.5", "8.0;7.0+PTX", "90a", "Hopper", "9.0b", "8.0+ptx", " "])
def test_architectures_that_cannot_be_built(build: ModuleType, text: str) -> None:
    with pytest.raises(OptionError, match=r"TORCH_CUDA_ARCH_LIST has .*; wanted: 8\.0 or newer, such as '8\.0"):
        build.architectures(text)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), "sm_80", True),
        ((8, 9), "sm_80", True),
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_80", False),
        ((9, 0), "sm_80+compute_80", True),
        ((9, 0), "sm_90a", True),
        ((10, 0), "sm_90a+compute_90a", False),
        ((10, 3), "sm_100", True),
        ((10, 3), "sm_100a", False),
        ((10, 3), "sm_100f", True),
        ((12, 0), "sm_100+compute_100f", False),
        ((12, 0), "sm_100", False),
        ((12, 0), DEFAULT, True),
        ((7, 5), DEFAULT, False),
    ],
)
def test_code_runs_where_it_can(capability: tuple[int, int], architectures: str, runs: bool) -> None:
    assert (capability_problem(*capability, architectures) is None) is runs


def test_the_reasons_name_the_way_out() -> None:
    assert capability_problem(7, 5, DEFAULT) == "made for compute capability 8.0 and newer, this device has 7.5"
    found = capability_problem(9, 0, "sm_80")
    assert found is not None
    assert found.startswith("built for sm_80, not for this device's compute capability 9.0")
    assert "TORCH_CUDA_ARCH_LIST=9.0a" in found
    assert found.endswith(BUILD)


def test_a_library_that_is_not_there_or_broken(tmp_path: Path) -> None:
    path = tmp_path / "_C.abi3.so"
    assert load_library(path) == f"not built: {BUILD}"
    path.write_text("no library")
    found = load_library(path)
    assert found is not None
    assert found.startswith("built, but cannot be loaded (")
    assert str(path) in found
    assert found.endswith(BUILD)


def test_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "LOAD_PROBLEM", "not built")
    assert cuda_problem(CPU) == cuda_problem(CUDA) == "not built"
    monkeypatch.setattr(cuda_library, "LOAD_PROBLEM", None)
    monkeypatch.setattr(cuda_library, "ARCHITECTURES", "sm_90a")
    assert cuda_problem(CPU) == "made for CUDA, the tensors are on cpu"
    properties = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert cuda_problem(CUDA) is None
    properties.major = 8
    assert "not for this device's compute capability 8.0" in str(cuda_problem(CUDA))


def test_the_backend_of_an_op_with_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    every = ("cuda", "triton", "torch")
    problems: dict[str, str | None] = {"cuda": None, "triton": None}
    monkeypatch.setattr(dispatch, "cuda_problem", lambda device: problems["cuda"])
    monkeypatch.setattr(dispatch, "triton_problem", lambda device: problems["triton"])
    assert pick_backend("auto", CUDA, every) == pick_backend("cuda", CUDA, every) == "cuda"
    assert pick_backend("auto", CPU, every) == "torch"
    assert pick_backend("auto", CUDA) == "triton"  # one without
    assert pick_backend("auto", CUDA, ("cuda", "torch")) == "cuda"
    problems["cuda"] = "not built: build it"
    assert pick_backend("auto", CUDA, every) == "triton"
    with pytest.raises(ValueError, match="backend='cuda' is not built: build it; use backend='auto' or 'torch'"):
        pick_backend("cuda", CUDA, every)
    problems["triton"] = "not installed"
    assert pick_backend("auto", CUDA, every) == "torch"
    with pytest.raises(ValueError, match="'cuda' is unknown; it is one of auto, triton, torch"):
        pick_backend("cuda", CUDA)


def test_it_can_be_asked_under_compile() -> None:
    def ask(x: torch.Tensor) -> torch.Tensor:
        backend = pick_backend("auto", x.device, ("cuda", "triton", "torch"))
        good = capability_problem(12, 0, DEFAULT) is None and capability_problem(9, 0, "sm_80") is not None
        return x + (cuda_problem(x.device) is not None) if backend == "torch" and good else x

    compiled = torch.compile(ask, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1
