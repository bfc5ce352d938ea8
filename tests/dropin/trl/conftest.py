"""What the tests inside TRL share. They have an environment of their own: make test-dropin."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def missing() -> str | None:
    try:
        metadata.version("trl")
    except metadata.PackageNotFoundError:
        return "needs trl: make test-dropin"
    return None if util.find_spec("torchvision") else "needs torchvision, for TRL's processors: make test-dropin"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items if reason else ():
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=str(reason)))
