"""A training step inside TRL: its stock trainer, with the fused head alone, and with everything packed and fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from bench.checks import Outputs
from bench.harness import Call, Case, Problem, Variant
from bench.peers import why_not
from bench.report_step import TRL_FAST, TRL_HEAD, TRL_STEP
from bench.step import STEPS, padded_flops, step_problem
from bench.step_inputs import LARGE, MODELS, StepInputs, as_transformers, build, gradients, make_step
from bench.step_peers import TRL, make_trainer, reference, trl_inputs
from revisual_fast.packing import CostModel
from revisual_fast.policy.families.shapes import model_shape

LABEL = "250/96/8, image of 196 tokens"


def suite(name: str) -> list[Case]:
    """The training part of TRL's step. On a GPU of the 3B: every variant has a model of its own, beside a reference."""
    if name == "gpu":
        cases = [step.case("bfloat16", "cuda") for step in STEPS.values() if step.model == LARGE and step.grid]
    else:
        cases = [STEPS[LABEL].case(dtype, "cpu") for dtype in ("float32", "bfloat16")]
    return [replace(case, op=TRL_STEP) for case in cases]


def trl_step(case: Case) -> Problem:
    """One step of ``case.label``; every variant has a model of its own, of the same weights."""
    step = STEPS[case.label]
    x = make_step(step, build(MODELS[step.model](), case.torch_dtype, case.device, step.checkpointing))
    cost = CostModel(shape=model_shape(x.model.config))
    padded = padded_flops(cost, x.group)
    reason = why_not(case, "trl")

    def variant(name: str, role: str, call: Callable[[StepInputs], Call], flops: int) -> Variant:
        def setup() -> Call:
            model = build(x.model.config, case.torch_dtype, case.device, step.checkpointing)
            model.load_state_dict(x.model.state_dict())
            return call(replace(x, model=model))

        return Variant(name, role, None if reason else setup, reason, yardstick=TRL, flops=flops)

    variants = [
        variant(TRL, "plain", _stock, padded),
        variant(TRL_HEAD, "ours", _patched, padded),
        variant(TRL_FAST, "ours", _fast, cost.flops(x.group)),
    ]
    return step_problem(case, x.model, variants, lambda: reference(case, x), cost.flops(x.group))


def _step_of(x: StepInputs, trainer: Any) -> Outputs:
    with as_transformers(x.model) as model:
        return gradients(model, trainer.compute_loss(model, trl_inputs(x)))


def _stock(x: StepInputs) -> Call:
    trainer = make_trainer(x)
    return Call(lambda: _step_of(x, trainer))


def _patched(x: StepInputs) -> Call:
    trainer = make_trainer(x)

    def run() -> Outputs:
        with _fused_head():
            return _step_of(x, trainer)

    return Call(run)


def _fast(x: StepInputs) -> Call:
    from revisual_fast.integrations.trl import FastGRPOTrainer

    trainer = make_trainer(x, FastGRPOTrainer)
    assert trainer._fast_problem is None, trainer._fast_problem
    return Call(lambda: _step_of(x, trainer))


@contextmanager
def _fused_head() -> Iterator[None]:
    """``patch_trl()`` for one call; ``unpatch()`` would give the other variant's model back, too."""
    import trl.trainer.utils

    from revisual_fast.integrations.trl.kernel import FusedLogProb

    utils: Any = trl.trainer.utils
    before = utils._ChunkedLogProbFunction
    utils._ChunkedLogProbFunction = FusedLogProb
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction = before
