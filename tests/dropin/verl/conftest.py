"""What the tests inside verl share. They need verl, which has an environment of its own: make test-dropin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def cpu() -> Iterator[None]:
    """verl on the CPU, one process."""
    import torch.distributed as dist

    from revisual_fast.integrations.verl.cpu import use_cpu

    use_cpu()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def transformers_classes() -> Iterator[None]:
    """What verl changes in transformers' classes is undone after the test: it would change the other engines."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    kinds = [x for m in (qwen2_5_vl, qwen2_vl, qwen3) for x in vars(m).values() if isinstance(x, type)]
    before: list[tuple[Any, Any]] = [(kind, vars(kind)["forward"]) for kind in kinds if "forward" in vars(kind)]
    yield
    for kind, forward in before:
        kind.forward = forward
