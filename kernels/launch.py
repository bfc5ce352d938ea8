"""Launch tables: which tile and how many warps a kernel gets. Pure functions of the shape, so that they can be listed.

Tables in place of autotuning: no search at the first call of a run, the same launch in every process, and every entry
is compiled and checked for register spills without a GPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    block: int  # elements of a row in a tile
    warps: int
    stages: int = 1  # of the software pipeline


ROW_LAUNCHES = (
    # longest row (in elements) that the entry serves -> launch
    (256, Launch(256, 1)),
    (1024, Launch(1024, 4)),
    (4096, Launch(4096, 8)),
    (1 << 62, Launch(4096, 8, 3)),
)


def row_launch(vocab: int) -> Launch:
    """Launch of the row kernels for rows of ``vocab`` logits."""
    return next(launch for longest, launch in ROW_LAUNCHES if vocab <= longest)
