"""The row kernels of csrc/rows.cu and csrc/rows_cluster.cu; see ``rows``.

Statistics read 2 bytes a bf16 logit, the gradient reads and writes 4. The whole loss takes 4 where a row fits into the
shared memory of a thread-block cluster (from compute capability 9.0 on), 6 elsewhere. Logits are bf16, fp16 or fp32,
the gradient of the same dtype or, of fp32 logits, 16 bits wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revisual_fast.kernels import cuda_library
from revisual_fast.kernels.plan import CORRECTIONS, KL_FORMS, SURROGATES, Inline
from revisual_fast.kernels.rows import RawRows

assert cuda_library.load() is None, "who asks for this backend has checked that it can be had"
OPS = torch.ops.revisual_fast_cuda

BLOCKS_PER_MULTIPROCESSOR = 2
"""Of the loss that keeps a row in a cluster's shared memory: 2 where the row allows it, 1, or 0, to read rows twice."""


def _of(rows: RawRows) -> tuple[Any, ...]:
    """bias, targets, temperature, mask and softcap, as every op takes them."""
    t = rows.transform
    return rows.bias, rows.targets, t.temperature, t.mask, 0.0 if t.softcap is None else t.softcap


def statistics(rows: RawRows, logp: Tensor, entropy: Tensor, top: Tensor, total: Tensor) -> None:
    """Writes ``[n]`` vectors; ``top`` and ``total`` are what :func:`gradient` needs besides."""
    OPS.row_statistics(rows.z, *_of(rows), logp, entropy, top, total)


def gradient(
    rows: RawRows,
    out: Tensor,  # [k, V]
    index: Tensor | None,  # [k] which rows; None: all
    entropy: Tensor,  # [n], as all that follow
    top: Tensor,
    total: Tensor,
    c: Tensor,
    e: Tensor | None,
) -> None:
    """Writes the gradient of the rows' raw logits to ``out``."""
    OPS.row_gradient(rows.z, out, index, *_of(rows), entropy, top, total, c, e)


def loss(
    rows: RawRows,
    out: Tensor,  # [n, V]
    objective: Inline,
    vectors: Sequence[Tensor | None],  # advantages, old, ref, rollout, weight: [n]
    logp: Tensor,  # [n], as all that follow
    entropy: Tensor,
    losses: Tensor,
    c: Tensor,
    e: Tensor | None,
) -> None:
    """Writes statistics, loss, ``c``, ``e`` and the gradient of the rows' raw logits."""
    o = objective
    numbers = (SURROGATES[o.surrogate], KL_FORMS[o.kl], o.kl_bias_correction, CORRECTIONS[o.correction], o.numbers)
    OPS.row_loss(rows.z, out, *_of(rows), logp, entropy, losses, c, e, *vectors, *numbers, BLOCKS_PER_MULTIPROCESSOR)
