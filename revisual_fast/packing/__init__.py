"""Packing: prompts and completions of different lengths laid end to end in one row, without padding.

Shapes, used everywhere:

- ``T`` tokens in the packed row, ``N`` rows that have a target, ``S`` completions, ``B`` attention segments, ``M``
  image tokens.
- layout ``shared``: ``[prompt_1 | c_11 .. c_1G | prompt_2 | ...]``. A completion attends to its prompt and to itself:
  a group's prompt (and its image tokens) stands in the row once.
- layout ``varlen``: ``[prompt_1 c_11 | prompt_1 c_12 | ...]``, every completion with its own copy of the prompt.
- layout ``padded``: like ``varlen``, every copy padded to the longest of the batch. For tests and comparisons only.

The last token of a completion predicts nothing and nobody attends to it, so it is a target but not in the row. The last
prompt row predicts the first token of every completion (a gather with repeats, whose backward adds). Positions of a
completion continue at ``max(prompt positions) + 1``, which is the M-RoPE rule and, for text, the ordinary one.

``batch`` has the data, ``layouts`` lays it out, ``planner`` splits a batch into micro-batches of near-equal ``cost``,
``memory`` estimates what their activations take.
"""

from __future__ import annotations

from revisual_fast.packing.batch import Group, Layout, PackedBatch, Prompt, Segments, to_device
from revisual_fast.packing.cost import CostModel, ModelShape, VisionShape
from revisual_fast.packing.layouts import PositionFn, pack_groups
from revisual_fast.packing.memory import Activations, activation_bytes, readable_bytes
from revisual_fast.packing.planner import MicroBatch, plan_micro_batches

__all__ = [
    "Activations",
    "CostModel",
    "Group",
    "Layout",
    "MicroBatch",
    "ModelShape",
    "PackedBatch",
    "PositionFn",
    "Prompt",
    "Segments",
    "VisionShape",
    "activation_bytes",
    "pack_groups",
    "plan_micro_batches",
    "readable_bytes",
    "to_device",
]
