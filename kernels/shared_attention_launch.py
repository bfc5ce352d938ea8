"""Launches of the Triton kernels of shared attention: tables of the tiles, launchers, and what is compiled in tests.

Chosen from what the compiler reports, not measured: large tiles whose registers do not spill at heads of 64 and 128
elements, in the 99 KB of shared memory that a program has on an RTX card. At other heads a few bytes spill at most, but
for dQ of fp32 heads wider than 128.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from revisual_fast.kernels.shared_attention_tiles import GRAIN, AttentionTiles
from revisual_fast.kernels.shared_attention_triton import forward_kernel, key_gradient_kernel, query_gradient_kernel

LOG2_E = 1.4426950408889634
LONGEST = 2**31 - 1
"""Elements that an int32 can count."""
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


class Launch(NamedTuple):
    queries: int  # rows of a tile of queries
    keys: int  # rows of a tile of keys
    warps: int
    stages: int  # of the software pipeline


class Launches(NamedTuple):
    forward: Launch
    query: Launch  # dQ
    key: Launch  # dK and dV


HALF_LAUNCHES = (  # bf16 and fp16: tensor cores
    # widest padded head that the entry serves -> launches
    (64, Launches(Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(32, 128, 8, 3))),
    (128, Launches(Launch(128, 64, 8, 3), Launch(128, 32, 8, 3), Launch(32, 64, 4, 2))),
    (256, Launches(Launch(64, 32, 8, 2), Launch(64, 16, 8, 2), Launch(32, 32, 8, 2))),
)
FULL_LAUNCHES = (  # fp32: no tensor cores, and operands in registers
    (64, Launches(Launch(32, 16, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1))),
    (128, Launches(Launch(32, 32, 16, 1), Launch(16, 16, 8, 1), Launch(32, 32, 16, 1))),
    (256, Launches(Launch(16, 16, 8, 1), Launch(16, 16, 16, 1), Launch(16, 16, 8, 1))),
)


def launches(width: int, itemsize: int) -> Launches:
    """Of heads padded to ``width`` elements of ``itemsize`` bytes."""
    table = FULL_LAUNCHES if itemsize == 4 else HALF_LAUNCHES
    return next(entry for widest, entry in table if width <= widest)


# launchers: they fill the outputs that they are given; elements of a head lie side by side in all tensors


def forward(
    query: Tensor,  # [T, H, d]
    key: Tensor,  # [T, Hkv, d]
    value: Tensor,
    tiles: AttentionTiles,
    scale: float,
    out: Tensor,  # [T, H, d] contiguous
    lse: Tensor,  # [H, T] fp32: log2 of the sum of powers of two
) -> None:
    settings = _settings("forward", tiles.grain, query, key, value, out)
    heads = query.shape[1]
    with torch.cuda.device_of(query):
        forward_kernel[(_cuts(tiles.query_tiles, tiles.grain, settings["BLOCK_M"]) * heads,)](
            *(query, key, value, out, lse, tiles.query_tiles, tiles.own_start),
            *(len(query), heads, heads // key.shape[1], scale * LOG2_E, *_strides(query, key, value)),
            **settings,
        )


def query_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: AttentionTiles,
    scale: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,  # [T, H, d]
    d_query: Tensor,  # [T, H, d] contiguous
    delta: Tensor,  # [H, T] fp32: sums of out times its gradient, which key_gradients needs
) -> None:
    settings = _settings("query", tiles.grain, query, key, value, d_out, out)
    heads = query.shape[1]
    with torch.cuda.device_of(query):
        query_gradient_kernel[(_cuts(tiles.query_tiles, tiles.grain, settings["BLOCK_M"]) * heads,)](
            *(query, key, value, out, d_out, d_query, lse, delta, tiles.query_tiles, tiles.own_start),
            *(len(query), heads, heads // key.shape[1], scale, scale * LOG2_E),
            *_strides(query, key, value, d_out),
            **settings,
        )


def key_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: AttentionTiles,
    scale: float,
    lse: Tensor,
    d_out: Tensor,
    delta: Tensor,
    d_key: Tensor,  # [splits, T, Hkv, d] contiguous, as d_value: to be summed over splits
    d_value: Tensor,
) -> None:
    settings = _settings("key", tiles.grain, query, key, value, d_out, d_key[0])
    splits, _, kv_heads, _ = d_key.shape
    heads = query.shape[1]
    with torch.cuda.device_of(query):
        key_gradient_kernel[(_cuts(tiles.key_tiles, tiles.grain, settings["BLOCK_N"]) * kv_heads * splits,)](
            *(query, key, value, d_out, d_key, d_value, lse, delta, tiles.key_tiles, tiles.own_end),
            *(len(query), splits, heads, heads // kv_heads, scale, scale * LOG2_E),
            *_strides(query, key, value, d_out),
            **settings,
        )


def _cuts(tiles: Tensor, grain: int, block: int) -> int:
    return len(tiles) * (grain // block)


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(i) for x in tensors for i in (0, 1)]


def _settings(which: str, grain: int, *tensors: Tensor) -> dict[str, Any]:
    """Constants and options of a launch that reads and writes rows of these tensors."""
    head, itemsize = tensors[0].shape[2], tensors[0].dtype.itemsize
    long = max(len(x) * x.stride(0) for x in tensors) > LONGEST
    return {"LONG": long, "INTERPRETED": INTERPRETED, **_constants(which, grain, head, itemsize)}


def _constants(which: str, grain: int, head: int, itemsize: int) -> dict[str, Any]:
    width = max(16, triton.next_power_of_2(head))
    launch: Launch = getattr(launches(width, itemsize), which)
    blocks = {"BLOCK_M": min(launch.queries, grain), "BLOCK_N": min(launch.keys, grain), "GRAIN": grain}
    return {"HEAD": head, "WIDTH": width, **blocks, "num_warps": launch.warps, "num_stages": launch.stages}


# what is compiled without a GPU

Gate = tuple[Any, dict[str, str], dict[str, Any], int, int]


def gates() -> list[Gate]:
    """(kernel, signature, constexprs, num_warps, num_stages) of launches that must compile without a spill."""
    kernels = {"forward": forward_kernel, "query": query_gradient_kernel, "key": key_gradient_kernel}
    found = []
    for dtype, head in (("bf16", 128), ("bf16", 64), ("fp32", 128)):
        for which, kernel in kernels.items():
            constants = _constants(which, GRAIN, head, 4 if dtype == "fp32" else 2)
            constants |= {"LONG": False, "INTERPRETED": False}
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            found.append((kernel, _types(kernel, dtype, constants), constants, warps, stages))
    return found


def _types(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    special = {"tiles_ptr": "*i32", "own_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    special |= {"d_k_ptr": "*fp32", "d_v_ptr": "*fp32", "scale": "fp32", "factor": "fp32"}
    special |= dict.fromkeys(constants, "constexpr")
    return {name: special.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
