"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from revisual_fast.policy.model import Policy

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined, so before any is imported


CACHE = Path(__file__).parents[1] / ".pytest_cache"
GATES_TABLE, CUDA_TABLE = CACHE / "compile_gates.txt", CACHE / "cuda_gates.txt"
TABLES = {"Triton kernels, compiled without a GPU": GATES_TABLE, "CUDA kernels, as built": CUDA_TABLE}
"""What the gates found, for the end of the tests' output."""


ENVIRONMENTS = {
    "vllm": ("vllm", "test-vllm"),
    "dropin/trl": ("torchvision", "test-dropin"),
    "dropin/openrlhf": ("openrlhf", "test-dropin"),
    "dropin/swift": ("swift", "test-dropin"),
}
"""Folders of tests that have an environment of their own -> a package that is only there, and how to make it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for folder, (package, target) in ENVIRONMENTS.items():
        if find_spec(package) is None:
            skip = pytest.mark.skip(reason=f"needs {package}: make {target}")
            for item in items:
                if Path(__file__).parent / folder in item.path.parents:
                    item.add_marker(skip)


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        for path in TABLES.values():
            path.unlink(missing_ok=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, path in TABLES.items():
        if path.exists():
            terminalreporter.section(title)
            terminalreporter.write(path.read_text())


@contextmanager
def _deterministic(warn_only: bool) -> Iterator[None]:
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds nan."""
    with _deterministic(warn_only=True):
        yield


@pytest.fixture
def poisoned_and_deterministic() -> Iterator[None]:
    """Memory that nobody has written holds nan, and operations that are not deterministic raise."""
    with _deterministic(warn_only=False):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the repository; tests that need it are skipped where it is absent."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs the data folder ../shared/data beside the repository")
    return path


@pytest.fixture(scope="session")
def tiny_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny Qwen2.5-VL of random weights, its tokenizer and its image settings."""
    from revisual_fast.policy.init.tiny_vl import build_tiny_vl

    directory = tmp_path_factory.mktemp("models") / "tiny_vl"
    build_tiny_vl(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_policy(tiny_vl: Path) -> Policy:
    """The tiny model as a policy, in fp32 on the CPU."""
    from revisual_fast.config import ModelConfig
    from revisual_fast.policy.load import load_policy

    return load_policy(tiny_vl, ModelConfig(path=str(tiny_vl), dtype="float32", device="cpu"))
