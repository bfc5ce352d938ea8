"""The requests that an engine elsewhere is sent for a batch of prompts, and what has become of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from revisual_fast.packing import Prompt
from revisual_fast.policy.families import Family
from revisual_fast.rollout.engine import OnGroup, RequestError, Rollout, Sampling
from revisual_fast.rollout.messages import Failed, Finished, Request
from revisual_fast.seeds import seed_for

__all__ = ["PendingBatch", "make_requests"]

_log = logging.getLogger(__name__)


class PendingBatch:
    """Requests, and what has become of them."""

    def __init__(self, requests: Sequence[Request], n: int, sampling: Sampling, on_group: OnGroup | None):
        self.requests, self.n, self.sampling, self.on_group = requests, n, sampling, on_group
        self.groups: dict[int, list[Rollout]] = {}
        self.failed: set[int] = set()  # since they were last asked for
        self.refused: RequestError | None = None
        self._tries: dict[int, int] = {}

    def missing(self) -> list[Request]:
        return [r for r in self.requests if r.index not in self.groups]

    def finish(self, event: Finished, version: int) -> None:
        assert event.index not in self.groups, event.index
        assert len(event.ids) == self.n, (event.index, len(event.ids))
        self.groups[event.index] = group = [_rollout(event, i, version) for i in range(self.n)]
        if self.on_group is not None:
            self.on_group(event.index, group)

    def fail(self, event: Failed, retries: int) -> None:
        tries = self._tries[event.index] = self._tries.get(event.index, 0) + 1
        self.failed.add(event.index)
        _log.warning("Prompt %d failed (try %d): %s", event.index, tries, event.reason)
        if tries > retries and self.refused is None:
            self.refused = RequestError(event.index, event.reason, tries)


def make_requests(prompts: Sequence[Prompt], family: Family, sampling: Sampling) -> list[Request]:
    """A prompt's seed depends on its place only, so that asked again it is answered alike."""
    return [
        Request(
            index=i,
            ids=prompt.ids.tolist(),
            seed=seed_for(sampling.seed, "prompt", sampling.place(i)),
            pixel_values=prompt.pixel_values,
            grids=prompt.grids if prompt.pixel_values is not None else None,
            image_keys=prompt.image_keys,
            image_token_id=family.image_token_id,
            merge_size=family.merge_size,
        )
        for i, prompt in enumerate(prompts)
    ]


def _rollout(event: Finished, i: int, version: int) -> Rollout:
    """Completion ``i`` of a group."""
    finished = event.finish_reason[i] == "stop"
    assert finished or event.finish_reason[i] == "length", (event.index, event.finish_reason[i])
    assert len(event.ids[i]) == len(event.logp[i]), event.index
    mask = None
    if event.masks is not None:
        kept = event.masks[i]
        indptr = torch.tensor([0, *map(len, kept)]).cumsum(0)
        mask = indptr, torch.tensor([token for row in kept for token in row], dtype=torch.long)
    ids, logp = torch.tensor(event.ids[i], dtype=torch.long), torch.tensor(event.logp[i], dtype=torch.float32)
    return Rollout(ids, logp, "stop" if finished else "length", mask, version)
