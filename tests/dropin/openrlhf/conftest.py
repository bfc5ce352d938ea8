"""What the tests inside OpenRLHF share. They need openrlhf, which has an environment of its own: make test-dropin."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
HAS_IT = importlib.util.find_spec("openrlhf") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_IT:
        skip = pytest.mark.skip(reason="needs openrlhf: make test-dropin")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def openrlhf() -> Any:
    """``openrlhf.models``, with stand-ins for what needs a GPU: deepspeed, flash-attn."""
    from tests.dropin.openrlhf.stand_ins import install

    install()
    import openrlhf.models
    import openrlhf.models.actor

    return openrlhf.models


@pytest.fixture
def patched(openrlhf: Any) -> Iterator[Any]:
    from revisual_fast.integrations.openrlhf import _told, patch_openrlhf
    from revisual_fast.integrations.seams import unpatch

    _told.clear()
    patch_openrlhf()
    yield openrlhf
    unpatch("openrlhf")
