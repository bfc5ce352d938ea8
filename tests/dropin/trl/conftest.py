"""The tests inside TRL have an environment of their own: make test-dropin."""

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MISSING = [name for name in ("trl", "torchvision") if find_spec(name) is None]
if "trl" in MISSING:
    collect_ignore_glob = ["test_*.py"]  # they cannot even be imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason=f"needs {' and '.join(MISSING)}: make test-dropin")
    for item in items if MISSING else ():
        if HERE in item.path.parents:
            item.add_marker(skip)
