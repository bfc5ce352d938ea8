"""What the tests inside OpenRLHF share. They need openrlhf, which has an environment of its own: make test-dropin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


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
    from revisual_fast.integrations.openrlhf import patch_openrlhf
    from revisual_fast.integrations.seams import _SAID, unpatch

    _SAID.clear()
    patch_openrlhf()
    yield openrlhf
    unpatch("openrlhf")
