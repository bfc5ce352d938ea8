"""liger-kernel's RMSNorm, SwiGLU and RoPE on a CUDA device: they change the loss by less than bf16 does."""

import importlib.util

import pytest
import torch

from revisual_fast.config import ModelConfig
from revisual_fast.policy.load import load_policy
from tests.groups import make_groups, packed_logp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel"),
]
SHAPES = [(7, [(1, 4, 4)], [40, 90, 10]), (50, [], [60, 33]), (9, [(1, 8, 4)], [70] * 8)]


def loss_and_gradients(path, dtype, liger):
    policy = load_policy(path, ModelConfig(path=str(path), dtype=dtype, device="cuda", liger_kernels=liger))
    loss = packed_logp(policy, make_groups(policy.family, SHAPES)).mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().double() for p in policy.model.parameters() if p.grad is not None])


def test_loss_and_gradients_change_by_less_than_bf16_noise(tiny_vl):
    loss, gradient = loss_and_gradients(tiny_vl, "float32", False)
    rounded_loss, rounded = loss_and_gradients(tiny_vl, "bfloat16", False)
    loss_noise, noise = abs(rounded_loss - loss), (rounded - gradient).norm()
    liger_loss, liger = loss_and_gradients(tiny_vl, "float32", True)
    assert abs(liger_loss - loss) < loss_noise / 10
    assert (liger - gradient).norm() < noise / 10
    liger_loss, liger = loss_and_gradients(tiny_vl, "bfloat16", True)
    assert abs(liger_loss - rounded_loss) < max(loss_noise, 1e-3)  # the noise of one sample may happen to be 0
    assert (liger - gradient).norm() < 2 * noise


def test_auto_puts_them_in_on_cuda_only(tiny_vl):
    for device, expected in (("cuda", True), ("cpu", False)):
        policy = load_policy(tiny_vl, ModelConfig(path=str(tiny_vl), device=device))
        assert any("forward" in vars(module) for module in policy.model.modules()) == expected
