"""The embedded engine: generation with the policy's own weights, in the trainer's process.

A prompt (and its images) is prefilled once; its keys and values are then expanded to the ``n`` completions. Decoding is
one packed row of one new token per unfinished sequence: no left padding, and finished sequences leave the batch.
Three budgets bound the memory; which completions come out of greedy decoding does not depend on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from revisual_fast.packing import Group, Prompt, plan_micro_batches
from revisual_fast.policy.attention import KeepingPlan
from revisual_fast.policy.model import Policy
from revisual_fast.ranges import ranged, span
from revisual_fast.rollout.engine import Rollout, Sampling

__all__ = ["HFEngine"]

GROW = 64
"""Positions by which a full cache grows at least; a large one grows by a quarter."""
COMPACT = 0.75
"""Share of unfinished sequences below which the finished ones are dropped from the cache."""


class HFEngine:
    """The :class:`~revisual_fast.rollout.engine.Engine` on a policy; any of ``eos_token_ids`` ends a sequence.

    Decoded together are at most ``max_batch`` sequences whose cache, at its largest, has at most ``max_cached_tokens``
    positions (each sequence takes those of the longest prompt and ``sampling.max_tokens``), but at least the ``n``
    completions of one prompt. Prompts are prefilled in packed rows of at most ``prefill_tokens``, or of one prompt.
    """

    def __init__(
        self,
        policy: Policy,
        eos_token_ids: Sequence[int],
        *,
        max_batch: int = 1024,
        max_cached_tokens: int = 262144,
        prefill_tokens: int = 16384,
    ):
        self.policy = policy
        self.eos = tuple(eos_token_ids)
        self.max_batch = max_batch
        self.max_cached_tokens = max_cached_tokens
        self.prefill_tokens = prefill_tokens

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[list[Rollout]]:
        was_training = self.policy.model.training
        self.policy.model.eval()
        generator = torch.Generator(self.policy.device).manual_seed(sampling.seed)
        rollouts: list[list[Rollout]] = []
        try:
            for batch in self._batches(prompts, n, sampling.max_tokens):
                rollouts += _Batch(self, batch, n, sampling, generator).run()
        finally:
            self.policy.model.train(was_training)
        return rollouts

    def _batches(self, prompts: Sequence[Prompt], n: int, max_tokens: int) -> list[list[Prompt]]:
        """The prompts, in order, in batches within the budgets."""
        batches: list[list[Prompt]] = []
        longest = 0
        for prompt in prompts:
            longest = max(longest, len(prompt.ids))
            sequences = n * (len(batches[-1]) + 1) if batches else 0
            full = sequences > self.max_batch or sequences * (longest + max_tokens) > self.max_cached_tokens
            if not batches or full:
                batches.append([])
                longest = len(prompt.ids)
            batches[-1].append(prompt)
        return batches


class _Batch:
    """The sequences decoded together; sequence ``p * n + i`` is completion i of prompt p."""

    def __init__(
        self,
        engine: HFEngine,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        generator: torch.Generator,
    ):
        self.engine, self.policy, self.n, self.sampling, self.generator = engine, engine.policy, n, sampling, generator
        self.tokens: list[list[int]] = [[] for _ in range(len(prompts) * n)]
        self.logps: list[list[float]] = [[] for _ in range(len(prompts) * n)]
        self.prompts = prompts

    def run(self) -> list[list[Rollout]]:
        eos = torch.tensor(self.engine.eos, dtype=torch.long, device=self.policy.device)
        logits, plan = self._prefill()
        alive = torch.arange(len(self.tokens), device=self.policy.device)  # sequence of each cache row
        going = torch.ones_like(alive, dtype=torch.bool)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for step in range(self.sampling.max_tokens):
            token, logp = sample(logits, self.sampling, self.generator)
            steps.append((alive, token, logp))
            going &= ~torch.isin(token, eos)
            remaining = int(going.sum())
            if remaining == 0 or step + 1 == self.sampling.max_tokens:
                break
            if remaining < COMPACT * len(alive):
                plan.keep(going)
                alive, token, going = alive[going], token[going], going[going]
            with span("decode"):
                embeddings = self.policy.family.embedding(token)[None]
                hidden = self.policy.family.run_text(embeddings, plan.positions(), plan)
                plan.advance()
                logits = self.policy.logits(hidden)
        return self._collect(steps)

    @ranged("prefill")
    def _prefill(self) -> tuple[Tensor, DecodePlan]:
        """Logits [prompts * n, V] of the first tokens, and the plan that continues from the prompts."""
        policy = self.policy
        groups = [Group(p, []) for p in self.prompts]
        logits: list[Tensor] = []
        kept: list[_Kept] = []
        top: list[Tensor] = []
        (plan,) = plan_micro_batches(groups, self.engine.prefill_tokens, cost=lambda group: len(group.prompt.ids))
        for part in plan:
            batch = policy.pack(part.of(groups))
            prefill = KeepingPlan(policy.plan(batch))
            states = policy.states(batch, prefill)
            logits.append(policy.logits(states[batch.segments.cu_q[1:].long().to(policy.device) - 1]))
            kept.append(prefill.kept)
            top += [p.max() for p in batch.positions[:, 0].amax(0).split(batch.segments.length)]
        order = [g for part in plan for g, _ in part.parts]  # in which the prompts were prefilled
        lengths = torch.tensor([len(self.prompts[g].ids) for g in order], device=policy.device)
        place = torch.tensor(order, device=policy.device).argsort().repeat_interleave(self.n)  # of a sequence's prompt
        decode = DecodePlan(kept, lengths, torch.stack(top) + 1, place, self.sampling.max_tokens)
        return torch.cat(logits)[place], decode

    @ranged("collect")
    def _collect(self, steps: list[tuple[Tensor, Tensor, Tensor]]) -> list[list[Rollout]]:
        done = [False] * len(self.tokens)
        for alive, token, logp in steps:
            for sequence, t, p in zip(alive.tolist(), token.tolist(), logp.tolist(), strict=True):
                if not done[sequence]:
                    self.tokens[sequence].append(t)
                    self.logps[sequence].append(p)
                    done[sequence] = t in self.engine.eos
        flat = [
            Rollout(torch.tensor(t, dtype=torch.long), torch.tensor(p, dtype=torch.float32), d)
            for t, p, d in zip(self.tokens, self.logps, done, strict=True)
        ]
        return [flat[i : i + self.n] for i in range(0, len(flat), self.n)]


_Kept = dict[int, tuple[Tensor, Tensor]]
"""Layer -> key and value of packed prompts, each [T, Hkv, d]."""


@dataclass
class _Layer:
    key: Tensor  # [rows, L, Hkv, d]
    value: Tensor


class DecodePlan:
    """Attention of one new token per sequence over its own cached keys and values.

    ``kept`` holds what each packed row of the prefill kept, and is emptied. ``lengths`` [prompts] and ``next_position``
    [prompts] are int64, in the order of the prefill; ``place`` [rows] int64 is the prompt of each sequence. Each
    sequence takes at most ``max_tokens``.
    """

    def __init__(self, kept: list[_Kept], lengths: Tensor, next_position: Tensor, place: Tensor, max_tokens: int):
        device = lengths.device
        self.length = lengths[place]  # [rows]: cached positions of each row
        self.next_position = next_position[place]
        self.row = torch.arange(len(self.length), device=device)
        longest = int(lengths.max())
        self.limit = longest + max_tokens
        width = min(longest + GROW, self.limit)
        inside = torch.arange(width, device=device) < lengths[:, None]
        self.layers: dict[int, _Layer] = {}
        for layer in list(kept[0]):
            keys, values = zip(*(part.pop(layer) for part in kept), strict=True)
            self.layers[layer] = _Layer(*(self._expand(torch.cat(x), inside, place) for x in (keys, values)))
        self._mask()

    @staticmethod
    def _expand(packed: Tensor, inside: Tensor, place: Tensor) -> Tensor:
        """[T, Hkv, d] -> [rows, L, Hkv, d]; ``inside`` [prompts, L] bool says where a prompt is."""
        cache = packed.new_zeros(*inside.shape, *packed.shape[1:])
        cache[inside] = packed
        return cache[place]

    def _mask(self) -> None:
        width = next(iter(self.layers.values())).key.shape[1]
        self.mask = torch.arange(width, device=self.length.device) <= self.length[:, None]  # [rows, L]

    def positions(self) -> Tensor:
        """[4, 1, rows] of the tokens about to be decoded."""
        return self.next_position.expand(4, 1, -1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        cache = self.layers[layer]
        cache.key[self.row, self.length] = key[0].transpose(0, 1)
        cache.value[self.row, self.length] = value[0].transpose(0, 1)
        rows, kv_heads = cache.key.shape[0], cache.key.shape[2]
        # the query heads that share a key head stand as one longer query: no key is repeated
        q = query[0].transpose(0, 1).unflatten(1, (kv_heads, -1))  # [rows, Hkv, H / Hkv, d]
        out = F.scaled_dot_product_attention(
            q, cache.key.transpose(1, 2), cache.value.transpose(1, 2), self.mask[:, None, None], scale=scaling
        )
        return out.reshape(1, rows, -1, out.shape[-1])

    def advance(self) -> None:
        """The new tokens are in the cache; make room for the next."""
        self.length = self.length + 1
        self.next_position = self.next_position + 1
        width = self.mask.shape[1]
        if self.length.max() >= width:
            more = min(max(GROW, width // 4), self.limit - width)
            for cache in self.layers.values():
                cache.key = F.pad(cache.key, (0, 0, 0, 0, 0, more))
                cache.value = F.pad(cache.value, (0, 0, 0, 0, 0, more))
        self._mask()

    def keep(self, rows: Tensor) -> None:
        """Drop the rows where ``rows`` [rows] bool is False."""
        self.length, self.next_position = self.length[rows], self.next_position[rows]
        self.row = self.row[: len(self.length)]
        for cache in self.layers.values():
            cache.key, cache.value = cache.key[rows], cache.value[rows]
        self._mask()


@ranged("sample")
def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """logits [S, V] fp32 -> token [S] int64 and its log-prob [S] after temperature, before top-p and top-k."""
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        logp = logits.log_softmax(-1)
    else:
        logp = (logits / sampling.temperature).log_softmax(-1)
        weights = _truncate(logp, sampling).exp()
        token = torch.multinomial(weights, 1, generator=generator)[:, 0]
    return token, logp.gather(1, token[:, None])[:, 0]


def _truncate(logp: Tensor, sampling: Sampling) -> Tensor:
    """-inf outside the top-k, then outside the smallest set whose probability reaches top_p."""
    if sampling.top_k:
        floor = logp.topk(min(sampling.top_k, logp.shape[-1])).values[:, -1:]
        logp = logp.masked_fill(logp < floor, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logp.log_softmax(-1).sort(descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before >= sampling.top_p)
        logp = logp.masked_fill(drop, -torch.inf)
    return logp
