"""Every op that is benchmarked, the most important first, and the cases of the suites."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench import attention, fused, grouped, packing, rollout, step, step_trl
from bench.harness import Case, Problem
from bench.inputs import KEPT, SEQUENCES
from bench.shapes import SHAPES

OPS: dict[str, Callable[[Case], Problem]] = {
    "policy_loss_from_logits": fused.policy_loss_from_logits,
    "policy_loss_from_logits_gspo": fused.policy_loss_from_logits_gspo,
    "logits_statistics": fused.logits_statistics,
    "linear_policy_loss": fused.linear_policy_loss,
    "grpo_step": step.grpo_step,
    "trl_step": step_trl.trl_step,
    "grpo_step_share": step.grpo_step_share,
    "shared_attention": attention.shared_attention,
    "gather_kv": packing.kv_gather,
    "pack_embeddings": packing.pack_embeddings,
    "mrope": packing.mrope,
    "gather_rows": packing.gather_rows,
    "linear_logprob": fused.linear_logprob,
    "sampling_mask_replay": fused.sampling_mask_replay,
    "group_advantages": grouped.advantages,
    "pad_selection": grouped.pad_selection,
    "linear_cross_entropy": fused.linear_cross_entropy,
    "rollout": rollout.rollout,
    "weight_sync": rollout.weight_sync,
}
ALONE = {"rollout", "weight_sync", "trl_step"}  # only where they are named: vLLM and TRL have environments of their own
HEADLESS = {  # have no D
    *("policy_loss_from_logits", "policy_loss_from_logits_gspo", "logits_statistics"),
    *("group_advantages", "pad_selection"),
}
WORDLESS = {"group_advantages", "pad_selection", "gather_rows", "gather_kv", "mrope", "shared_attention"}  # have no V
SHORT = {*WORDLESS, "pack_embeddings"}  # take seconds
UNGROUPED = SHORT - {"group_advantages"}  # take any N
FP32_ONLY = {"group_advantages", "pad_selection"}
LABELLED: dict[str, Callable[[str], list[Case]]] = {  # have shapes of their own: suite -> cases
    "grpo_step": step.suite,
    "trl_step": step_trl.suite,
    "grpo_step_share": step.share_suite,
    "rollout": rollout.suite,
    "weight_sync": rollout.sync_suite,
}
RESERVE = {"short": 8.0, "long": 20.0, "step": 60.0}  # seconds of a budget that are kept for a case to come
ROUNDS = {"cpu": 5, "gpu": 20}
STEP_ROUNDS = 3  # of calls that take seconds

DTYPES = {"cpu": ["float32", "bfloat16"], "gpu": ["bfloat16"]}


def cases(
    suite: str,
    ops: Sequence[str] = (),
    shape: tuple[int, int, int] | None = None,
    dtypes: Sequence[str] = (),
    title: str = "",
) -> list[Case]:
    """The suite's cases, for the named ops (default all), one shape and some dtypes instead of its own; of the training
    steps, whose shapes are their own, none where a shape is given. ``title``: those whose title has it in it.

    The second shape of an op comes after all the first ones, and a GPU's long training steps last. Raises ValueError
    for a shape that an op cannot take, or if no case is left.
    """
    device = "cpu" if suite == "cpu" else "cuda"
    found = []
    for op in ops or (op for op in OPS if op not in ALONE):
        if op in LABELLED:
            labelled = [] if shape else LABELLED[op](suite)
            found += [(2 * (case.label in step.LONG), case) for case in labelled if not dtypes or case.dtype in dtypes]
            continue
        for rank, (n, d, v) in enumerate([shape] if shape else SHAPES[suite][op]):
            sizes = (n, 0 if op in HEADLESS else d, 0 if op in WORDLESS else v)
            allowed = ["float32"] if op in FP32_ONLY else dtypes or DTYPES[suite]
            found += [(rank, Case(op, *sizes, dtype, device)) for dtype in allowed]
    out = [case for _, case in sorted(found, key=lambda pair: pair[0]) if title in case.title]
    if not out:
        own = "; its shapes are its own: leave --shape out" if set(ops) & set(LABELLED) else ""
        raise ValueError(f"no such case of {', '.join(ops) or 'any op'} in the {suite} suite; give --shape N,D,V{own}")
    for case in out:
        check(case)
    return out


def check(case: Case) -> None:
    """Raises ValueError for a shape that the op cannot take."""
    if case.op not in UNGROUPED | set(LABELLED) and case.n % SEQUENCES:
        raise ValueError(f"{case.op} takes {SEQUENCES} completions of equal length: N = {case.n} is no multiple of it")
    if case.op == "sampling_mask_replay" and case.v < 2 * KEPT:
        raise ValueError(f"{case.op} keeps {KEPT} ids a row of a vocabulary of at least {2 * KEPT}; got V = {case.v}")
    if case.op == "mrope" and case.d % 2:
        raise ValueError(f"{case.op} turns pairs of elements: D must be even; got {case.d}")


def reserve(cases: Sequence[Case]) -> float:
    """Seconds of a budget that are kept for these cases."""
    return sum(RESERVE["step" if case.op in LABELLED else "short" if case.op in SHORT else "long"] for case in cases)


def within(cases: Sequence[Case], seconds: float) -> Sequence[Case]:
    """The first cases, as many as the time can be kept for; the others get what these leave."""
    count = len(cases)
    while count and reserve(cases[:count]) > seconds:
        count -= 1
    return cases[:count]


def rounds(suite: str, case: Case) -> int:
    """Timed calls of a variant."""
    return STEP_ROUNDS if case.op in LABELLED else ROUNDS[suite]
