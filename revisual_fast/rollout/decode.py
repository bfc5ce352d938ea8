"""Attention while decoding: one new token per sequence, over its prompt and the tokens before it.

A prompt's keys and values stand in the cache once, whatever the number of its completions: their queries go over them
as one matrix product. Each sequence adds its own. All sequences write to the same column of the cache, the newest one;
a sequence that came later has nothing in the columns before its birth, which are masked. So lengths are known to the
host, and no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from revisual_fast.packing import to_device

__all__ = ["GROW", "DecodePlan", "Prefilled"]

GROW = 64
"""Columns by which a full cache grows at least; a large one grows by a quarter."""

HALF = (torch.bfloat16, torch.float16)


@dataclass
class Prefilled:
    """Prompts that were run as packed rows. ``kept`` is emptied when it is taken over."""

    kept: list[dict[int, tuple[Tensor, Tensor]]]  # of each packed row: layer -> key and value, each [T, Hkv, d]
    starts: list[int]  # [P]: of each prompt in the rows, laid end to end
    lengths: list[int]  # [P]
    next_position: Tensor  # [P] int64: of the first completion token


@dataclass
class _Layer:
    prompt_key: Tensor  # [P, Hkv, L, d]
    prompt_value: Tensor
    key: Tensor  # [R, Hkv, W, d]
    value: Tensor


class DecodePlan:
    """The cache of ``rows`` sequences, those of a prompt side by side, each of at most ``limit`` tokens.

    Half precision is kept as it is on CUDA, where products of it can be had in fp32, and as fp32 elsewhere.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.layers: dict[int, _Layer] = {}
        self.lengths: list[int] = []  # [P] of the prompts
        self.prompt: list[int] = []  # [R]: the prompt of each row, never falling
        self.birth: list[int] = []  # [R]: the column of each row's first token
        self.start = torch.empty(0, dtype=torch.long)  # [R]: position of a row's tokens less their column
        self.column = 0  # that the next tokens will take
        self.width = 0

    @property
    def rows(self) -> int:
        return len(self.birth)

    @property
    def longest(self) -> int:
        """Positions that every prompt takes."""
        return max(self.lengths, default=0)

    # -- who is decoded

    def admit(self, new: Prefilled, n: int) -> None:
        """``n`` sequences for each of the new prompts, whose first tokens will be in the next column."""
        first, rows, device = len(self.lengths), self.rows, new.next_position.device
        places = [first + i for i in range(len(new.lengths)) for _ in range(n)]
        start = new.next_position.repeat_interleave(n) - self.column
        self.start = torch.cat([self.start, start]) if rows else start
        self.lengths += new.lengths
        self.prompt += places
        self.birth += [self.column] * len(places)
        self.width = self.width or min(GROW, self.limit)
        span = torch.arange(self.longest)
        bounds = zip(new.starts, new.lengths, strict=True)
        index = to_device(torch.stack([begin + span.clamp(max=length - 1) for begin, length in bounds]), device)
        for layer in list(new.kept[0]):
            key, value = (torch.cat(x) for x in zip(*(part.pop(layer) for part in new.kept), strict=True))
            self._add(layer, _prompts(key, index), _prompts(value, index), len(places))
        self._arrange(device)

    def _add(self, layer: int, key: Tensor, value: Tensor, rows: int) -> None:
        """Prompts' key and value [P', Hkv, L, d], and room for ``rows`` sequences."""
        empty = key.new_zeros(rows, key.shape[1], self.width, key.shape[3])
        cache = self.layers.get(layer)
        if cache is None:
            self.layers[layer] = _Layer(key, value, empty, torch.zeros_like(empty))
            return
        longer = (0, 0, 0, key.shape[2] - cache.prompt_key.shape[2])
        cache.prompt_key = torch.cat([F.pad(cache.prompt_key, longer), key])
        cache.prompt_value = torch.cat([F.pad(cache.prompt_value, longer), value])
        cache.key, cache.value = torch.cat([cache.key, empty]), torch.cat([cache.value, empty])

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, the prompts that have none left, and the columns that nobody looks at any more."""
        assert rows, "the cache of nobody"
        device = self.start.device
        prompts = sorted({self.prompt[row] for row in rows})
        place = {prompt: i for i, prompt in enumerate(prompts)}
        self.lengths = [self.lengths[prompt] for prompt in prompts]
        self.prompt = [place[self.prompt[row]] for row in rows]
        first = min(self.birth[row] for row in rows)
        self.birth = [self.birth[row] - first for row in rows]
        chosen, theirs = (to_device(torch.tensor(x), device) for x in (rows, prompts))
        self.start = self.start[chosen] + first
        self.column -= first
        self.width -= first
        longest = self.longest
        for cache in self.layers.values():
            cache.prompt_key = cache.prompt_key[:, :, :longest].index_select(0, theirs)
            cache.prompt_value = cache.prompt_value[:, :, :longest].index_select(0, theirs)
            cache.key = cache.key[:, :, first:].index_select(0, chosen)
            cache.value = cache.value[:, :, first:].index_select(0, chosen)
        self._arrange(device)

    def _arrange(self, device: torch.device) -> None:
        """What all steps until the next change have in common."""
        count = torch.tensor(self.prompt).bincount(minlength=len(self.lengths))  # rows of each prompt
        prompts, slots = len(self.lengths), int(count.max())
        self.slots = slots  # places for rows of a prompt
        self.slot_of_row: Tensor | None = None
        self.row_of_slot: Tensor | None = None
        if prompts * slots != self.rows:  # some places are empty
            within = torch.arange(self.rows) - (count.cumsum(0) - count)[self.prompt]
            slot = torch.tensor(self.prompt) * slots + within
            row = torch.zeros(prompts * slots, dtype=torch.long).index_copy(0, slot, torch.arange(self.rows))
            self.slot_of_row, self.row_of_slot = to_device(slot, device), to_device(row, device)
        lengths, birth = torch.tensor(self.lengths)[:, None], torch.tensor(self.birth)[:, None]
        self.prompt_mask = _masked(torch.arange(self.longest) >= lengths, device)  # [P, L]
        self.own_mask = _masked(torch.arange(int(birth.max())) < birth, device)  # [R, youngest birth]

    # -- one step

    def positions(self) -> Tensor:
        """[4, 1, rows] of the tokens in the newest column, about to be run."""
        return (self.start + (self.column - 1)).expand(4, 1, -1)

    def advance(self) -> None:
        """The next tokens are known and take a column; make room for their keys and values."""
        if self.column == self.width:
            self._grow()
        self.column += 1

    def _grow(self) -> None:
        if self.width == self.limit:
            assert min(self.birth) > 0, "a sequence has outgrown its limit"
            self.keep(range(self.rows))
        more = min(max(GROW, self.width // 4), self.limit - self.width)
        for cache in self.layers.values():
            cache.key, cache.value = (F.pad(x, (0, 0, 0, more)) for x in (cache.key, cache.value))
        self.width += more

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [1, H, rows, d], key and value [1, Hkv, rows, d] -> [1, rows, H, d]."""
        cache, now = self.layers[layer], self.column - 1
        rows, kv_heads, longest = self.rows, key.shape[1], cache.prompt_key.shape[2]
        cache.key[:, :, now] = key[0].transpose(0, 1)
        cache.value[:, :, now] = value[0].transpose(0, 1)
        # the query heads that share a key head stand as one longer query: no key is repeated
        q = query[0].transpose(0, 1).to(cache.key.dtype).unflatten(1, (kv_heads, -1))  # [R, Hkv, H / Hkv, d]
        shared = _product(self._by_prompt(q), cache.prompt_key.flatten(0, 1).mT)
        if self.prompt_mask is not None:
            shared.unflatten(0, (-1, kv_heads)).add_(self.prompt_mask[:, None, None])
        own = _product(q.flatten(0, 1), cache.key.flatten(0, 1)[:, : now + 1].mT).unflatten(0, (rows, kv_heads))
        if self.own_mask is not None:
            own[..., : self.own_mask.shape[1]].add_(self.own_mask[:, None, None])
        scores = torch.cat([self._by_row(shared, kv_heads), own], -1)
        p = scores.mul_(scaling).softmax(-1).to(cache.value.dtype)  # [R, Hkv, H / Hkv, L + now + 1]
        out = self._by_row(
            _product(self._by_prompt(p[..., :longest]), cache.prompt_value.flatten(0, 1)), kv_heads
        ) + _product(p.flatten(0, 1)[..., longest:], cache.value.flatten(0, 1)[:, : now + 1]).view_as(q)
        return out.to(query.dtype).reshape(1, rows, -1, out.shape[-1])

    def _by_prompt(self, x: Tensor) -> Tensor:
        """[R, Hkv, g, m] -> [P * Hkv, slots * g, m]."""
        x = x if self.row_of_slot is None else x.index_select(0, self.row_of_slot)
        return x.unflatten(0, (-1, self.slots)).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def _by_row(self, x: Tensor, kv_heads: int) -> Tensor:
        """[P * Hkv, slots * g, m] -> [R, Hkv, g, m]."""
        x = x.unflatten(1, (self.slots, -1)).unflatten(0, (-1, kv_heads)).transpose(1, 2).flatten(0, 1)
        return x if self.slot_of_row is None else x.index_select(0, self.slot_of_row)


def _prompts(packed: Tensor, index: Tensor) -> Tensor:
    """[T, Hkv, d] -> [P, Hkv, L, d]; ``index`` [P, L] int64 are the rows, beyond a prompt's end its last one."""
    dtype = torch.float32 if packed.dtype in HALF and not packed.is_cuda else packed.dtype
    taken = packed.index_select(0, index.flatten()).unflatten(0, index.shape)
    return taken.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)


def _masked(where: Tensor, device: torch.device) -> Tensor | None:
    """What is added to the scores, fp32: -inf where ``where`` is True; None if nowhere."""
    if not where.any():
        return None
    return to_device(torch.zeros(where.shape).masked_fill_(where, -torch.inf), device)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[B, n, k] @ [B, k, m] -> fp32 (fp64 of fp64)."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype in HALF else torch.bmm(a, b)
