"""Blanks in place of torch and of what needs it, so that a process of a test starts at once."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "revisual_fast.packing", "revisual_fast.policy", "revisual_fast.policy.model")


class Blank(ModuleType):
    """A module in which every name is ``object``; one with a folder has real modules in it, too."""

    def __init__(self, name: str, folder: Path | None = None):
        super().__init__(name)
        self.__path__ = [str(folder)] if folder else []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def without_torch(*more: str) -> None:
    """Before ``revisual_fast.rollout`` is imported: leave torch out, and these modules."""
    for name in (*HEAVY, *more):
        sys.modules[name] = Blank(name)
    for name in ("revisual_fast", "revisual_fast.rollout"):
        sys.modules[name] = Blank(name, ROOT / name.replace(".", "/"))
