"""Group-relative advantages (GRPO, arXiv 2402.03300) and Prioritized Advantage Distillation (PAD, arXiv 2506.04207).

``N`` completions in groups, one group a prompt. Groups are given by ``group_ids [N]`` (any integers, in any order) or
by ``group_sizes`` (consecutive rows); rewards ``[B, G]`` say it by their shape. All of this needs rewards only: it runs
before any forward pass of the policy.

These are the general forms, which read values back to check them. For a large batch that is on a CUDA device already,
with groups one after the other, ``revisual_fast.kernels.groups`` has ``group_advantages`` and ``pad_mask``, which do
the same without waiting for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "PAD_MODES", "PadResult", "check_pad_settings", "group_advantages", "linear_schedule", "pad_select", "stagnation",
]  # fmt: skip

PAD_MODES = ("paper", "released", "filter", "sample", "off")
RELEASED_THRESHOLDS = (0.03, 0.97)
RELEASED_POWER = 1.5  # probability ~ |A|^1.5
RELEASED_DRAWS = 1.5  # times N, with replacement


@dataclass(frozen=True)
class PadResult:
    """Which completions of a batch are trained on, and what became of the others."""

    indices: Tensor  # [k] int64, ascending; "released" draws with replacement, so an index may stand there twice
    n_total: int  # N
    n_effective: int  # |E|: completions within the thresholds (N for the modes without)
    dropped_low: int  # |A| below T_low: no signal
    dropped_high: int  # |A| above T_high
    dropped_minority: int | None  # of dropped_high, the rarer outcome of its group; None if outcomes were not given

    @property
    def empty(self) -> bool:
        """Whether nothing was selected: the caller skips the update and counts it."""
        return len(self.indices) == 0


def group_advantages(
    rewards: Tensor,  # [N] or [B, G]
    *,
    group_ids: Tensor | None = None,  # [N]
    group_sizes: Tensor | Sequence[int] | None = None,  # [B], sum N
    eps: float = 1e-6,
    scale: str = "std",
) -> Tensor:
    """Advantages ``[N]`` fp32: ``(r - mean) / (std + eps)`` within the group; ``scale="none"`` leaves the division out.

    std is the sample's (n - 1). Exactly 0 in a group whose rewards are all equal, a group of one included. The second
    form is Dr. GRPO's (arXiv 2503.20783). Raises ValueError for groups that do not fit and for rewards that are not
    finite.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale={scale!r} is unknown; it is one of std, none")
    values, ids, n_groups = _grouped("rewards", rewards, group_ids, group_sizes)
    counts = _sums(torch.ones_like(values), ids, n_groups)
    centred = values - (_sums(values, ids, n_groups) / counts)[ids]
    centred = centred.masked_fill(_all_equal(values, ids, n_groups)[ids], 0.0)
    if scale == "std":
        std = (_sums(centred.square(), ids, n_groups) / (counts - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)[ids]
    return centred.float()


def stagnation(
    rewards: Tensor,  # [N] or [B, G]
    *,
    group_ids: Tensor | None = None,
    group_sizes: Tensor | Sequence[int] | None = None,
) -> float:
    """Share of the groups in [0, 1] whose values are all equal, so that they give no gradient (0 without groups).

    Measure it on accuracy apart from the reward: a shaped reward (length, keywords) differs within a group that is all
    wrong. Raises ValueError as :func:`group_advantages`.
    """
    values, ids, n_groups = _grouped("rewards", rewards, group_ids, group_sizes)
    return _all_equal(values, ids, n_groups).double().mean().item() if n_groups else 0.0


def linear_schedule(start: float, end: float, progress: float) -> float:
    """``start`` at progress 0, ``end`` at 1. Raises ValueError outside [0, 1]."""
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie in [0, 1]; got {progress!r}: divide the step by the number of steps")
    return start + (end - start) * progress


def pad_select(
    advantages: Tensor,  # [N]
    *,
    mode: str = "paper",
    rho: float = 1.0,
    t_low: float = 1e-4,
    t_high: float = math.inf,
    tau: float = 0.3,
    generator: torch.Generator | None = None,
    outcomes: Tensor | None = None,  # [N] accuracy of each completion, for dropped_minority
    group_ids: Tensor | None = None,
    group_sizes: Tensor | Sequence[int] | None = None,
) -> PadResult:
    """Choose completions by ``a = |A|`` (arXiv 2506.04207).

    - paper: of ``E = {t_low <= a <= t_high}``, ``min(ceil(rho N), |E|)`` drawn without replacement with probability
      ``softmax(a / tau)``. Nothing if E is empty.
    - released: as the authors' code: ``E = {0.03 < a < 0.97}``, ``floor(1.5 N)`` drawn with replacement with
      probability ``a^1.5``, the full batch if E is empty. ``rho``, ``t_low``, ``t_high``, ``tau`` have no say.
    - filter: all of E. sample: the paper's draw from all N, without thresholds. off: everything.

    ``t_high`` is infinite by default: with binary rewards the rarer outcome of a group has the larger ``a``, so a
    finite one removes just those; ``dropped_minority`` counts them, given ``outcomes`` and groups, so that the caller
    can warn. What is kept is a biased sample: aggregate the loss over the kept sequences. The draw needs ``generator``,
    on the device of ``advantages``. Raises ValueError for a value outside its range.
    """
    _check_pad(advantages, mode, rho, t_low, tau, generator)
    size = advantages.detach().abs().double()
    low, high = RELEASED_THRESHOLDS if mode == "released" else (t_low, t_high)
    too_low, too_high = (size <= low, size >= high) if mode == "released" else (size < low, size > high)
    if mode in ("sample", "off"):
        too_low, too_high = torch.zeros_like(too_low), torch.zeros_like(too_high)
    effective = (~(too_low | too_high)).nonzero()[:, 0]
    n_total, n_effective = len(size), len(effective)
    if mode == "released":
        chosen = _draw_released(size, effective, generator)
    elif mode in ("paper", "sample"):
        count = min(pad_count(rho, n_total), n_effective)
        chosen = effective[_gumbel_top_k(size[effective] / tau, count, generator)]
    else:
        chosen = effective
    minority = None
    if outcomes is not None:
        minority = int((too_high & _is_minority(outcomes, n_total, group_ids, group_sizes)).sum())
    return PadResult(chosen.sort().values, n_total, n_effective, int(too_low.sum()), int(too_high.sum()), minority)


def pad_count(rho: float, n_total: int) -> int:
    """``ceil(rho N)``: 7 for 0.07 of 100, although 0.07 * 100 is 7.000000000000001."""
    return math.ceil(rho * n_total - 1e-9)


def _check_pad(
    advantages: Tensor, mode: str, rho: float, t_low: float, tau: float, generator: torch.Generator | None
) -> None:
    check_pad_settings(mode, rho, t_low, tau)
    if advantages.ndim != 1 or not bool(advantages.isfinite().all()):
        raise ValueError(f"advantages must be [N] and finite; got {list(advantages.shape)}")
    if generator is None and mode in ("paper", "released", "sample"):
        raise ValueError(f"mode={mode!r} draws: pass generator=torch.Generator(device).manual_seed(...)")


def check_pad_settings(mode: str, rho: float, t_low: float, tau: float) -> None:
    """Raises ValueError for a PAD setting outside its range."""
    if mode not in PAD_MODES:
        raise ValueError(f"mode={mode!r} is unknown; it is one of {', '.join(PAD_MODES)}")
    if not 0 < rho <= 1:
        raise ValueError(f"rho is the share of the batch to keep, in (0, 1]; got {rho!r}")
    if not t_low > 0:
        raise ValueError(f"t_low must be > 0, or groups with equal rewards pass; got {t_low!r}")
    if not tau > 0:
        raise ValueError(f"tau must be > 0; got {tau!r}")


def _gumbel_top_k(logits: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` of ``[n]`` without replacement, P = softmax(logits); in log space, so that no normaliser is ever 0."""
    exponential = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - exponential.log()).topk(count).indices


def _draw_released(size: Tensor, effective: Tensor, generator: torch.Generator | None) -> Tensor:
    if len(effective) == 0:
        return torch.arange(len(size), device=size.device)
    weight = size[effective] ** RELEASED_POWER
    draws = math.floor(RELEASED_DRAWS * len(size))
    return effective[torch.multinomial(weight, draws, replacement=True, generator=generator)]


def _is_minority(
    outcomes: Tensor, n_total: int, group_ids: Tensor | None, group_sizes: Tensor | Sequence[int] | None
) -> Tensor:
    """``[N]`` bool: the outcome is strictly rarer than the most frequent one of the same group."""
    values, ids, n_groups = _grouped("outcomes", outcomes, group_ids, group_sizes)
    if len(values) != n_total:
        raise ValueError(f"outcomes must be [{n_total}], one per advantage; got {list(outcomes.shape)}")
    pairs = torch.stack([ids.double(), values], dim=1)
    _, pair, counts = pairs.unique(dim=0, return_inverse=True, return_counts=True)
    count = counts[pair].double()
    most = count.new_zeros(n_groups).scatter_reduce(0, ids, count, "amax")
    return count < most[ids]


def _grouped(
    name: str, values: Tensor, group_ids: Tensor | None, group_sizes: Tensor | Sequence[int] | None
) -> tuple[Tensor, Tensor, int]:
    """Values ``[N]`` in fp64, dense group ids ``[N]`` and the number of groups."""
    if (values.ndim == 2) + (group_ids is not None) + (group_sizes is not None) != 1 or values.ndim not in (1, 2):
        raise ValueError(f"give {name} as [B, G], or as [N] with exactly one of group_ids, group_sizes")
    flat = values.detach().reshape(-1).double()
    if not bool(flat.isfinite().all()):
        raise ValueError(f"{name} must be finite: a reward function returned nan or infinity")
    if group_ids is not None:
        if group_ids.shape != flat.shape:
            raise ValueError(f"group_ids must be [{len(flat)}] as {name}; got {list(group_ids.shape)}")
        groups, ids = group_ids.unique(return_inverse=True)
        return flat, ids, len(groups)
    if group_sizes is None:
        group_sizes = [values.shape[1]] * values.shape[0]
    sizes = torch.as_tensor(group_sizes, dtype=torch.int64, device=flat.device)
    if int(sizes.sum()) != len(flat) or bool((sizes < 1).any()):
        raise ValueError(f"group_sizes must be positive and sum to {len(flat)}; got {sizes.tolist()}")
    return flat, torch.repeat_interleave(torch.arange(len(sizes), device=flat.device), sizes), len(sizes)


def _sums(values: Tensor, ids: Tensor, n_groups: int) -> Tensor:
    return values.new_zeros(n_groups).index_add(0, ids, values)


def _all_equal(values: Tensor, ids: Tensor, n_groups: int) -> Tensor:
    """``[B]`` bool."""
    top = values.new_full((n_groups,), -math.inf).scatter_reduce(0, ids, values, "amax")
    bottom = values.new_full((n_groups,), math.inf).scatter_reduce(0, ids, values, "amin")
    return top == bottom
