"""The weights that an engine in another process needs, and fingerprints that prove it has them. Torch only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revisual_fast.policy.merged import PlainWeight, plain_weights

if TYPE_CHECKING:
    from revisual_fast.policy.model import Policy  # an engine's process takes fingerprints and needs no transformers

__all__ = ["Fingerprint", "WeightMeta", "WeightSource", "compare", "fingerprint"]

Fingerprint = tuple[int, int]
"""Of a tensor: the hash of its elements in [0, 2^64), and how many they are."""

CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements that are hashed at a time: few enough for a CPU's cache, many enough for a GPU."""


@dataclass(frozen=True)
class WeightMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class WeightSource:
    """A policy's weights under the names of the checkpoint it came from, LoRA merged in.

    Both methods that list weights do so in the model's order, so that what stands in one module stands together. Tied
    weights come once, under the first name (the input embedding's). ``names`` None means all.
    """

    def __init__(self, policy: Policy):
        self._weights = {weight.name: weight for weight in plain_weights(policy.base)}

    def entries(self, names: Collection[str] | None = None) -> list[WeightMeta]:
        """What :meth:`tensors` would give, without computing or gathering anything."""
        return [WeightMeta(w.name, w.parameter.dtype, tuple(w.parameter.shape)) for w in self._chosen(names)]

    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The weights, one at a time: detached, whole, on the policy's device. They may be the policy's own memory.

        Sharded weights are gathered as they come, so all ranks must go through them together.
        """
        for weight in self._chosen(names):
            yield weight.name, weight.value()

    def changed(self) -> frozenset[str]:
        """Names of the weights that training can change, and of all that stand in the same module.

        An engine fuses some neighbours (q, k and v; gate and up) into one weight and replaces such a weight as a whole.
        """
        groups = {_module(w.name) for w in self._weights.values() if w.trained}
        return frozenset(name for name in self._weights if _module(name) in groups)

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Of every weight, by name."""
        return {name: (fingerprint(tensor), tensor.numel()) for name, tensor in self.tensors()}

    def _chosen(self, names: Collection[str] | None) -> list[PlainWeight]:
        if names is None:
            return list(self._weights.values())
        unknown = set(names) - self._weights.keys()
        assert not unknown, f"no weights of this model: {sorted(unknown)[:3]}"
        return [weight for name, weight in self._weights.items() if name in names]


def _module(name: str) -> str:
    """The module that holds a weight's own module: ``...3.self_attn`` for ``...3.self_attn.q_proj.weight``."""
    return name.rsplit(".", 2)[0]


# -- fingerprints

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # odd: multiplying by them loses nothing
_SHIFTS = (30, 27, 31)


@torch.no_grad()
def fingerprint(tensor: Tensor) -> int:
    """The sum of a 64-bit hash of each element's bits, modulo 2^64; any dtype, on the tensor's device.

    It does not depend on the elements' order, that of a concatenation is the sum of its parts', and +0 adds nothing
    (-0, which has a bit set, does): so an engine may fuse, split and pad weights. One changed bit changes it. Values
    that merely change places do not.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    rows = tensor.detach()[None] if tensor.ndim == 0 else tensor.detach()
    if rows.numel() == 0:
        return 0
    size = CHUNK[tensor.device.type]
    for part in rows.split(max(1, size * len(rows) // rows.numel())):
        for chunk in part.reshape(-1).split(size):
            total += _hash(chunk).sum()
    return int(total) % 2**64


def _hash(values: Tensor) -> Tensor:
    """A bijection of 64 bits that keeps zero, of each element's bits: [n] any dtype -> [n] int64."""
    size = values.element_size()
    x = values.view(_BITS[size]).to(torch.int64, copy=True)
    if size < 8:
        x &= (1 << 8 * size) - 1  # without the sign's copies: the same bits in any wider type
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        x ^= (x >> shift) & ((1 << 64 - shift) - 1)  # >> copies the sign, the mask takes it away
        x *= factor
    return x


def compare(
    trainer: Mapping[str, Fingerprint],  # weight -> fingerprint
    engine: Sequence[Mapping[str, Fingerprint]],  # of each worker: parameter -> fingerprint of its share
    mapping: Mapping[str, str],  # weight -> the engine's parameter that it is in
) -> list[str]:
    """What differs between the trainer's weights and the engine's, a line for each; empty if nothing does.

    A parameter is the sum of its weights; over the workers of tensor parallelism it may be divided, repeated, or (keys
    and values beside more queries) repeated in part; padding with zeros does not count.
    """
    parts: dict[str, list[str]] = defaultdict(list)
    for name in trainer:
        parts[mapping.get(name, "")].append(name)
    found: dict[str, Fingerprint] = {}
    for worker in engine:
        for name, (value, count) in worker.items():
            before = found.get(name, (0, 0))
            found[name] = (before[0] + value) % 2**64, before[1] + count
    lines = [f"{name}: the engine has no parameter for it" for name in parts.pop("", [])]
    for name, weights in parts.items():
        problem = _difference([trainer[w] for w in weights], found.get(name))
        if problem:
            lines.append(f"{', '.join(weights)}: {problem} (the engine's {name})")
    lines += [f"{name}: a parameter of the engine that gets no weight" for name in found.keys() - parts.keys()]
    return sorted(lines)


def _difference(weights: list[Fingerprint], parameter: Fingerprint | None) -> str:
    """Why ``parameter`` is not made of ``weights``; empty if it is."""
    wanted = sum(count for _, count in weights)
    if parameter is None:
        return "missing in the engine"
    value, count = parameter
    if count < wanted:
        return f"the engine holds {count} of {wanted} elements"
    if any(value == total % 2**64 for total in _repeated(weights, count)):
        return ""
    return "other values in the engine"


def _repeated(weights: list[Fingerprint], count: int) -> Iterator[int]:
    """What ``weights`` can add up to over ``count`` elements: all repeated alike, or only the smaller ones repeated."""
    yield sum(value for value, _ in weights) * (count // sum(n for _, n in weights))
    largest = max(n for _, n in weights)
    once, often = ([w for w in weights if (w[1] == largest) is top] for top in (True, False))
    if often:
        left = count - sum(n for _, n in once)
        yield sum(value for value, _ in once) + sum(value for value, _ in often) * (left // sum(n for _, n in often))
