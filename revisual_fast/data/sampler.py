"""Which record comes next."""

from __future__ import annotations

import numpy as np

from revisual_fast.seeds import seed_for

__all__ = ["Sampler"]


class Sampler:
    """Every record once per epoch, in an order that depends on nothing but the seed and the epoch.

    There is no state to save: a resumed run goes on from its position. Raises ValueError if ``size`` is not positive.
    """

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise ValueError(f"size: {size}: there must be at least one record to draw from")
        self.size = size
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def index(self, position: int) -> int:
        """The record (0 <= index < size) at ``position`` (>= 0) of the run; the epoch is ``position // size``."""
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            self._order = np.random.default_rng(seed_for(self.seed, "epoch", epoch)).permutation(self.size)
            self._epoch = epoch
        return int(self._order[offset])
