"""Where verl is not installed."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("verl") is not None, reason="verl is installed")


def test_the_integration_says_what_is_missing():
    with pytest.raises(ImportError, match=r"needs verl >=0\.9\.1,<0\.10: pip install"):
        importlib.import_module("revisual_fast.integrations.verl")
