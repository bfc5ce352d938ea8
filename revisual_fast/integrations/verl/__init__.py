"""verl: policy losses, fused head and an FSDP engine with shared-prompt packing.

Importing this module puts them in place, which is what verl does with ``external_lib:
revisual_fast.integrations.verl``; :func:`unpatch` takes them out. docs/integrations/verl.md.
"""

from __future__ import annotations

from typing import Any

from revisual_fast.integrations.verl.patching import patch, unpatch

__all__ = ["patch", "register_objective", "unpatch"]


def __getattr__(name: str) -> Any:
    if name != "register_objective":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from revisual_fast.integrations.verl.loss import register_objective

    return register_objective


patch()
