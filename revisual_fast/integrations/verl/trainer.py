"""verl's v1 trainer deals rows to ranks by their length; here it deals whole prompts, so that packing finds groups.

Importing this module puts it in place, and with it the rest of the integration: with
``VERL_USE_EXTERNAL_MODULES=revisual_fast.integrations.verl.trainer`` in the environment of ``main_ppo``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from revisual_fast.integrations import seams

__all__ = ["patch", "whole_prompts"]

PLACE = "verl.trainer.ppo.v1.trainer_base:PPOTrainer._balance_batch"
BALANCING = "verl.utils.seqlen_balancing"
SEAMS = (
    (PLACE, ("self", "batch", "metrics", "logging_prefix", "keep_minibatch")),
    (f"{BALANCING}:calculate_workload", ("seqlen_list",)),
    (f"{BALANCING}:get_seqlen_balanced_partitions", ("seqlen_list", "k_partitions", "equal_size")),
    (f"{BALANCING}:log_seqlen_unbalance", ("seqlen_list", "partitions", "prefix")),
)
_VERLS: list[Any] = []


def patch() -> None:
    """Put it in place; again is harmless. Raises SeamError, which names the place, where verl is another one."""
    for place, parameters in SEAMS:
        seams.seam(place, parameters)
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    if PPOTrainer._balance_batch is not _balance_batch:
        _VERLS[:] = [PPOTrainer._balance_batch]
    seams.replace("verl", PPOTrainer, "_balance_batch", _balance_batch)


def _balance_batch(
    self: Any, batch: Any, metrics: Any, logging_prefix: str = "global_seqlen", keep_minibatch: bool = False
) -> Any:
    """As verl's, and then the rows of a prompt go to one rank, one after the other."""
    from verl.utils.seqlen_balancing import log_seqlen_unbalance

    batch = _VERLS[0](self, batch, metrics, logging_prefix=logging_prefix, keep_minibatch=keep_minibatch)
    lengths = [tag["seq_len"] for tag in batch.tags]
    try:
        partitions = whole_prompts(batch.keys, lengths, max(self.actor_rollout_wg._dispatch_info["actor"]) + 1)
    except ValueError as reason:
        seams.warn_once(f"revisual_fast: rows are dealt as verl does, not prompts: {reason}")
        return batch
    metrics.update(log_seqlen_unbalance(seqlen_list=lengths, partitions=partitions, prefix=logging_prefix))
    batch.reorder([i for partition in partitions for i in partition])
    return batch


def whole_prompts(keys: Sequence[str], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """The rows of each rank: whole prompts, their number the same and their work as near as verl's balancing gets it.

    ``keys``: verl's, ``{uid}_{session}_{index}``. Raises ValueError where the prompts cannot be dealt evenly.
    """
    from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

    prompts: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        prompts.setdefault(key.split("_")[0], []).append(row)
    groups = list(prompts.values())
    sizes = sorted({len(rows) for rows in groups})
    if len(sizes) != 1:
        raise ValueError(f"prompts have from {sizes[0]} to {sizes[-1]} rows")
    if len(groups) % ranks:
        raise ValueError(f"{len(groups)} prompts cannot be dealt evenly to {ranks} ranks")
    work = calculate_workload(torch.tensor(lengths)[torch.tensor(groups)]).sum(1).tolist()
    dealt = get_seqlen_balanced_partitions(work, k_partitions=ranks, equal_size=True)
    return [[row for group in sorted(part) for row in groups[group]] for part in dealt]


patch()
