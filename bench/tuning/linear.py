"""The loss from hidden states: how many rows a chunk has, and the dtype of its logits."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from bench import own
from bench.harness import Case, Problem, Variant
from bench.tuning.experiment import Axis, Experiment, Piece, Setting, Trial, under
from bench.tuning.rows import case_of, problem_of
from revisual_fast.kernels import plan
from revisual_fast.ops import resolve_backend

OP = "linear_policy_loss"
LABELS = {"float32": "", "bfloat16": ", bf16 logits"}
FP32 = 4


def chunk_bytes(device: str, chunk_mib: int) -> AbstractContextManager[Any]:
    return patch.dict(plan.CHUNK_BYTES, {device: chunk_mib << 20})


def pieces(case: Case, logits: str) -> list[Piece]:
    """Of each chunk the product of its logits and the rows' kernel; of each superchunk (or chunk, where there are none)
    dX, and dW, which is added up in fp32 in memory where it is not the only one."""
    device = torch.device(case.device)
    size = plan.rows_per_chunk(case.v, case.torch_dtype, device)
    superchunk = plan.rows_per_superchunk(case.v, case.torch_dtype, device)
    d, v, low = case.d, case.v, case.torch_dtype.itemsize
    wide = getattr(torch, logits).itemsize
    found = []
    for m in _lengths(plan.chunks(case.n, min(size, superchunk or size), superchunk)):
        found += [Piece(2 * m * d * v, low * (m * d + v * d) + wide * m * v), Piece(bytes=(wide + low) * m * v)]
    together = _lengths(plan.slices(case.n, superchunk or size))
    for index, m in enumerate(together):
        summed = low if len(together) == 1 else FP32 * (1 if index == 0 else 2)
        found.append(Piece(2 * m * d * v, low * (m * v + v * d + m * d)))
        found.append(Piece(2 * m * d * v, low * (m * v + m * d) + summed * v * d))
    return found


def _lengths(parts: list[slice]) -> list[int]:
    return [part.stop - part.start for part in parts]


def _trial(dtype: str, device: str) -> Trial:
    """``dtype`` of hidden states and weight; a setting has ``chunk_mib``, ``logits``, or both."""
    problem = problem_of(case_of(OP, device, dtype))
    backend = resolve_backend(OP, rows=torch.empty(0, device=device, dtype=getattr(torch, dtype)))

    def candidate(setting: Setting) -> Variant:
        mine = own.named(problem, f"revisual-fast {backend}{LABELS[setting['logits']] if dtype != 'float32' else ''}")
        assert mine.setup is not None, mine.reason
        return replace(mine, setup=under(mine.setup, lambda: chunk_bytes(device, setting["chunk_mib"])))

    def work(setting: Setting) -> list[Piece]:
        with chunk_bytes(device, setting["chunk_mib"]):
            return pieces(problem.case, setting["logits"])

    return Trial(_yardsticks(problem), candidate, work)


def _yardsticks(problem: Problem) -> Problem:
    return replace(problem, variants=[variant for variant in problem.variants if variant.role == "plain"])


def _start(logits: str, device: str) -> Setting:
    return {"chunk_mib": plan.CHUNK_BYTES[device] >> 20, "logits": logits}


def _sizes(device: str) -> list[Axis]:
    on_gpu = (
        "Every chunk reads the weight for the product of its logits, 2 bytes an element of the head, while that takes "
        "FLOPs in proportion to its rows: few rows make it bound by bytes. Larger is faster up to where FLOPs bound "
        "it, some hundred rows; beyond it memory buys nothing. dX and dW do not depend on it."
    )
    on_cpu = (
        "Chunks near the size of the cache keep logits there between their passes; fewer rows make slower products."
    )
    if device == "cuda":
        return [Axis("chunk_mib", (128, 256, 512, 1024), on_gpu)]
    return [Axis("chunk_mib", (1, 2, 4), on_cpu)]


CHUNK_BYTES = Experiment(
    "chunk-bytes",
    start=partial(_start, "float32"),
    axes=_sizes,
    trial=lambda device: _trial("bfloat16" if device == "cuda" else "float32", device),
    seconds=15,
)
CHUNK_BYTES_BF16 = Experiment(
    "chunk-bytes-bf16", start=partial(_start, "bfloat16"), axes=_sizes, trial=partial(_trial, "bfloat16"), seconds=10
)
LOGITS_DTYPE = Experiment(
    "logits-dtype",
    start=partial(_start, "float32"),
    axes=lambda device: [
        Axis(
            "logits",
            ("bfloat16",),
            "The products take the same FLOPs; the rows' kernel moves 4 bytes a logit instead of 6 and the first "
            "product writes 2 instead of 4. In return logp has the error of bf16, so that this is no default, "
            "whatever it gains.",
        )
    ],
    trial=partial(_trial, "bfloat16"),
    seconds=8,
)
