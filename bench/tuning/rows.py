"""Launches of the row kernels.

Of the CUDA kernel that keeps a row in a cluster's shared memory the host has one knob, the blocks that a multiprocessor
holds (``rows_cuda.BLOCKS_PER_MULTIPROCESSOR``). Threads (512), packs under way a thread and the cluster's size follow
from the row or are constants of the code (``csrc/row_kernels.cuh``, ``csrc/rows.cuh``: ``plan_cluster``): another value
is another build. Of the Triton kernels all is in ``kernels/launch.py``; the number of stages of the pipeline changes
nothing in their machine code (LOG.md) and is not tried.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache, partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch

from bench import own
from bench.harness import Case, Problem, Variant
from bench.ours import INTERPRETED
from bench.shapes import SHAPES
from bench.tuning.experiment import Axis, Experiment, Piece, Setting, Trial, under
from revisual_fast.kernels import launch
from revisual_fast.kernels.dispatch import backend_problem

BLOCKS_A_MULTIPROCESSOR, WARPS_A_MULTIPROCESSOR = 32, 64  # at most, compute capability 9.0
NEEDED = 26 << 10
"""Bytes that a multiprocessor of an H200 must have under way for the whole bandwidth (Little's law): 4.3 TB/s for
0.8 us from a load to its data, over 132 multiprocessors."""
MOST_ELEMENTS = 64  # of a tile, a thread: with all options 222 registers and none spilled, as compiled for 9.0
SMALL = (256, 128, 8000)  # N, D, V
EXPOSED = 2.0 / 4.7  # of a row's time, by the estimate in LOG.md, where a multiprocessor has one block


@lru_cache(maxsize=1)
def problem_of(case: Case) -> Problem:
    """Kept for the next experiment on the same inputs."""
    return getattr(own, case.op)(case)


def case_of(op: str, device: str, dtype: str = "bfloat16") -> Case:
    """The suite's first on a GPU; a small one on a CPU, where it is the search that is looked at."""
    sizes = SHAPES["gpu"][op][0]
    n, d, v = sizes if device == "cuda" else (small if size else 0 for size, small in zip(sizes, SMALL, strict=True))
    return Case(op, n, d, v, dtype, device)


def cuda_only(backend: str, device: str) -> str:
    if device != "cuda":
        return INTERPRETED if backend == "triton" else "needs CUDA"
    return backend_problem(backend, torch.device(device)) or ""


def _trial(op: str, backend: str, setting_of: Any, pieces: Any, device: str) -> Trial:
    """``setting_of(**setting)`` is the context in which a setting is in force; ``pieces(case, **setting)`` its work."""
    problem = problem_of(case_of(op, device))
    mine = own.named(problem, f"revisual-fast {backend}")
    assert mine.setup is not None, mine.reason
    setup = mine.setup

    def candidate(setting: Setting) -> Variant:
        return replace(mine, setup=under(setup, lambda: setting_of(**setting)))

    yardsticks = [variant for variant in problem.variants if variant.role == "plain"]
    return Trial(replace(problem, variants=yardsticks), candidate, lambda s: pieces(problem, **s))


def blocks(blocks: int) -> AbstractContextManager[Any]:
    return patch.object(import_module("revisual_fast.kernels.rows_cuda"), "BLOCKS_PER_MULTIPROCESSOR", blocks)


def row_launch(block: int, warps: int) -> AbstractContextManager[Any]:
    """All Triton row kernels with this launch, whatever the row."""
    return patch.object(launch, "ROW_LAUNCHES", ((1 << 62, launch.Launch(block, warps)),))


def _cluster_pieces(problem: Problem, blocks: int) -> list[Piece]:
    if blocks:
        return [Piece(bytes=problem.bytes, share=1.0 if blocks > 1 else 1 / (1 + EXPOSED))]
    return [_read_twice(problem)]


def _read_twice(problem: Problem, share: float = 1.0) -> Piece:
    case = problem.case
    return Piece(bytes=problem.bytes + case.n * case.v * case.torch_dtype.itemsize, share=share)


def _tile_pieces(problem: Problem, block: int, warps: int) -> list[Piece]:
    resident = min(BLOCKS_A_MULTIPROCESSOR, WARPS_A_MULTIPROCESSOR // warps)
    share = min(1.0, resident * block * problem.case.torch_dtype.itemsize / NEEDED)
    once = problem.case.op == "logits_statistics"
    return [Piece(bytes=problem.bytes, share=share) if once else _read_twice(problem, share)]


def _too_many(setting: Setting) -> str:
    elements = setting["block"] // (32 * setting["warps"])
    if elements > MOST_ELEMENTS:
        return f"{elements} elements a thread, more than have been compiled without a spill"
    return "" if elements else "less than an element a thread"


def _present_launch(op: str, device: str) -> Setting:
    found = launch.row_launch(case_of(op, device).v)
    return {"block": found.block, "warps": found.warps}


def _triton(name: str, op: str, reads: str, seconds: float) -> Experiment:
    def axes(device: str) -> list[Axis]:
        tile = (
            f"A row is read {reads}, whatever the tile, so the floor is the same. A multiprocessor needs "
            f"{NEEDED >> 10} KiB under way; at 8 warps 8 programs are resident, so tiles of 2,048 and more reach the "
            "floor, 1,024 reaches 0.62 of it."
        )
        share = "More warps a program leave fewer programs to be in different phases; bytes under way stay above need."
        return [Axis("block", (1024, 2048, 8192), tile), Axis("warps", (4, 16), share)]

    return Experiment(
        name,
        start=partial(_present_launch, op),
        axes=axes,
        trial=partial(_trial, op, "triton", row_launch, _tile_pieces),
        seconds=seconds,
        why_not=partial(cuda_only, "triton"),
        pruned=_too_many,
    )


CUDA_BLOCKS = Experiment(
    "cuda-blocks",
    start=lambda device: {"blocks": import_module("revisual_fast.kernels.rows_cuda").BLOCKS_PER_MULTIPROCESSOR},
    axes=lambda device: [
        Axis(
            "blocks",
            (1, 0),
            "Two blocks a multiprocessor hide what one leaves exposed, by estimate 2 us of a row's 4.7; reading a "
            "row twice (0) moves 6 bytes a logit instead of 4, less what the L2 cache still has.",
        )
    ],
    trial=partial(_trial, "policy_loss_from_logits", "cuda", blocks, _cluster_pieces),
    seconds=15,
    why_not=partial(cuda_only, "cuda"),
)
TRITON_LOSS = _triton("triton-loss", "policy_loss_from_logits", "twice, 6 bytes a logit with the gradient", 25)
TRITON_STATISTICS = _triton("triton-statistics", "logits_statistics", "once, 2 bytes a logit", 20)
