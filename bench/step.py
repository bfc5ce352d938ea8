"""A training step: packing against padding, at some shapes and over the prompt's share of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.checks import Outputs
from bench.harness import Call, Case, Problem, Variant
from bench.inputs import OBJECTIVE
from bench.machine import copy_ceiling, gemm_ceiling
from bench.step_inputs import LARGE, MODELS, SMALL, Step, StepInputs, build, gradients, make_step, step_errors
from bench.step_peers import PADDED, reference, transformers_padded, trl_trainer
from revisual_fast import TokenBatch, linear_policy_loss
from revisual_fast.packing import CostModel, Group, Layout
from revisual_fast.policy.attention import available_backends, pick_attention
from revisual_fast.policy.families.shapes import model_shape
from revisual_fast.policy.model import Policy

OURS = "revisual-fast"
GEMM_ROWS = 2048

_IMAGE, _LARGE_IMAGE = (1, 28, 28), (1, 70, 68)
STEPS = {
    step.label: step
    for step in (
        Step(250, 96, 8, _IMAGE),
        Step(250, 512, 8, _IMAGE),
        Step(64, 512, 8),
        Step(250, 96, 8, _IMAGE, shortest=48),
        Step(1450, 500, 8, _LARGE_IMAGE, model=LARGE, checkpointing=True),
        Step(1450, 3500, 8, _LARGE_IMAGE, model=LARGE, checkpointing=True),
    )
}
ALL_LAYOUTS = {"250/96/8, image of 196 tokens", *(step.label for step in STEPS.values() if step.model == LARGE)}
"""The other cases have the shared layout alone: a call takes seconds."""
SHARE = "prompt + response = 128, G = 8, text"
SHARES = [Step(prompt, 128 - prompt, 8) for prompt in (8, 16, 32, 48, 64, 80, 96, 112)]


def suite(name: str) -> list[Case]:
    """The most important first; on the CPU bf16 only where it is quick."""
    if name == "gpu":
        return [step.case("bfloat16", "cuda") for step in STEPS.values() if step.model == LARGE]
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
    """The default, then other layouts, then the other attention backends that run here."""
    yield _packed(case, x, cost)
    layouts: tuple[Layout, ...] = ("varlen", "padded")
    for layout in layouts if case.label in ALL_LAYOUTS else ():
        yield _packed(case, x, cost, layout)
    for backend, state in available_backends().items():
        if case.device == "cuda" and state == "yes":
            yield _packed(case, x, cost, attention=backend)


def _packed(case: Case, x: StepInputs, cost: CostModel, layout: Layout = "shared", attention: str = "auto") -> Variant:
    """Packing is part of the call."""
    name = OURS if layout == "shared" else f"{OURS}, {layout} layout"
    name = name if attention == "auto" else f"{name}, {attention} attention"

    def setup() -> Call:
        policy = Policy(x.model, attention=attention)
        lengths = torch.tensor([len(c) for c in x.group.completions])

        def run() -> Outputs:
            batch = policy.pack([x.group], layout)
            advantages = x.advantages.repeat_interleave(lengths.to(x.device), output_size=len(batch.targets))
            tokens = TokenBatch(advantages, cu_seqlens=batch.cu_seqlens)
            out = linear_policy_loss(
                policy.hidden(batch), policy.head_weight, batch.targets, tokens, OBJECTIVE, bias=policy.head_bias
            )
            return gradients(x.model, out.loss)

        return Call(run)

    chosen = pick_attention(attention, torch.device(case.device), case.torch_dtype)[0]
    note = f"{layout} layout, {chosen} attention"
    return Variant(name, "ours", setup, note=note, yardstick=PADDED, flops=cost.flops(x.group, layout))


def step_problem(
    case: Case, model: Any, variants: Sequence[Variant], answer: Callable[[], Outputs], flops: int
) -> Problem:
    """The fewest bytes: parameters in, gradients out. The ceiling's product is that of an MLP."""
    text, parameters = model.config.text_config, sum(p.numel() for p in model.parameters())
    sizes = (GEMM_ROWS, text.hidden_size, text.intermediate_size)
    ceilings = {
        "copy": copy_ceiling(case.device),
        "gemm": gemm_ceiling(*sizes, case.torch_dtype, case.device),
    }
    n_bytes = 2 * parameters * case.torch_dtype.itemsize
    return Problem(case, variants, answer, flops, n_bytes, ceilings, errors=step_errors, long_calls=True)
