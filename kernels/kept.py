"""Sampling-mask replay: log-prob and entropy over the ids that top-p or top-k sampling kept, from their columns only.

A rollout that samples from a kept set ``K`` draws ``y`` with log-prob ``z_y - logsumexp_{k in K} z_k``, where ``z`` is
the raw logit after softcap, ``cap tanh(z / cap)``, then divided by the temperature. ``K`` has about eight ids a row, in
some rows thousands. The rows of the head that it names are gathered; neither ``[N, V]`` logits nor a copy of the head
is made: 2 nnz D FLOPs forward, 4 nnz D backward, ``nnz`` being the number of entries, all rows' kept ids together.

Entries stand in CSR: those of row i are ``indices[indptr[i]:indptr[i + 1]]``, in any order. Everything of length nnz is
small beside the gathered rows, hence the statistics are taken in fp64 and rounded once. No function waits for a CUDA
device, and all are deterministic. A row whose kept set lacks its target (an error on the CPU, not looked at on CUDA)
has a log-prob of nan, never a plausible one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from revisual_fast.kernels.reference import LOWEST

CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Size of one gathered chunk of the torch backend by device type; up to four such buffers are alive at a time."""


class Kept(NamedTuple):
    """The kept set of every row."""

    indptr: Tensor  # [N + 1] int64
    indices: Tensor  # [nnz] int64 vocabulary ids
    rows: Tensor  # [nnz] int64 row of each entry


class KeptStatistics(NamedTuple):
    """What the objective sees of each row, and what the gradient needs of each entry, in the dtype of the logits."""

    logp: Tensor  # [N] renormalised log-prob of the target, nats
    entropy: Tensor  # [N] over the kept set, nats
    log_p: Tensor  # [nnz] renormalised log-prob of each entry
    slope: Tensor  # [nnz] d z / d raw logit: 1 / temperature, times that of the softcap
    hit: Tensor  # [nnz] bool: the entry is the row's target


def make_kept(sampling_mask: tuple[Tensor, Tensor], targets: Tensor, vocab: int) -> Kept:
    """The checked kept sets of ``sampling_mask = (indptr [N + 1], indices [nnz])``, int32 or int64 each.

    Shapes, dtypes and devices are checked always, values on the CPU only, where that costs no sync: ``indptr`` rises
    from 0 to nnz, every row keeps at least one id, each id once and within ``[0, vocab)``, its target (``targets [N]``)
    among them. Raises ValueError that names the first row at fault.
    """
    indptr, indices = _check_form(sampling_mask, targets)
    on_cpu = targets.device.type == "cpu"
    if on_cpu:
        _check_indptr(indptr, len(indices))
    kept = Kept(indptr, indices, kept_rows(indptr, len(indices)))
    if on_cpu:
        _check_ids(kept, targets, vocab)
    return kept


def kept_rows(indptr: Tensor, nnz: int) -> Tensor:
    """Row of each entry, ``[nnz]`` int64."""
    return torch.repeat_interleave(indptr.diff(), output_size=nnz)


