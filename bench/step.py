"""A training step: packing against padding, at some shapes and over the prompt's share of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.checks import Outputs
from bench.harness import Call, Case, Problem, Variant
from bench.machine import copy_ceiling, gemm_ceiling
from bench.peers import why_not
from bench.step_inputs import HUGE, LARGE, MODELS, SMALL, Step, StepInputs, build, make_step, step_errors
from bench.step_ours import PackedStep, checkpointed, with_liger
from bench.step_peers import PADDED, reference, transformers_padded, trl_trainer
from revisual_fast.packing import CostModel, Group, Layout
from revisual_fast.policy.attention import available_backends, pick_attention
from revisual_fast.policy.families.shapes import model_shape

OURS = "revisual-fast"
GEMM_ROWS = {"cpu": 2048, "cuda": 8192}

_IMAGE, _LARGE_IMAGE = (1, 28, 28), (1, 70, 68)
_SHORT: dict[str, Any] = {"checkpointing": True, "detail": True}
_LONG: dict[str, Any] = {"checkpointing": True, "padded_rows": 4, "tf32": True}
STEPS = {
    step.label: step
    for step in (
        Step(250, 96, 8, _IMAGE, detail=True),
        Step(250, 512, 8, _IMAGE),
        Step(64, 512, 8),
        Step(250, 96, 8, _IMAGE, shortest=48),
        Step(1450, 500, 8, _LARGE_IMAGE, model=HUGE, **_SHORT),
        Step(1450, 500, 8, _LARGE_IMAGE, model=LARGE, **_SHORT),
        Step(1450, 3500, 8, _LARGE_IMAGE, model=HUGE, **_LONG),
        Step(1450, 3500, 8, _LARGE_IMAGE, model=LARGE, **_LONG),
        Step(250, 4500, 8, model=HUGE, **_LONG),
        Step(250, 4500, 8, model=LARGE, **_LONG),
    )
}
FEW = 2  # completions of a long step, the prompt with them, fit without checkpointing
LONG = {step.label for step in STEPS.values() if step.padded_rows}
SHARE = "prompt + response = 128, G = 8, text"
SHARES = [Step(prompt, 128 - prompt, 8) for prompt in (8, 16, 32, 48, 64, 80, 96, 112)]


def suite(name: str) -> list[Case]:
    """The most important first; on the CPU bf16 only where it is quick."""
    if name == "gpu":
        return [step.case("bfloat16", "cuda") for step in STEPS.values() if step.model in (LARGE, HUGE)]
    small = [step for step in STEPS.values() if step.model == SMALL]
    return [*(step.case("float32", "cpu") for step in small), small[0].case("bfloat16", "cpu")]


def share_suite(name: str) -> list[Case]:
    """One case, on the CPU."""
    if name == "gpu":
        return []
    text = MODELS[SMALL]().text_config
    return [Case("grpo_step_share", 128, text.hidden_size, text.vocab_size, "float32", "cpu", SHARE)]


def grpo_step(case: Case) -> Problem:
    """One step of ``case.label``."""
    step = STEPS[case.label]
    x = make_step(step, build(MODELS[step.model](), case.torch_dtype, case.device, step.checkpointing))
    cost = CostModel(shape=model_shape(x.model.config))
    peers = transformers_padded(case, x)
    if step.shortest is None:  # one more call of many seconds; where lengths differ, for information, without
        peers.append(trl_trainer(case, x))
    peers = [replace(peer, flops=padded_flops(cost, x.group)) for peer in peers]
    return step_problem(case, x.model, [*_ours(case, x, cost), *peers], lambda: reference(case, x), cost.flops(x.group))


def grpo_step_share(case: Case) -> Problem:
    """Many steps: for each share of the prompt, packed and padded. All of them in the same rounds."""
    model = build(MODELS[SMALL](), case.torch_dtype, case.device)
    cost = CostModel(shape=model_shape(model.config))
    points = {f"{step.prompt}/{step.response}": make_step(step, model) for step in SHARES}
    variants = []
    for point, x in points.items():
        padded = replace(transformers_padded(case, x)[0], flops=padded_flops(cost, x.group))
        variants += [_at(point, x, variant) for variant in (_packed(case, x, cost), padded)]

    def answer() -> Outputs:
        return {f"{point}:{name}": value for point, x in points.items() for name, value in reference(case, x).items()}

    needed = min(cost.flops(x.group) for x in points.values())
    return replace(step_problem(case, model, variants, answer, needed), errors=share_errors)


def share_errors(outputs: Outputs, answer: Outputs) -> dict[str, float]:
    """``step_errors`` of the point that the outputs are for."""
    point = next(iter(outputs)).partition(":")[0]
    own = (
        {name.partition(":")[2]: x for name, x in of.items() if name.startswith(f"{point}:")}
        for of in (outputs, answer)
    )
    return step_errors(*own)


def _at(point: str, x: StepInputs, variant: Variant) -> Variant:
    """The variant under the point's name, with what the picture needs."""

    def setup() -> Call:
        assert variant.setup is not None
        run = variant.setup().run
        return Call(lambda: {f"{point}:{name}": value for name, value in run().items()})

    return replace(
        variant,
        name=f"{variant.name}, {point}",
        yardstick=f"{PADDED}, {point}",
        setup=setup,
        extra=lambda outputs, answer: {"prompt": float(x.step.prompt), "response": float(x.step.response)},
    )


