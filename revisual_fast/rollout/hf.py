"""The embedded engine: generation with the policy's own weights, in the trainer's process.

A prompt (and its images) is prefilled once; its keys and values serve all of its ``n`` completions. Decoding is one
packed row of one new token per unfinished sequence: no left padding, finished sequences leave, and waiting prompts take
their place. Three budgets bound the memory. Which completions come out does not depend on them nor on the other
prompts, but for the rounding of sums: greedy ones follow from the prompt, sampled ones from the seed, the prompt's
index and the completion's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from revisual_fast.packing import Prompt
from revisual_fast.policy.model import Policy
from revisual_fast.rollout.batch import Batch
from revisual_fast.rollout.engine import OnGroup, Rollout, Sampling, Sync

__all__ = ["HFEngine"]


class HFEngine:
    """The :class:`~revisual_fast.rollout.engine.Engine` on a policy; any of ``eos_token_ids`` ends a sequence.

    Decoded together are at most ``max_batch`` sequences, whose cache takes at most ``max_cached_tokens`` positions
    (the longest prompt's for every prompt, ``sampling.max_tokens`` for every sequence), but at least the ``n``
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
        self.version = 0
        self.counts = {"restarts": 0, "retried_requests": 0, "regenerated_groups": 0}

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, on_group: OnGroup | None = None
    ) -> list[list[Rollout]]:
        """``n`` completions for every prompt, in the prompts' order. Raises EngineError where logits are not numbers.

        Sampling masks are given where ``sampling.masks`` is set, ids can be left out, and the temperature is not 0.
        """
        was_training = self.policy.model.training
        shown = Counter(key for prompt in prompts for key in set(prompt.image_keys))
        self.policy.model.eval()
        try:
            with self.policy.keeping_images(key for key, times in shown.items() if times > 1):
                return Batch(self, prompts, n, sampling, on_group).run()
        finally:
            self.policy.model.train(was_training)

    def fitting(self, lengths: Sequence[int], rows: int, prompts: int, longest: int, n: int, max_tokens: int) -> int:
        """How many prompts of these ``lengths``, in order, fit beside ``rows`` sequences of ``prompts`` prompts that
        take ``longest`` positions each; at least one where there are none."""
        count = 0
        for length in lengths:
            longest, rows, prompts = max(longest, length), rows + n, prompts + 1
            full = rows > self.max_batch or prompts * longest + rows * max_tokens > self.max_cached_tokens
            if full and prompts > 1:
                break
            count += 1
        return count

    def update_weights(self, policy: Policy, version: int) -> Sync:
        """Sample from ``policy`` itself; nothing has to be sent."""
        self.policy, self.version = policy, version
        return Sync()

    def sleep(self, level: int = 1) -> None:
        """Nothing is held between two calls."""

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Nothing was given back."""

    def memory(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing to release."""
