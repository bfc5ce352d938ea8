"""FLOPs and bytes of every op, counted by hand: the only place with these formulas.

``N`` rows, hidden size ``D``, vocabulary ``V``, ``K`` kept ids a row (sampling-mask replay). A multiply-add is two
FLOPs; only matrix products count. Bytes are the fewest that any implementation moves: each input read once, each output
written once. Percentages of a ceiling refer to these figures, whatever a variant really does.
"""

from __future__ import annotations

import math

FP32, INT64 = 4, 8  # bytes
VECTORS = 4
"""fp32 ``[N]`` of a plain loss: advantages and old log-probs in, log-probs and entropies out."""


def head_flops(n: int, d: int, v: int, products: int = 3) -> int:
    """``2 N D V`` for each product of the shape: logits, dX and dW make 6 N D V; computing the logits twice, 8."""
    return 2 * products * n * d * v


def head_bytes(n: int, d: int, v: int, itemsize: int) -> int:
    """hidden and weight in, their gradients out, targets in, ``VECTORS`` in or out."""
    return 2 * itemsize * (n * d + v * d) + n * (INT64 + VECTORS * FP32)


def logits_bytes(n: int, v: int, itemsize: int) -> int:
    """logits ``[N, V]`` in, their gradient out: 4 bytes a bf16 logit."""
    return 2 * itemsize * n * v + n * (INT64 + VECTORS * FP32)


def statistics_bytes(n: int, v: int, itemsize: int) -> int:
    """logits ``[N, V]`` and targets in, fp32 log-prob and entropy out: 2 bytes a bf16 logit."""
    return itemsize * n * v + n * (INT64 + 2 * FP32)


def replay_flops(n: int, d: int, kept: int) -> int:
    """6 K N D: the three products over the kept columns only."""
    return head_flops(n, d, kept)


def replay_bytes(n: int, d: int, v: int, kept: int, distinct: int, itemsize: int) -> int:
    """hidden and, of the weight, the distinct rows that are kept in; dX and a dense dW out; the mask in."""
    mask = INT64 * (n * kept + n + 1)
    return itemsize * (2 * n * d + distinct * d + v * d) + mask + n * (INT64 + VECTORS * FP32)


def advantages_bytes(n: int, groups: int) -> int:
    """fp32 rewards and the groups' bounds in, fp32 advantages out."""
    return 2 * FP32 * n + INT64 * (groups + 1)


def pad_bytes(n: int) -> int:
    """fp32 advantages and fp64 noise in, a mask of bytes out; its threshold is a sort or a search in chip memory."""
    return n * (FP32 + 8 + 1)


def gather_bytes(n: int, distinct: int, d: int, itemsize: int) -> int:
    """The distinct rows read, N rows written; N rows of gradient read, a dense gradient of N rows written."""
    return itemsize * d * (distinct + 3 * n) + n * INT64


def embeddings_bytes(n: int, distinct: int, features: int, d: int, v: int, itemsize: int) -> int:
    """``distinct`` rows of a table of V and all features read, N rows written; N rows of gradient read, the features'
    and a dense table's written; two int64 a row."""
    return itemsize * d * (distinct + features + 2 * n + features + v) + 2 * INT64 * n


def kv_bytes(n: int, gathered: int, d: int, itemsize: int) -> int:
    """Key and value of N rows read and of ``gathered`` rows written, and the same for the gradients the other way."""
    return 2 * 2 * itemsize * d * (n + gathered) + INT64 * gathered


def mrope_bytes(n: int, width: int, itemsize: int) -> int:
    """q and k, ``width`` elements a row in all, read and written, and likewise their gradients; positions, twice."""
    return 4 * itemsize * n * width + 2 * 3 * INT64 * n


def floor_seconds(flops: float, n_bytes: float, flops_per_s: float | None, bytes_per_s: float) -> float:
    """No implementation is faster: the longer of the time for the products and the time for the bytes."""
    return max(flops / flops_per_s if flops and flops_per_s else 0.0, n_bytes / bytes_per_s)


def percentile(samples: list[float], share: float) -> float:
    """Value below which ``share`` in [0, 1] of the samples lie, linear between samples. Raises ValueError if empty."""
    if not samples:
        raise ValueError("percentile of no samples: time at least one round")
    ordered = sorted(samples)
    at = share * (len(ordered) - 1)
    low, high = math.floor(at), math.ceil(at)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
