"""verl's micro-batches, whose rows lie end to end in jagged tensors, as groups for the packer; and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from revisual_fast.integrations.grouping import GroupedRows, Images, group_rows
from revisual_fast.policy.families import Family

__all__ = ["CannotPack", "Layout", "check_positions", "check_request", "equal_runs", "grouped"]

REFUSED = {
    "distillation_use_topk": "top-k distillation needs the logits",
    "distillation_only": "distillation needs the logits",
    "calculate_sum_pi_squared": "calculate_sum_pi_squared needs the logits",
    "enable_routing_replay": "router replay is for mixtures of experts",
}
"""What a batch may ask for and packed rows do not have."""
IMAGES = {"pixel_values", "image_grid_thw"}
IGNORED = {"images_seqlens", "mm_token_type_ids"}
"""Follow from the ids and the grids."""


class CannotPack(Exception):
    """The reason why verl's own code has to run this micro-batch."""


@dataclass(frozen=True)
class Layout:
    """Where the ``bs`` rows stand in verl's jagged tensors: row i has ``prompts[i] + responses[i]`` tokens."""

    prompts: list[int]
    responses: list[int]

    @classmethod
    def of(cls, micro_batch: Mapping[str, Any]) -> Layout:
        """Raises CannotPack where the batch does not say what is prompt and what is response."""
        for name in ("input_ids", "prompts", "responses"):
            if name not in micro_batch.keys():  # noqa: SIM118 - a TensorDict has no other way
                raise CannotPack(f"the batch has no {name}")
        prompts, responses = micro_batch["prompts"], micro_batch["responses"]
        if prompts.is_nested:
            lengths = [x.offsets().diff().tolist() for x in (prompts, responses)]
        elif "attention_mask" in micro_batch.keys() and not micro_batch["attention_mask"].is_nested:  # noqa: SIM118
            lengths = [x.sum(1).tolist() for x in micro_batch["attention_mask"].tensor_split([prompts.shape[1]], 1)]
        else:
            raise CannotPack("the batch has padded prompts, but no attention_mask")
        layout = cls(*lengths)
        if micro_batch["input_ids"].offsets().diff().tolist() != layout.lengths or 0 in layout.prompts:
            raise CannotPack("input_ids are not prompts followed by responses")
        return layout

    @property
    def lengths(self) -> list[int]:
        return [p + r for p, r in zip(self.prompts, self.responses, strict=True)]

    @property
    def ends(self) -> list[int]:
        return list(accumulate(self.lengths))

    def places(self, rows: Sequence[int]) -> Tensor:
        """[N] int64, on the host: where the log-probs of the responses of ``rows`` stand, one before each token."""
        ends, own = self.ends, self.responses
        parts = [torch.arange(ends[i] - own[i] - 1, ends[i] - 1) for i in rows]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)

    def rows_of(self, values: Tensor) -> tuple[Tensor, ...]:
        """The last dimension of ``values`` cut into rows."""
        return values.split(self.lengths, -1)


def check_request(micro_batch: Any, get: Any) -> None:
    """Raises CannotPack for what packed rows do not have; ``get(data, key, default)`` reads what is not a tensor."""
    for name, reason in REFUSED.items():
        if get(data=micro_batch, key=name, default=False):
            raise CannotPack(reason)


def grouped(micro_batch: Any, layout: Layout) -> GroupedRows:
    """The rows by prompt and images. Raises CannotPack without a response token, and for inputs other than images."""
    if not any(layout.responses):
        raise CannotPack("no response has a token")
    ids = layout.rows_of(micro_batch["input_ids"].values().cpu())
    before, after = max(layout.prompts), max(layout.responses)
    padded, mask = (torch.zeros(len(ids), before + after, dtype=torch.long) for _ in range(2))
    for i, (row, own) in enumerate(zip(ids, layout.prompts, strict=True)):
        at = slice(before - own, before - own + len(row))
        padded[i, at], mask[i, at] = row, 1
    return group_rows(padded, mask, after, _images(micro_batch, len(ids)))


def _images(micro_batch: Any, n_rows: int) -> Images | None:
    inputs = micro_batch.get("multi_modal_inputs", None)
    if inputs is None:
        return None
    rows = [getattr(row, "data", row) or {} for row in inputs]
    if len(rows) != n_rows:
        raise CannotPack(f"{len(rows)} multi_modal_inputs for {n_rows} rows")
    names = {name for row in rows for name, value in row.items() if value is not None} - IGNORED
    if names - IMAGES:
        raise CannotPack(f"multi_modal_inputs has {', '.join(sorted(names - IMAGES))}; only images can be packed")
    if not names:
        return None
    pixels, grids = ([row[name] for row in rows if row.get(name) is not None] for name in sorted(IMAGES)[::-1])
    per_row = [0 if row.get("image_grid_thw") is None else len(row["image_grid_thw"]) for row in rows]
    return Images(torch.cat(pixels), torch.cat(grids).long(), per_row)


def check_positions(micro_batch: Any, layout: Layout, found: GroupedRows, family: Family) -> None:
    """Raises CannotPack where the batch's position ids are not those that the packer gives."""
    positions = micro_batch["position_ids"].values().cpu()  # [total] or [4, total], text first
    own = layout.rows_of(positions[-3:] if positions.ndim == 2 else positions[None])
    for group, rows in zip(found.groups, found.rows, strict=True):
        prompt = family.positions(group.prompt.ids, group.prompt.grids)  # [3, P]
        for row, completion in zip(rows, group.completions, strict=True):
            after = int(prompt.max()) + 1 + torch.arange(len(completion))
            if not bool((own[row] == torch.cat([prompt, after.expand(3, -1)], 1)).all()):
                raise CannotPack(f"position_ids are not those of {family.model.config.model_type}")


def equal_runs(ids: Sequence[Tensor]) -> int:
    """How many prompts in a row are equal, if it is the same number throughout; else 1."""
    runs = {len(list(run)) for _, run in groupby(row.numpy().tobytes() for row in ids)}
    return runs.pop() if len(runs) == 1 else 1
