"""Stopping a run: the first Ctrl-C (or SIGTERM) is noted, the second ends the process at once; limits of time."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

__all__ = ["StopRequest", "over"]

_SAID = b"\nstopping: this step is finished and saved first; once more to stop at once\n"


class StopRequest:
    """A context manager; inside it, ``requested`` says whether the run was asked to stop after the current step."""

    def __init__(self) -> None:
        self.requested = False
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
        os.write(2, _SAID)  # print is not safe inside a signal handler


def over(minutes: float | None, seconds: float) -> bool:
    """Whether ``seconds`` reach a limit in minutes, if there is one."""
    return minutes is not None and seconds >= 60 * minutes
