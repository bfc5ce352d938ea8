"""What the tests inside ms-swift share. They need ms-swift, which has an environment of its own: make test-dropin."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("swift") is None:
        skip = pytest.mark.skip(reason="needs ms-swift: make test-dropin")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)
