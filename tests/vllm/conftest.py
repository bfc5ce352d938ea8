"""What the tests of rollouts on vLLM share. They need vLLM, which has an environment of its own: make test-vllm."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.engines import Engines

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="needs vllm: make test-vllm")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines of a module's tests; they end with it."""
    made = Engines(tmp_path_factory.mktemp("vllm"))
    yield made
    made.close()
