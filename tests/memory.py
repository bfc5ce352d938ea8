"""How much memory is alive: every storage that an operation makes, from its making to its end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveStorages"]


class LiveStorages(TorchDispatchMode):
    """Within it, ``now`` and ``peak`` are the bytes of the storages made within it and still alive; ``ignore`` names
    tensors that are not counted. What a kernel allocates and frees by itself is not seen."""

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, Any] = {id(s): weakref.ref(s) for s in (t.untyped_storage() for t in ignore)}
        self.ignored = list(ignore)

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self.alive.get(id(storage))
        if known is not None and known() is storage:
            return
        size = storage.nbytes()

        def gone(_: Any, key: int = id(storage)) -> None:
            self.now -= size
            self.alive.pop(key, None)

        self.alive[id(storage)] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
