"""The vision tower without repeated work.

A tower computes, from the images' grids, where each patch stands, which patches form a window and how a table of
positions is resampled to the image. That depends on an image's shape alone: :class:`TowerInputs` keeps it per shape and
lays it end to end for a batch. All of it happens on the host, so nothing waits for a CUDA device.

transformers' attention in the towers splits a row into its windows in every layer, and calls the attention function
once per window: hundreds of small calls, and a wait for the device. The function registered here under :data:`NAME`
gets whole rows and a :class:`Windows` in the place of ``cu_seqlens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, vision_utils
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from revisual_fast.packing import to_device

__all__ = ["NAME", "TowerInputs", "Windows", "window_attention"]

NAME = "revisual_flash_windows"
"""transformers hands whole rows to an attention function whose name contains "flash", and to no other."""
TAPS_FIRST = not hasattr(vision_utils, "get_vision_interpolation_indices_and_weights")
"""transformers up to 5.16: a table's indices and weights are [4, patches] there and have other names."""
SHAPES = 128
"""Shapes of images whose indices are kept; an image of 1024 patches takes 70 KB at most."""


class Windows:
    """Attention within the windows of a row of ``n`` patches, ``lengths[0]`` patches, then ``lengths[1]``, and so on.

    Windows of equal length are one call, so that a Qwen2.5-VL of 8 x 8 patches in a window makes at most nine calls,
    whatever the images. Built once per batch, on the host. A backend that takes ``cu_seqlens`` belongs in
    :meth:`attend`, the only place that knows how it is done.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        length = torch.tensor(lengths)
        by_length, windows = length.sort(stable=True)
        sizes, counts = by_length.unique_consecutive(return_counts=True)
        self.buckets = list(zip(counts.tolist(), sizes.tolist(), strict=True))  # (windows, patches of each)
        self.longest = int(by_length[-1])
        self.bounds = F.pad(length.cumsum(0), (1, 0))  # [windows + 1] int64, on the host
        self.order: Tensor | None = None
        if not torch.equal(windows, torch.arange(len(length))):
            start = (length.cumsum(0) - length)[windows]
            within = torch.arange(int(length.sum())) - (by_length.cumsum(0) - by_length).repeat_interleave(by_length)
            order = start.repeat_interleave(by_length) + within
            self.order, self.back = (to_device(x, device) for x in (order, order.argsort()))  # [n] int64

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query, key and value [1, H, n, d] -> [1, n, H, d]."""
        q, k, v = (self._sorted(x[0].transpose(0, 1)) for x in (query, key, value))  # [n, H, d]
        parts, first = [], 0
        for windows, length in self.buckets:
            rows = slice(first, first := first + windows * length)
            a, b, c = (x[rows].unflatten(0, (windows, length)).transpose(1, 2) for x in (q, k, v))  # [windows, H, L, d]
            parts.append(F.scaled_dot_product_attention(a, b, c, scale=scaling).transpose(1, 2).flatten(0, 1))
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out[None] if self.order is None else _Permute.apply(out, self.back, self.order)[None]

    def __getitem__(self, part: slice) -> Tensor:
        """Of the bounds: transformers up to 5.16 computes the longest window from ``cu_seqlens`` in every layer."""
        return self.bounds[part]

    def _sorted(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else _Permute.apply(rows, self.order, self.back)


class _Permute(torch.autograd.Function):
    """``rows[order]``, whose gradient is a gather as well: no atomic additions."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None]:
        return d_rows.index_select(0, ctx.saved_tensors[0]), None, None


def window_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, n, d]
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every layer of a tower; see ``transformers.AttentionInterface``."""
    if not isinstance(cu_seq_lens_q, Windows):
        raise ValueError(f"attention {NAME!r} needs the tower's cu_seqlens as Windows; to use it elsewhere, reload it")
    return cu_seq_lens_q.attend(query, key, value, scaling), None


AttentionInterface.register(NAME, window_attention)


@dataclass(frozen=True)
class _Shape:
    """What a tower takes for one image of t * h * w patches, on the CPU."""

    frames: tuple[int, ...]  # patches of each frame
    position_ids: Tensor  # [patches, 2] int64
    window_index: Tensor  # [patches / merge²] int64
    windows: tuple[int, ...]  # patches of each window
    interp_indices: Tensor  # [patches, 4] int64
    interp_weights: Tensor  # [patches, 4] fp32


class TowerInputs:
    """What a tower of Qwen's takes besides pixels, for a batch of images; exactly what it would compute itself.

    ``merge`` is the tower's spatial merge size; ``window`` its windows' size in pixels and ``patch`` a patch's (None:
    no windows); ``table_side`` the side of its square table of positions (None: no table).
    """

    def __init__(self, merge: int, *, window: int | None = None, patch: int = 1, table_side: int | None = None):
        self.merge, self.window, self.patch, self.table_side = merge, window, patch, table_side
        self.shape = lru_cache(SHAPES)(self._shape)

    def __call__(self, grids: Tensor, device: torch.device) -> dict[str, Any]:
        """grids [I, 3] int64 on the CPU -> keywords for the tower's ``forward``, tensors on ``device``."""
        assert grids.device.type == "cpu", "reading grids from a device would wait for it"
        shapes = [self.shape(*grid) for grid in grids.tolist()]
        whole = Windows([n for s in shapes for n in s.frames], device)
        inputs: dict[str, Any] = {"cu_seqlens": whole, "max_seqlen": whole.longest}
        tensors = {"position_ids": torch.cat([s.position_ids for s in shapes])}
        if self.window is not None:
            windows = Windows([n for s in shapes for n in s.windows], device)
            inputs |= {"cu_window_seqlens": windows, "max_window_seqlen": windows.longest}
            first = grids.prod(1).cumsum(0) // self.merge**2
            parts = [s.window_index + f for s, f in zip(shapes, [0, *first.tolist()[:-1]], strict=True)]
            tensors["window_index"] = torch.cat(parts)
        if self.table_side is not None:
            taps = [torch.cat([s.interp_indices for s in shapes]), torch.cat([s.interp_weights for s in shapes])]
            kind = "bilinear" if TAPS_FIRST else "interp"
            for name, tap in zip(("indices", "weights"), taps, strict=True):
                tensors[f"{kind}_{name}"] = tap.T.contiguous() if TAPS_FIRST else tap
        return inputs | {name: to_device(tensor, device) for name, tensor in tensors.items()}

    def _shape(self, t: int, h: int, w: int) -> _Shape:
        grid, none = torch.tensor([[t, h, w]]), torch.empty(0)
        index, bounds, taps = none, none, (none, none)
        if self.window is not None:
            index, bounds = get_vision_window_index(grid, self.merge, self.window, self.patch)
        if self.table_side is not None:
            taps = _taps(grid, self.table_side, self.merge)
        return _Shape(
            (h * w,) * t, get_vision_position_ids(grid, self.merge), index, tuple(bounds.diff().tolist()), *taps
        )


def _taps(grid: Tensor, side: int, merge: int) -> tuple[Tensor, Tensor]:
    """Entries of a square table that an image's patches are interpolated from, and their weights, [patches, 4] each."""
    utils: Any = vision_utils
    if TAPS_FIRST:
        indices, weights = utils.get_vision_bilinear_indices_and_weights(grid, side, merge)
        return indices.T, weights.T
    return utils.get_vision_interpolation_indices_and_weights(
        grid, side, mode="bilinear", align_corners=True, spatial_merge_size=merge
    )
