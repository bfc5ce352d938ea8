"""Stopping a run on request: the first Ctrl-C (or SIGTERM) is noted, the second ends the process at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["StopRequest"]


class StopRequest:
    """A context manager; inside it, ``requested`` says whether the run was asked to stop after the current step."""

    def __init__(self, announce: Callable[[str], None]):
        self.requested = False
        self._announce = announce
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._announce("stopping: this step is finished and saved first; once more to stop at once")