def kept_logits(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D] of hidden's dtype, or wider: then rounded to it
    bias: Tensor | None,  # [V]
    kept: Kept,
    stats_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Raw logits ``[nnz]`` of the kept ids in ``stats_dtype``, the dtype in which products are made and added."""
    if backend == "triton":
        from revisual_fast.kernels.kept_triton import gathered_products

        z = gathered_products(hidden, weight, kept.rows, kept.indices, stats_dtype)
    else:
        assert backend == "torch"
        z = _gathered_products(hidden, weight, kept, stats_dtype)
    return z if bias is None else z.add_(bias.to(stats_dtype)[kept.indices])


def kept_statistics(
    z: Tensor,  # [nnz] raw logits
    targets: Tensor,  # [N] int64
    kept: Kept,
    temperature: Tensor,  # [N] > 0
    softcap: float | None,
) -> KeptStatistics:
    """Log-prob and entropy of each row over its kept set, and what :func:`kept_gradient` needs."""
    dtype, rows = z.dtype, kept.rows
    z, slope = z.double(), temperature.double().reciprocal()[rows]
    if softcap is None:
        z = z * slope
    else:
        capped = torch.tanh(z / softcap)
        z = softcap * capped * slope
        slope = slope * (1 - capped.square())
    shifted = (z - _segments(z, "max", kept.indptr)[rows]).clamp_(min=LOWEST)
    p, hit = shifted.exp(), kept.indices == targets[rows]
    parts = torch.stack([p, p * shifted, torch.where(hit, shifted, 0), hit.double()], dim=1)
    total, weighted, target, hits = _segments(parts, "sum", kept.indptr).unbind(1)
    log_total = total.log()
    logp = torch.where(hits == 1, target - log_total, torch.nan)
    entropy, log_p = log_total - weighted / total, shifted - log_total[rows]
    return KeptStatistics(logp.to(dtype), entropy.to(dtype), log_p.to(dtype), slope.to(dtype), hit)


def kept_gradient(
    statistics: KeptStatistics,
    kept: Kept,
    c: Tensor,  # [N] dL/dlogp
    e: Tensor | None,  # [N] dL/dentropy
) -> Tensor:
    """dL/d(raw logits) ``[nnz]``: ``(c (1[j=y] - p_j) - e p_j (log p_j + H))`` times the slope."""
    log_p, rows = statistics.log_p, kept.rows
    p = log_p.exp()
    dz = torch.where(statistics.hit, -log_p.expm1(), -p).mul_(c[rows])  # 1 - p without cancellation
    if e is not None:
        dz.sub_(p.mul_(log_p + statistics.entropy[rows]).mul_(e[rows]))
    return dz.mul_(statistics.slope)


def kept_backward(
    dz: Tensor,  # [nnz] gradient of the raw logits
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    kept: Kept,
    needs: tuple[bool, bool, bool],
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX ``[N, D]`` in hidden's dtype, dW ``[V, D]`` and db ``[V]`` in the dtype of ``dz``; those that are needed.

    ``dX_i = sum_j dz_j W_j`` over the entries of row i, and ``dW_v = sum dz x_row`` over the entries of id v, which a
    stable sort brings together: the same sum of rows of a table, with rows and ids exchanged.
    """
    if backend == "triton":
        from revisual_fast.kernels.kept_triton import weighted_sums
    else:
        assert backend == "torch"
        weighted_sums = _weighted_sums
    d_hidden = d_weight = d_bias = None
    if needs[0]:
        d_hidden = weighted_sums(dz, kept.indices, kept.indptr, weight, hidden.dtype)
    if needs[1] or needs[2]:
        order = kept.indices.argsort(stable=True)
        ids = torch.arange(len(weight) + 1, device=dz.device)
        indptr = torch.searchsorted(kept.indices[order], ids)  # [V + 1]: where the entries of each id start
        if needs[1]:
            d_weight = weighted_sums(dz[order], kept.rows[order], indptr, hidden, dz.dtype)
        if needs[2]:
            d_bias = _segments(dz[order].double(), "sum", indptr).to(dz.dtype)
    return d_hidden, d_weight, d_bias


def kept_from_logits(logits: Tensor, kept: Kept, stats_dtype: torch.dtype) -> Tensor:
    """Raw logits ``[nnz]`` of the kept ids out of ready ``logits [N, V]``."""
    return logits[kept.rows, kept.indices].to(stats_dtype)


def kept_scatter(dz: Tensor, kept: Kept, gradient: Tensor) -> None:
    """Writes ``dz [nnz]`` into ``gradient [N, V]``, in place, where the kept ids stand; the rest must be 0 already."""
    gradient.index_put_((kept.rows, kept.indices), dz.to(gradient.dtype))


def _segments(values: Tensor, reduce: str, indptr: Tensor) -> Tensor:
    """``max`` or ``sum`` of ``values [nnz, ...]`` over each segment; over an empty one -inf or 0."""
    initial = -torch.inf if reduce == "max" else 0.0
    return torch.segment_reduce(values, reduce, offsets=indptr, initial=initial, unsafe=True)  # unsafe: without sync


