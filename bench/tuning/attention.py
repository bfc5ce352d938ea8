"""Attention over packed groups: the backends against each other, and the tiles of the Triton kernels.

A tile that is cut by the diagonal, or by the end of a segment, is computed whole: that is what a launch changes in the
counted work. Every setting that is tried compiles for compute capability 9.0 without a spilled register; what is
adopted has to pass the gate for all architectures (``tests/kernels/test_compile_gates.py``), or gets its own table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache, partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

from bench import counts, own
from bench.attention import GATHERED, groups, pairs, shared_attention
from bench.harness import Case, Problem, Variant
from bench.machine import gemm_ceiling
from bench.packing import QUERIES, head_size, shared_prompts
from bench.tuning.experiment import Axis, Experiment, Piece, Setting, Trial, under
from bench.tuning.rows import case_of, cuda_only
from revisual_fast.packing import Segments

FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10  # a visible pair and element of a head, where scores are made once in each
KERNEL_FLOPS = {"forward": 4, "query": 6, "key": 8}  # of ours: the backward pass is two kernels, both make the scores
EXPECTED = 0.5  # of the GEMM rate: what attention with an online softmax reaches on Hopper by mma or wgmma
NAMES = {"triton": "revisual-fast triton", "torch": "revisual-fast torch", "sdpa": "SDPA rectangles"}
NAMES |= {backend: f"gather + {name}" for backend, name in GATHERED.items()}


@lru_cache(maxsize=1)
def problem_of(case: Case) -> Problem:
    """With the products of a projection as the ceiling of the FLOPs; the answer is kept."""
    problem = shared_attention(case)
    gemm = gemm_ceiling(case.n, case.d, case.d, case.torch_dtype, case.device)
    answer = lru_cache(maxsize=1)(problem.reference)
    return replace(problem, ceilings=problem.ceilings | {"gemm": gemm}, reference=answer)


def _trial(device: str, candidate: Any, pieces: Any) -> Trial:
    problem = problem_of(case_of("shared_attention", device))
    yardsticks = [own.named(problem, "eager")]
    fixed = replace(problem, variants=yardsticks)
    return Trial(fixed, lambda setting: candidate(problem, setting), lambda setting: pieces(problem.case, setting))


# backends


def _backend_pieces(case: Case, setting: Setting) -> list[Piece]:
    segments, backend = groups(case.n), setting["backend"]
    if backend in ("triton", "torch"):
        return [Piece(flops=sum(KERNEL_FLOPS.values()) * pairs(segments) * case.d, share=EXPECTED)]
    both = FORWARD_FLOPS + BACKWARD_FLOPS
    if backend == "sdpa":
        whole = sum(n * (prefix + n) for n, prefix in zip(segments.length, segments.prefix_length, strict=True))
        return [Piece(flops=both * whole * case.d, share=EXPECTED)]
    width = max(1, case.d // head_size(case.d) // QUERIES) * head_size(case.d)
    moved = counts.kv_bytes(case.n, len(shared_prompts(case.n)), width, case.torch_dtype.itemsize)
    return [Piece(bytes=moved), Piece(flops=both * pairs(segments) * case.d, share=EXPECTED)]


def _backend(problem: Problem, setting: Setting) -> Variant:
    return replace(own.named(problem, NAMES[setting["backend"]]), role="ours", note="")


BACKENDS = Experiment(
    "attention-backends",
    start=lambda device: {"backend": "triton" if device == "cuda" else "sdpa"},
    axes=lambda device: [
        Axis(
            "backend",
            ("sdpa", "varlen", "flash") if device == "cuda" else ("torch",),
            "Reading a prompt where it lies saves the gather's bytes, but two backward kernels that both make the "
            "scores take 18 FLOPs a pair and element, not 14: flash-attn behind a gather is ahead by their ratio "
            "less the gather, and by what a kernel written for Hopper reaches above half the GEMM rate. Rectangles "
            "compute what is masked.",
        )
    ],
    trial=lambda device: _trial(device, _backend, _backend_pieces),
    seconds=25,
)


# tiles of ours


def tile(which: str, queries: int, keys: int, warps: int, stages: int) -> AbstractContextManager[Any]:
    """Of the kernel ``which`` (forward, query or key) of 16-bit heads of 128 elements; the others keep theirs."""
    module = import_module("revisual_fast.kernels.shared_attention_launch")
    changed = {which: module.Launch(queries, keys, warps, stages)}
    table = tuple((width, of._replace(**changed) if width == 128 else of) for width, of in module.HALF_LAUNCHES)
    return patch.object(module, "HALF_LAUNCHES", table)


def _present(which: str, device: str) -> Setting:
    module = import_module("revisual_fast.kernels.shared_attention_launch")
    return dict(getattr(module.launches(128, 2), which)._asdict())


def by_query_tiles(segments: Segments, queries: int, keys: int) -> int:
    """Pairs that are computed: whole tiles, up to the last key that a row of the tile sees."""
    total = 0
    for length, prefix in zip(segments.length, segments.prefix_length, strict=True):
        ends = (min(first + queries, length) for first in range(0, length, queries))
        total += sum(queries * math.ceil((prefix + end) / keys) * keys for end in ends)
    return total


def by_key_tiles(segments: Segments, queries: int, keys: int) -> int:
    """The same from the keys' side: their own later rows, and all rows that have them as their prefix."""
    total = 0
    starts, readers = list(segments.start), dict.fromkeys(segments.start, 0)
    for length, prefix, n_prefix in zip(segments.length, segments.prefix_start, segments.prefix_length, strict=True):
        readers[prefix] += length if n_prefix else 0
    for start, length in zip(starts, segments.length, strict=True):
        later = (length - first + readers[start] for first in range(0, length, keys))
        total += sum(keys * math.ceil(n / queries) * queries for n in later)
    return total


