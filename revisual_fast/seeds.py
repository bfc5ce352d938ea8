"""Seeds as a pure function of where the run is, so that a resumed run draws what an uninterrupted one would."""

from __future__ import annotations

import hashlib

__all__ = ["seed_for"]


def seed_for(*place: int | str) -> int:
    """A 63-bit seed for a place in the run, such as ``(run seed, "mrl", 12, "rollout")``."""
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
