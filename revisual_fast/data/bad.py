"""Records that cannot be used: why, and what then (an error, or left out and counted)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

__all__ = [
    "BROKEN_JSON",
    "EMPTY_ANSWER",
    "EMPTY_PROMPT",
    "EMPTY_RESPONSE",
    "MISSING_FIELD",
    "MISSING_IMAGE",
    "NO_VISION",
    "PLACEHOLDERS",
    "PROMPT_TOO_LONG",
    "RESPONSE_TOO_LONG",
    "SPECIAL_TOKEN",
    "UNREADABLE_IMAGE",
    "WRONG_TYPE",
    "BadRecordError",
    "BadRecords",
]

BROKEN_JSON = "broken JSON"
MISSING_FIELD = "missing field"
WRONG_TYPE = "field of the wrong type"
EMPTY_PROMPT = "empty prompt"
EMPTY_ANSWER = "empty answer"
EMPTY_RESPONSE = "empty response"
MISSING_IMAGE = "missing image"
UNREADABLE_IMAGE = "unreadable image"
NO_VISION = "image for a text-only model"
PLACEHOLDERS = "placeholders and images differ"
SPECIAL_TOKEN = "special token in the text"
PROMPT_TOO_LONG = "prompt over the limit"
RESPONSE_TOO_LONG = "response over the limit"

_SHOWN = 5  # skipped records of each kind that are logged one by one; the rest are only counted
_log = logging.getLogger(__name__)


class BadRecordError(ValueError):
    """A record that cannot be used. ``reason`` is one of the constants above, ``detail`` says what exactly is wrong."""

    def __init__(self, reason: str, detail: str, source: str = "", fix: str = ""):
        super().__init__(f"{source}: {reason}: {detail}{fix}" if source else f"{reason}: {detail}{fix}")
        self.reason = reason
        self.detail = detail
        self.source = source


class BadRecords:
    """The bad records of a run, each counted once."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}  # source -> reason

    def handle(self, policy: Literal["error", "skip"], source: str, reason: str, detail: str) -> None:
        """Raise :class:`BadRecordError` ("error"), or count ``source`` and log the first few of its kind ("skip")."""
        if policy == "error":
            fix = "; repair the record, or set on_bad_record: skip to leave such records out and count them"
            raise BadRecordError(reason, detail, source, fix)
        if source in self._reasons:
            return
        self._reasons[source] = reason
        if self.counts[reason] <= _SHOWN:
            _log.warning("%s: skipped: %s: %s", source, reason, detail)

    @property
    def counts(self) -> dict[str, int]:
        """Reason -> number of records."""
        return dict(Counter(self._reasons.values()))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"reasons": dict(self._reasons)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what has been counted so far."""
        self._reasons = dict(state["reasons"])