def _tile_pieces(which: str, case: Case, setting: Setting) -> list[Piece]:
    """All three kernels, two of them as they are."""
    segments, found = groups(case.n), []
    for name, flops in KERNEL_FLOPS.items():
        of = setting if name == which else _present(name, case.device)
        computed = (by_key_tiles if name == "key" else by_query_tiles)(segments, of["queries"], of["keys"])
        found.append(Piece(flops=flops * computed * case.d, share=EXPECTED))
    return found


def _tiled(which: str, problem: Problem, setting: Setting) -> Variant:
    mine = own.named(problem, NAMES["triton"])
    assert mine.setup is not None, mine.reason
    return replace(mine, setup=under(mine.setup, lambda: tile(which, **setting)))


def _spills(which: str, setting: Setting) -> str:
    """As compiled for 9.0 by Triton 3.9 (LOG.md)."""
    larger = (setting["queries"] > 32) + (setting["keys"] > 64)
    deep = setting["queries"] > 32 and setting["stages"] > 2
    if which == "key" and (deep or larger > (setting["warps"] == 8)):
        return "registers spill"
    return "more shared memory than there is" if setting["keys"] * setting["stages"] > 384 else ""


def _tiles(name: str, which: str, seconds: float, axes: Sequence[Axis]) -> Experiment:
    return Experiment(
        name,
        start=partial(_present, which),
        axes=lambda device: axes,
        trial=lambda device: _trial(device, partial(_tiled, which), partial(_tile_pieces, which)),
        seconds=seconds,
        why_not=partial(cuda_only, "triton"),
        pruned=partial(_spills, which),
    )


KEYS = "Smaller tiles of keys compute less beyond the diagonal; larger ones rescale less often."
STAGES = (
    "The loads of a tile of keys take less time than its products: two stages hide them, a third only costs memory."
)
FORWARD = _tiles(
    "attention-forward",
    "forward",
    35,
    [
        Axis("keys", (32, 128), KEYS + " 128 takes 229 KB of shared memory: it would need a table for Hopper."),
        Axis("stages", (2, 4), STAGES),
        Axis(
            "queries", (64,), "Half as many rows read each key twice as often, from L2, for less beyond the diagonal."
        ),
    ],
)
QUERY_GRADIENT = _tiles("attention-dq", "query", 15, [Axis("keys", (64,), KEYS), Axis("stages", (2,), STAGES)])
KEY_GRADIENTS = _tiles(
    "attention-dkv",
    "key",
    28,
    [
        Axis("warps", (8,), "Eight warps have half the elements each to hold, and more to exchange."),
        Axis("keys", (128,), "Twice the keys read the queries half as often; needs eight warps."),
        Axis("queries", (64,), "Twice the queries make longer products; needs eight warps."),
        Axis("stages", (3,), STAGES),
    ],
)
