"""Our variants of an op and the plain torch that bounds their errors, without peers and what compiles for long: what
the search for launches and the counters start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from bench import counts
from bench.checks import Outputs
from bench.fused import FROM_LOGITS, OTHERWISE, PLACES
from bench.harness import Case, Problem, Variant
from bench.inputs import OBJECTIVE, Inputs, clip_loss, make_inputs, reference, statistics_reference
from bench.machine import ceilings
from bench.ours import linear_loss, logits_dtypes, loss_from_logits, ours, statistics_of_logits
from bench.plain import WIDE, plain, plain_statistics

YARDSTICKS = ("eager", WIDE)


def linear_policy_loss(case: Case) -> Problem:
    """As in ``bench.fused``, the clip objective from hidden states."""
    x = make_inputs(case)
    mine = ours(case, "linear_policy_loss", linear_loss(x, OBJECTIVE), logits_dtypes(case))
    flops = counts.head_flops(case.n, case.d, case.v)
    n_bytes = counts.head_bytes(case.n, case.d, case.v, case.torch_dtype.itemsize)
    return _problem(case, mine, plain(case, x, clip_loss(x)), _clip_reference(x), flops, n_bytes)


def policy_loss_from_logits(case: Case) -> Problem:
    """As in ``bench.fused``, with the settings of the cuda backend's blocks, but not in place."""
    x = make_inputs(case)
    make = loss_from_logits(x, OBJECTIVE, x.tokens)
    mine = ours(case, FROM_LOGITS, make, {"": PLACES[""]}) + ours(case, FROM_LOGITS, make, OTHERWISE, None, ["cuda"])
    n_bytes = counts.logits_bytes(case.n, case.v, case.torch_dtype.itemsize)
    return _problem(case, mine, plain(case, x, clip_loss(x)), _clip_reference(x), 0, n_bytes)


def logits_statistics(case: Case) -> Problem:
    """As in ``bench.fused``: log-probs and entropies, no gradient."""
    x = make_inputs(case)
    mine = ours(case, FROM_LOGITS, statistics_of_logits(x), {"": {}})
    n_bytes = counts.statistics_bytes(case.n, case.v, case.torch_dtype.itemsize)
    return _problem(case, mine, plain_statistics(case, x), lambda: statistics_reference(x), 0, n_bytes)


def named(problem: Problem, name: str) -> Variant:
    """The variant of that name. Raises KeyError, with those that there are."""
    found = {variant.name: variant for variant in problem.variants}
    if name not in found:
        raise KeyError(f"{problem.case.op} has no variant {name!r} here, only {', '.join(found)}")
    return found[name]


def _clip_reference(x: Inputs) -> Callable[[], Outputs]:
    return lambda: reference(x, clip_loss(x))


def _problem(
    case: Case,
    mine: Sequence[Variant],
    others: Sequence[Variant],
    answer: Callable[[], Outputs],
    flops: int,
    n_bytes: int,
) -> Problem:
    """The answer is kept: it is asked for once for each coordinate of a search."""
    variants = [*mine, *(variant for variant in others if variant.name in YARDSTICKS)]
    return Problem(case, variants, cache(answer), flops, n_bytes, ceilings(case))
