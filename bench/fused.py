"""The fused ops: losses and log-probs from hidden states, and from logits that exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench import counts, peers
from bench.checks import Outputs
from bench.harness import Case, Problem, Variant
from bench.inputs import (
    KEPT,
    OBJECTIVE,
    SEQUENCE_OBJECTIVE,
    Inputs,
    LossOf,
    clip_loss,
    cross_entropy,
    distinct_kept,
    make_inputs,
    reference,
    sequence_clip_loss,
    statistics_reference,
    weighted_sum,
)
from bench.machine import ceilings
from bench.ours import (
    linear_loss,
    linear_values,
    logits_dtypes,
    loss_from_logits,
    ours,
    ratio_error,
    replay_loss,
    statistics_of_logits,
)
from bench.plain import plain, plain_statistics
from revisual_fast import PolicyObjective

FROM_LOGITS = "policy_loss_from_logits"
PLACES: dict[str, dict[str, Any]] = {"": {"inplace": False}, ", in place": {"inplace": True}}
OTHERWISE: dict[str, dict[str, Any]] = {
    ", one block": {"inplace": False, "blocks": 1},
    ", read twice": {"inplace": False, "blocks": 0},
}


def linear_policy_loss(case: Case) -> Problem:
    """Forward and backward of the clip objective from hidden states."""
    x = make_inputs(case)
    loss_of = clip_loss(x)
    variants = [
        *ours(case, "linear_policy_loss", linear_loss(x, OBJECTIVE), logits_dtypes(case), ratio_error(x)),
        *plain(case, x, loss_of),
        *peers.trl_chunked(case, x, loss_of),
        *peers.liger_linear_grpo(case, x),
        *peers.liger_scaled_ce(case, x, loss_of),
        *peers.cut_cross_entropy(case, x, loss_of),
    ]
    return _head_problem(case, variants, lambda: reference(x, loss_of))


def linear_logprob(case: Case) -> Problem:
    """Log-prob and entropy, and the backward pass of the log-prob."""
    x = make_inputs(case)
    loss_of = weighted_sum(x)
    variants = [
        *ours(case, "linear_logprob", linear_values(x, loss_of), logits_dtypes(case)),
        *plain(case, x, loss_of),
        *peers.trl_chunked(case, x, loss_of),
        *peers.liger_scaled_ce(case, x, loss_of),
        *peers.cut_cross_entropy(case, x, loss_of),
    ]
    return _head_problem(case, variants, lambda: reference(x, loss_of))


def linear_cross_entropy(case: Case) -> Problem:
    """``linear_policy_loss`` with the objective "sft", against the peers that know only cross-entropy."""
    x = make_inputs(case)
    loss_of = cross_entropy(x)
    make = linear_loss(x, PolicyObjective.preset("sft"))
    variants = [
        *ours(case, "linear_policy_loss", make, logits_dtypes(case)),
        *plain(case, x, loss_of),
        *peers.liger_linear_ce(case, x),
        *peers.liger_scaled_ce(case, x, loss_of),
        *peers.cut_cross_entropy(case, x, loss_of),
        peers.quack_linear_ce(case, x),
    ]
    return _head_problem(case, variants, lambda: reference(x, loss_of))


def policy_loss_from_logits(case: Case) -> Problem:
    """Forward and backward of the clip objective from logits; the cuda backend also without its one read of a row."""
    x = make_inputs(case)
    make = loss_from_logits(x, OBJECTIVE, x.tokens)
    mine = [*ours(case, FROM_LOGITS, make, PLACES), *ours(case, FROM_LOGITS, make, OTHERWISE, backends=("cuda",))]
    return _logits_problem(case, x, mine, clip_loss(x), peers.liger_triton_grpo(case, x))


def policy_loss_from_logits_gspo(case: Case) -> Problem:
    """The same with GSPO's ratio of whole sequences. The floor stays that of the token level, 4 bytes a bf16 logit,
    though a gradient that waits for a whole sequence has to read its logits again."""
    x = make_inputs(case)
    mine = ours(case, FROM_LOGITS, loss_from_logits(x, SEQUENCE_OBJECTIVE, x.sequences), PLACES)
    return _logits_problem(case, x, mine, sequence_clip_loss(x), peers.liger_triton_grpo(case, x, "sequence"))


def logits_statistics(case: Case) -> Problem:
    """Log-probs and entropies of logits that need no gradient: what old and reference policies are asked for."""
    x = make_inputs(case)
    variants = [
        *ours(case, FROM_LOGITS, statistics_of_logits(x), {"": {}}),
        *plain_statistics(case, x),
        *peers.logits_statistics(case, x),
    ]
    n_bytes = counts.statistics_bytes(case.n, case.v, case.torch_dtype.itemsize)
    return Problem(case, variants, lambda: statistics_reference(x), 0, n_bytes, ceilings(case))


def sampling_mask_replay(case: Case) -> Problem:
    """The clip objective of log-probs renormalised over the ids that sampling kept; plain torch masks full logits."""
    x = make_inputs(case)
    loss_of = clip_loss(x)
    mine = ours(case, "linear_policy_loss", replay_loss(x), {"": {}})
    variants = [*mine, *plain(case, x, loss_of, entropy=False)]
    flops = counts.replay_flops(case.n, case.d, KEPT)
    n_bytes = counts.replay_bytes(case.n, case.d, case.v, KEPT, distinct_kept(x), case.torch_dtype.itemsize)
    return Problem(case, variants, lambda: reference(x, loss_of), flops, n_bytes, ceilings(case))


def _head_problem(case: Case, variants: Sequence[Variant], answer: Callable[[], Outputs]) -> Problem:
    flops = counts.head_flops(case.n, case.d, case.v)
    n_bytes = counts.head_bytes(case.n, case.d, case.v, case.torch_dtype.itemsize)
    return Problem(case, variants, answer, flops, n_bytes, ceilings(case))


def _logits_problem(case: Case, x: Inputs, mine: Sequence[Variant], loss_of: LossOf, liger: Variant) -> Problem:
    variants = [*mine, *plain(case, x, loss_of), liger]
    n_bytes = counts.logits_bytes(case.n, case.v, case.torch_dtype.itemsize)
    return Problem(case, variants, lambda: reference(x, loss_of), 0, n_bytes, ceilings(case))