def _gathered_products(hidden: Tensor, weight: Tensor, kept: Kept, dtype: torch.dtype) -> Tensor:
    z = hidden.new_empty(len(kept.indices), dtype=dtype)
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
    size = max(1, budget // (hidden.shape[1] * dtype.itemsize))
    for part, ids, rows in zip(z.split(size), kept.indices.split(size), kept.rows.split(size), strict=True):
        w = weight.index_select(0, ids).to(hidden.dtype).to(dtype)
        torch.sum(w.mul_(hidden.index_select(0, rows)), dim=-1, out=part)
    return z


def _weighted_sums(coefficients: Tensor, index: Tensor, indptr: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum_j coefficients_j table[index_j]`` over each segment, added up in at least fp32: ``[segments, D]``."""
    wide = torch.promote_types(table.dtype, dtype)  # bf16 stays bf16 where the result is bf16: no copy of the weight
    sums = embedding_bag(
        index, table.to(wide), indptr, mode="sum", per_sample_weights=coefficients.to(wide), include_last_offset=True
    )
    return sums.to(dtype)


def _check_form(sampling_mask: tuple[Tensor, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(sampling_mask, tuple | list) or len(sampling_mask) != 2:
        raise ValueError(f"sampling_mask must be a pair (indptr [N + 1], indices [nnz]); got {type(sampling_mask)}")
    names = ("indptr", "indices")
    for name, tensor in zip(names, sampling_mask, strict=True):
        if tensor.ndim != 1 or tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"sampling_mask's {name} must have one dimension and be int32 or int64; got {list(tensor.shape)} "
                f"{tensor.dtype}: flatten and cast it"
            )
        if tensor.device != targets.device:
            raise ValueError(f"sampling_mask's {name} is on {tensor.device}, targets on {targets.device}: move it")
    indptr, indices = sampling_mask
    if len(indptr) != len(targets) + 1:
        raise ValueError(
            f"sampling_mask's indptr must be [N + 1] = [{len(targets) + 1}]; got [{len(indptr)}]: keep the sets of the "
            f"rows that are passed in, those with a target"
        )
    return indptr.long().contiguous(), indices.long().contiguous()


def _check_indptr(indptr: Tensor, nnz: int) -> None:
    if indptr[0] != 0 or indptr[-1] != nnz:
        raise ValueError(
            f"sampling_mask's indptr must go from 0 to nnz = {nnz}; it goes from {indptr[0]} to {indptr[-1]}: "
            f"subtract indptr[0] and pass indices[indptr[0]:indptr[-1]]"
        )
    falling, empty = _first(indptr.diff() < 0), _first(indptr.diff() == 0)
    if falling is not None:
        raise ValueError(
            f"sampling_mask's indptr falls at row {falling}, from {indptr[falling]} to {indptr[falling + 1]}: it must "
            f"be the running total of the kept sets' sizes"
        )
    if empty is not None:
        raise ValueError(
            f"sampling_mask keeps no id in row {empty}: a sampled row keeps its target at least; drop rows that were "
            f"not sampled"
        )


def _check_ids(kept: Kept, targets: Tensor, vocab: int) -> None:
    outside = _first((kept.indices < 0) | (kept.indices >= vocab))
    if outside is not None:
        raise ValueError(
            f"sampling_mask keeps id {kept.indices[outside]} in row {kept.rows[outside]}, outside [0, {vocab}): drop "
            f"padding ids"
        )
    keys = (kept.rows * vocab + kept.indices).sort().values
    twice = _first(keys[1:] == keys[:-1])
    if twice is not None:
        raise ValueError(
            f"sampling_mask keeps id {keys[twice] % vocab} more than once in row {keys[twice] // vocab}: remove the "
            f"duplicates"
        )
    present = torch.zeros(len(targets), dtype=torch.bool)
    present[kept.rows[kept.indices == targets[kept.rows]]] = True
    lacking = _first(~present)
    if lacking is not None:
        raise ValueError(
            f"sampling_mask of row {lacking} lacks its target {targets[lacking]}, which then has probability 0: take "
            f"the mask after which the target was drawn, or add the target to it"
        )


def _first(bad: Tensor) -> int | None:
    """Where the first True stands, or None. For the CPU."""
    found = bad.nonzero()
    return int(found[0, 0]) if len(found) else None
