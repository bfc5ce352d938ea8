"""Tests that need a device: which come first, and that several processes share it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

FIRST = ["cuda", "row_kernels", "kernels", "packing", "attention_backends"]
"""A whole run, then what it is made of; where time on a device is short, the others may not be reached."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {Path(__file__).parent / f"test_{name}.py": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """For the tests in other processes: each would keep what it once took."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
