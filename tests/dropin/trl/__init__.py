"""Tests inside TRL. They have an environment of their own: make test-dropin."""

import pytest

pytest.importorskip("trl", reason="needs trl: make test-dropin")
pytest.importorskip("torchvision", reason="needs torchvision, for TRL's processors: make test-dropin")
