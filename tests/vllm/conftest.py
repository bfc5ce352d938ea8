"""What the tests of rollouts on vLLM share. They need vLLM, which has an environment of its own: make test-vllm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vllm.engines import Engines


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines of a module's tests; they end with it."""
    made = Engines(tmp_path_factory.mktemp("vllm"))
    yield made
    made.close()