def padded_flops(cost: CostModel, group: Group) -> int:
    """Without packing: each completion, padded to the longest, with a prompt and an image of its own."""
    longest = max(group.completions, key=len)
    return len(group.completions) * cost.flops(Group(group.prompt, [longest]))


def _ours(case: Case, x: StepInputs, cost: CostModel) -> Iterator[Variant]:
    """The default; of a long step also few completions at a time, which need no checkpointing; of a step to be looked
    at in detail the same in one pass, other layouts, and the other attention backends that run here."""
    yield _packed(case, x, cost)
    size, no_liger = None if x.step.detail else FEW, why_not(case, "liger_kernel", cuda=True)
    if x.step.checkpointing and (x.step.detail or no_liger):  # beside another model a long one would not fit
        yield _packed(case, x, cost, checkpointing=False, size=size)
    if case.device == "cuda":
        yield _packed(case, x, cost, checkpointing=False, size=size, liger=no_liger)
    if not x.step.detail:
        return
    layouts: tuple[Layout, ...] = ("varlen", "padded")
    for layout in layouts:
        yield _packed(case, x, cost, layout)
    for backend, state in available_backends().items():
        if case.device == "cuda" and state == "yes":
            yield _packed(case, x, cost, attention=backend)


def _packed(
    case: Case,
    x: StepInputs,
    cost: CostModel,
    layout: Layout = "shared",
    attention: str = "auto",
    checkpointing: bool | None = None,
    size: int | None = None,
    liger: str | None = None,
) -> Variant:
    """Packing is part of the call. ``checkpointing``: as in the step, unless said; ``size``: completions at a time;
    ``liger``: liger-kernel's layers, or why they cannot be had."""
    name = OURS if layout == "shared" else f"{OURS}, {layout} layout"
    name = name if attention == "auto" else f"{name}, {attention} attention"
    name = name if checkpointing is None else f"{name}, {'with' if checkpointing else 'no'} checkpointing"
    name = name if size is None else f"{name}, {size} completions at a time"
    name = name if liger is None else f"{name}, Liger's layers"
    pieces = [replace(x.group, completions=x.group.completions[members]) for members in x.parts(size or x.step.group)]

    def setup() -> Call:
        own = x if liger is None else with_liger(x)
        packed = PackedStep(own, layout, attention, size)

        def run() -> Outputs:
            with checkpointed(own, checkpointing):
                return packed.gradients()

        return Call(run)

    def split(outputs: Outputs, answer: Outputs) -> dict[str, Any]:
        with checkpointed(x, checkpointing):
            return {} if size or liger is not None else {"phases_s": PackedStep(x, layout, attention).phases()}

    chosen = pick_attention(attention, torch.device(case.device), case.torch_dtype)[0]
    note = f"{layout} layout, {chosen} attention"
    flops = sum(cost.flops(piece, layout) for piece in pieces)
    start = None if liger else setup
    return Variant(name, "ours", start, liger or "", note, yardstick=PADDED, flops=flops, extra=split)


def step_problem(
    case: Case, model: Any, variants: Sequence[Variant], answer: Callable[[], Outputs], flops: int
) -> Problem:
    """The fewest bytes: parameters in, gradients out. The ceiling's product is that of an MLP."""
    text, parameters = model.config.text_config, sum(p.numel() for p in model.parameters())
    sizes = (GEMM_ROWS[case.device], text.hidden_size, text.intermediate_size)
    ceilings = {
        "copy": copy_ceiling(case.device),
        "gemm": gemm_ceiling(*sizes, case.torch_dtype, case.device),
    }
    n_bytes = 2 * parameters * case.torch_dtype.itemsize
    return Problem(case, variants, answer, flops, n_bytes, ceilings, errors=step_errors, long_calls=True)
