"""The embedded engine: generation with the policy's own weights, in the trainer's process.

A prompt (and its images) is prefilled once; its keys and values are then expanded to the ``n`` completions. Decoding is
one packed row of one new token per unfinished sequence: no left padding, and finished sequences leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from revisual_fast.packing import Group, PackedPrompt
from revisual_fast.policy.attention import PrefillPlan
from revisual_fast.policy.model import Policy
from revisual_fast.rollout.engine import Rollout, Sampling

__all__ = ["HFEngine"]

GROW = 64
"""Positions by which a full cache grows."""
COMPACT = 0.75
"""Share of unfinished sequences below which the finished ones are dropped from the cache."""


class HFEngine:
    """The :class:`~revisual_fast.rollout.engine.Engine` on a policy; at most ``max_batch`` sequences at once."""

    def __init__(self, policy: Policy, eos_token_id: int, *, max_batch: int = 1024):
        self.policy = policy
        self.eos = eos_token_id
        self.max_batch = max_batch

    @torch.no_grad()
    def generate(self, prompts: Sequence[PackedPrompt], n: int, sampling: Sampling) -> list[list[Rollout]]:
        was_training = self.policy.model.training
        self.policy.model.eval()
        generator = torch.Generator(self.policy.device).manual_seed(sampling.seed)
        at_once = max(1, self.max_batch // n)
        rollouts: list[list[Rollout]] = []
        for first in range(0, len(prompts), at_once):
            batch = _Batch(self, prompts[first : first + at_once], n, sampling, generator)
            rollouts += batch.run()
        self.policy.model.train(was_training)
        return rollouts


class _Batch:
    """The sequences decoded together; sequence ``p * n + i`` is completion i of prompt p."""

    def __init__(
        self,
        engine: HFEngine,
        prompts: Sequence[PackedPrompt],
        n: int,
        sampling: Sampling,
        generator: torch.Generator,
    ):
        self.policy, self.eos, self.n, self.sampling, self.generator = engine.policy, engine.eos, n, sampling, generator
        self.tokens: list[list[int]] = [[] for _ in range(len(prompts) * n)]
        self.logps: list[list[float]] = [[] for _ in range(len(prompts) * n)]
        self.prompts = prompts

    def run(self) -> list[list[Rollout]]:
        logits, plan = self._prefill()
        alive = torch.arange(len(self.tokens), device=self.policy.device)  # sequence of each cache row
        going = torch.ones_like(alive, dtype=torch.bool)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for step in range(self.sampling.max_tokens):
            token, logp = sample(logits, self.sampling, self.generator)
            steps.append((alive, token, logp))
            going &= token != self.eos
            remaining = int(going.sum())
            if remaining == 0 or step + 1 == self.sampling.max_tokens:
                break
            if remaining < COMPACT * len(alive):
                plan.keep(going)
                alive, token, going = alive[going], token[going], going[going]
            embeddings = self.policy.family.embedding(token)[None]
            hidden = self.policy.family.run_text(embeddings, plan.positions(), plan)
            plan.advance()
            logits = self.policy.logits(hidden)
        return self._collect(steps)

    def _prefill(self) -> tuple[Tensor, DecodePlan]:
        policy = self.policy
        batch = policy.pack([Group(p, []) for p in self.prompts])
        prefill = PrefillPlan(batch.segments, policy.device)
        states = policy.states(batch, prefill)
        lengths = torch.tensor(batch.segments.length, device=policy.device)
        ends = torch.tensor(batch.segments.start, device=policy.device) + lengths
        top = batch.positions[:, 0].amax(0).split(batch.segments.length)
        plan = DecodePlan(prefill, lengths, torch.stack([p.max() for p in top]) + 1, self.n)
        return policy.logits(states[ends - 1]).repeat_interleave(self.n, 0), plan

    def _collect(self, steps: list[tuple[Tensor, Tensor, Tensor]]) -> list[list[Rollout]]:
        done = [False] * len(self.tokens)
        for alive, token, logp in steps:
            for sequence, t, p in zip(alive.tolist(), token.tolist(), logp.tolist(), strict=True):
                if not done[sequence]:
                    self.tokens[sequence].append(t)
                    self.logps[sequence].append(p)
                    done[sequence] = t == self.eos
        flat = [
            Rollout(torch.tensor(t, dtype=torch.long), torch.tensor(p, dtype=torch.float32), d)
            for t, p, d in zip(self.tokens, self.logps, done, strict=True)
        ]
        return [flat[i : i + self.n] for i in range(0, len(flat), self.n)]


@dataclass
class _Layer:
    key: Tensor  # [rows, L, Hkv, d]
    value: Tensor


class DecodePlan:
    """Attention of one new token per sequence over its own cached keys and values."""

    def __init__(self, prefill: PrefillPlan, lengths: Tensor, next_position: Tensor, n: int):
        device = lengths.device
        self.length = lengths.repeat_interleave(n)  # [rows]: cached positions of each row
        self.next_position = next_position.repeat_interleave(n)
        self.row = torch.arange(len(self.length), device=device)
        width = int(lengths.max())
        inside = torch.arange(width, device=device) < lengths[:, None]
        self.layers = {}
        for layer, (key, value) in prefill.kept.items():
            self.layers[layer] = _Layer(*(self._expand(x, inside, n) for x in (key, value)))
        self._mask()

    @staticmethod
    def _expand(packed: Tensor, inside: Tensor, n: int) -> Tensor:
        """[T, Hkv, d] -> [prompts * n, width + GROW, Hkv, d]."""
        prompts, width = inside.shape
        cache = packed.new_zeros(prompts, width + GROW, *packed.shape[1:])
        cache[:, :width][inside] = packed
        return cache.repeat_interleave(n, 0)

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
        if self.length.max() >= self.mask.shape[1]:
            for cache in self.layers.values():
                cache.key, cache.value = (F.pad(x, (0, 0, 0, 0, 0, GROW)) for x in (cache.key, cache.value))
        self._mask()

    def keep(self, rows: Tensor) -> None:
        """Drop the rows where ``rows`` [rows] bool is False."""
        self.length, self.next_position = self.length[rows], self.next_position[rows]
        self.row = self.row[: len(self.length)]
        for cache in self.layers.values():
            cache.key, cache.value = cache.key[rows], cache.value[rows]
        self._mask()


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
