"""Image features of frozen vision towers, kept from pass to pass: rollout, old and reference log-probs, update.

A tower that is trained is never asked for old features: torch's fused optimizers change weights without a trace.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["CACHE_BYTES", "VisionCache", "tower_version"]

CACHE_BYTES = 2 * 2**30

Version = tuple[int, int, bool, torch.dtype]


def tower_version(tower: nn.Module) -> Version:
    """Changes when weights are loaded into ``tower`` or replaced, and while its peft adapters are switched off.

    torch counts the writes to a tensor by itself; what it does not see are ``.data`` and fused optimizers.
    """
    weights = list(tower.parameters())
    switched_off = any(getattr(module, "disable_adapters", False) is True for module in tower.modules())
    written = sum(weight._version for weight in weights)
    return written, hash(tuple(weight.data_ptr() for weight in weights)), switched_off, weights[0].dtype


class VisionCache:
    """Features by image key, of one version of the tower, the least recently used dropped above ``capacity`` bytes."""

    def __init__(self, capacity: int):
        if capacity < 0:
            raise ValueError(f"the capacity of the vision cache must be 0 bytes or more; got {capacity}")
        self.capacity = capacity
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._version: Version | None = None
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def clear(self) -> None:
        self._features.clear()
        self.bytes = 0

    def features(self, tower: nn.Module, keys: Sequence[str], encode: Callable[[int], Tensor]) -> Tensor:
        """The features of all ``keys``, one after the other, ``[features, width]``.

        ``encode(i)`` gives those of image i, ``[n, width]``, where they are missing.
        """
        version = tower_version(tower)
        if version != self._version:
            self.clear()
            self._version = version
        return torch.cat([self._one(key, i, encode) for i, key in enumerate(keys)])

    def _one(self, key: str, index: int, encode: Callable[[int], Tensor]) -> Tensor:
        if key in self._features:
            self.hits += 1
            self._features.move_to_end(key)
            return self._features[key]
        self.misses += 1
        made = encode(index)
        self._keep(key, made)
        return made

    def _keep(self, key: str, features: Tensor) -> None:
        if features.nbytes > self.capacity:
            return
        self._features[key] = features
        self.bytes += features.nbytes
        while self.bytes > self.capacity:
            _, dropped = self._features.popitem(last=False)
            self.bytes -= dropped.nbytes
