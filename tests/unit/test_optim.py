"""The optimizer: schedules, learning rates per tower, master weights, and a state that continues exactly."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from revisual_fast.config import OptimizerConfig
from revisual_fast.optim import Optimizer, held_bytes, lr_factor
from revisual_fast.stages.stage import Stage


def small(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape).to(dtype))
        for name, shape in {"visual.w": (4, 4), "text.w": (4, 4), "text.norm": (4,)}.items()
    }


def optimizer_for(parameters: dict[str, nn.Parameter], **settings) -> Optimizer:
    return Optimizer(parameters.items(), OptimizerConfig(**settings), lambda name: name.startswith("visual"))


def set_gradients(parameters: dict[str, nn.Parameter], seed: int) -> None:
    """By a backward pass, as a stage does."""
    generator = torch.Generator().manual_seed(seed)
    sum((p * torch.randn(p.shape, generator=generator).to(p.dtype)).sum() for p in parameters.values()).backward()


def test_the_schedule_warms_up_then_falls():
    cosine = OptimizerConfig(schedule="cosine", warmup=0.1, min_lr_ratio=0.2)
    assert [lr_factor(cosine, u, 100) for u in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert lr_factor(cosine, 10, 100) == 1.0
    assert lr_factor(cosine, 55, 100) == pytest.approx(0.6)
    assert lr_factor(cosine, 100, 100) == pytest.approx(0.2)
    assert lr_factor(OptimizerConfig(schedule="linear"), 25, 100) == 0.75
    assert lr_factor(OptimizerConfig(schedule="constant"), 99, 100) == 1.0


def test_the_vision_tower_has_its_own_learning_rate():
    parameters = small()
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = optimizer_for(parameters, lr=1e-3, vision_lr=1e-1, weight_decay=0.0)
    set_gradients(parameters, 1)
    optimizer.step(1.0)
    moved = {n: (p - before[n]).abs().max().item() for n, p in parameters.items()}
    assert moved["visual.w"] == pytest.approx(1e-1, rel=1e-3)  # AdamW's first step has the length of the learning rate
    assert moved["text.w"] == pytest.approx(1e-3, rel=1e-3)


def test_matrices_decay_and_vectors_do_not():
    parameters = small()
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = optimizer_for(parameters, lr=1e-2, weight_decay=0.5)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step(1.0)
    torch.testing.assert_close(parameters["text.w"].detach(), before["text.w"] * (1 - 1e-2 * 0.5))
    assert torch.equal(parameters["text.norm"], before["text.norm"])


def test_gradients_are_clipped_and_cleared_and_their_norm_returned():
    parameters = small()
    optimizer = optimizer_for(parameters, max_grad_norm=0.5)
    set_gradients(parameters, 1)
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in parameters.values()))
    seen = []
    optimizer.adamw.step = lambda: seen.append(math.sqrt(sum(p.grad.square().sum() for p in parameters.values())))
    assert optimizer.step(1.0) == pytest.approx(expected, rel=1e-5)
    assert seen == [pytest.approx(0.5, rel=1e-4)]
    assert all(p.grad is None for p in parameters.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    parameters = small()
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = optimizer_for(parameters)
    set_gradients(parameters, 1)
    parameters["text.w"].grad[0, 0] = bad
    assert not math.isfinite(optimizer.step(1.0))
    assert all(torch.equal(before[n], p) for n, p in parameters.items())
    assert not optimizer.state_tensors().keys() & {"exp_avg/text.w"}
    assert all(p.grad is None for p in parameters.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_continues_to_the_same_bits(dtype):
    straight = small(dtype)
    optimizer = optimizer_for(straight, lr=1e-3)
    for seed in range(3):
        set_gradients(straight, seed)
        optimizer.step(1.0)
    state = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    resumed = {n: nn.Parameter(p.detach().clone()) for n, p in straight.items()}
    other = optimizer_for(resumed, lr=1e-3)
    other.load_state_tensors(state)
    for seed in (3, 4):
        for parameters, opt in ((straight, optimizer), (resumed, other)):
            set_gradients(parameters, seed)
            opt.step(1.0)
    assert all(torch.equal(straight[n], resumed[n]) for n in straight)
    for key, value in optimizer.state_tensors().items():
        assert torch.equal(value, other.state_tensors()[key]), key


def test_updates_below_bf16s_resolution_add_up_in_the_master_weights():
    parameter = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = optimizer_for({"text.w": parameter}, lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        parameter.sum().backward()
        optimizer.step(1.0)
    assert parameter.dtype == torch.bfloat16
    torch.testing.assert_close(parameter.detach().float(), torch.full((8, 8), 0.99), atol=0.004, rtol=0)


def test_gradients_of_many_micro_batches_add_up_in_fp32():
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = optimizer_for({"text.w": parameter}, max_grad_norm=1e9)
    seen = []
    optimizer.adamw.step = lambda: seen.append(optimizer.masters["text.w"].grad.clone())
    small_step = torch.tensor(0.01).to(torch.bfloat16)
    for _ in range(512):
        (parameter * small_step).sum().backward()
    optimizer.step(1.0)
    torch.testing.assert_close(seen[0], torch.full((4, 4), 512 * float(small_step)), rtol=1e-5, atol=0)
    assert parameter.grad is None


def test_a_state_of_another_model_is_refused():
    optimizer = optimizer_for(small())
    with pytest.raises(ValueError, match=r"'other\.w' is not a trainable parameter"):
        optimizer.load_state_tensors({"exp_avg/other.w": torch.zeros(1)})


def test_nothing_to_train_is_an_error():
    frozen = {n: p.requires_grad_(False) for n, p in small().items()}
    with pytest.raises(ValueError, match="every parameter is frozen"):
        optimizer_for(frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_training_holds_is_counted(dtype):
    parameters = small(dtype)
    frozen = parameters.pop("visual.w").requires_grad_(False)
    optimizer = optimizer_for(parameters)
    set_gradients(parameters, 0)
    for parameter in parameters.values():  # as backward passes leave it: in fp32
        parameter.grad = None
        (parameter.float().sum() * 2).backward()
    there = [frozen, *parameters.values(), *(held.grad for held in optimizer.sums.values())]
    optimizer.step(1.0)
    masters = [m for n, m in optimizer.masters.items() if m is not parameters[n]]
    moments = [x for state in optimizer.adamw.state.values() for x in (state["exp_avg"], state["exp_avg_sq"])]
    expected = sum(x.numel() * x.itemsize for x in (*there, *masters, *moments))
    assert held_bytes([frozen, *parameters.values()]) == expected
    assert held_bytes([frozen], ranks=8) == frozen.numel() * frozen.itemsize
    assert held_bytes(parameters.values(), 2) < held_bytes(parameters.values())


def test_a_device_that_cannot_hold_it_is_told_before_the_first_step(monkeypatch):
    memory = SimpleNamespace(total_memory=320)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    model = nn.Linear(5, 4, bias=False)  # 20 weights of 4 + 4 + 8 bytes
    policy = SimpleNamespace(model=model, device=torch.device("cuda:0"))
    stage = SimpleNamespace(policy=policy, context=SimpleNamespace(name="rl"))
    with pytest.raises(ValueError, match=r"stages\.rl: .* take 320 B, and cuda:0 has 320 B: use several GPUs"):
        Stage._held(stage)
    memory.total_memory = 321
    assert Stage._held(stage) == 320
