"""Packed rows against transformers' padded forward at the real sizes of Qwen2.5-VL 3B and 7B, the depth cut to two.

One model runs both ways, and a gradient is compared the moment it is there and then dropped: of the 7B's 1.6 billion
parameters there are at most the weights, one set of gradients and one gradient more.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from revisual_fast.policy.model import Policy
from tests.groups import make_groups, packed_logp
from tests.models import build, cut_config, loss_of, padded_logp

TOLERANCE = 1e-5
GIB = {"3B": 8, "7B": 15}
SHAPES = [(9, [(1, 12, 20)], [9, 5])]  # 240 patches: windows of 64, 32 and 16


def available_gib() -> float:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / 2**20


def backward(policy: Policy, loss: Tensor, use: Callable[[str, Tensor], None]) -> None:
    """Every parameter's gradient goes to ``use`` as soon as it is whole, and is then dropped."""

    def hook(name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            use(name, parameter.grad)
            parameter.grad = None

        return take

    handles = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in policy.model.named_parameters()]
    loss.backward()
    for handle in handles:
        handle.remove()


def norm(gradient: Tensor) -> float:
    """Without losing the small among half a billion numbers."""
    return gradient.flatten(1).norm(dim=1).double().norm().item() if gradient.ndim > 1 else gradient.norm().item()


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="cannot tell how much memory is free")
@pytest.mark.parametrize("size", ["3B", "7B"])
def test_loss_and_every_gradient_at_real_sizes(size):
    if available_gib() < GIB[size]:
        pytest.skip(f"needs {GIB[size]} GiB of free memory, there are {available_gib():.1f}")
    policy = Policy(build(cut_config(size), 0.02))
    groups = make_groups(policy.family, SHAPES)
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    differences: dict[str, float] = {}

    def used_rows(gradient: Tensor) -> Tensor:  # an embedding's gradient is zero but for the rows of a few tokens
        return gradient.flatten(1).norm(dim=1).nonzero().flatten() if gradient.ndim > 1 else torch.arange(len(gradient))

    def keep(name: str, gradient: Tensor) -> None:
        rows = used_rows(gradient)
        expected[name] = (rows, gradient if len(rows) == len(gradient) else gradient[rows])

    def compare(name: str, gradient: Tensor) -> None:
        rows, wanted = expected.pop(name)
        assert torch.equal(used_rows(gradient), rows), name
        found = gradient if len(rows) == len(gradient) else gradient[rows]
        differences[name] = norm(found.sub_(wanted)) / norm(wanted)

    loss = loss_of(padded_logp(policy, groups))
    backward(policy, loss, keep)
    assert expected.keys() == {name for name, _ in policy.model.named_parameters()}
    ours = loss_of(packed_logp(policy, groups))
    backward(policy, ours, compare)
    assert ours.item() == pytest.approx(loss.item(), rel=TOLERANCE, abs=0)
    assert not expected, "no gradient is missing"
    name, worst = max(differences.items(), key=lambda item: item[1])
    assert worst <= TOLERANCE, f"{name}: relative difference {worst:.1e}"
