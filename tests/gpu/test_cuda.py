"""The same computation on a CUDA device: log-probs, gradients, a whole run."""

from pathlib import Path

import pytest
import torch

from revisual_fast.config import ModelConfig
from revisual_fast.config_file import load_config
from revisual_fast.curriculum import train
from revisual_fast.losses import PolicyObjective, TokenBatch
from revisual_fast.ops import linear_policy_loss
from revisual_fast.policy.load import load_policy
from revisual_fast.rollout.engine import Sampling
from revisual_fast.rollout.hf import HFEngine
from revisual_fast.telemetry import read_jsonl
from tests.groups import make_groups, packed_logp
from tests.integration.conftest import write_small_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(7, [(1, 4, 4)], [4, 9, 1]), (5, [], [6, 3])]


def policies(tiny_vl: Path):
    return [
        load_policy(tiny_vl, ModelConfig(path=str(tiny_vl), dtype="float32", device=device))
        for device in ("cpu", "cuda")
    ]


def test_packed_log_probs_and_gradients_are_those_of_the_cpu(tiny_vl):
    gradients = []
    for policy in policies(tiny_vl):
        logp = packed_logp(policy, make_groups(policy.family, SHAPES))
        logp.sum().backward()
        gradients.append((logp.detach().cpu(), {n: p.grad.cpu() for n, p in policy.model.named_parameters()}))
    (expected, expected_grads), (got, got_grads) = gradients
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in expected_grads.items():
        torch.testing.assert_close(got_grads[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_greedy_rollouts_are_those_of_the_cpu(tiny_vl):
    outputs = []
    for policy in policies(tiny_vl):
        prompts = [g.prompt for g in make_groups(policy.family, SHAPES)]
        rollouts = HFEngine(policy, [-1]).generate(prompts, 2, Sampling(12, temperature=0))
        outputs.append([r.ids.tolist() for group in rollouts for r in group])
    assert outputs[0] == outputs[1]


def test_bf16_inputs_with_fp32_logits_give_a_ratio_of_exactly_one_and_fp32_accuracy():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 96, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
    weight = (torch.randn(1000, 96, generator=generator) / 10).to("cuda", torch.bfloat16).requires_grad_()
    targets = torch.randint(0, 1000, (64,), generator=generator).cuda()
    tokens = TokenBatch(advantages=torch.randn(64, generator=generator).cuda())
    out = linear_policy_loss(hidden, weight, targets, tokens, PolicyObjective(entropy_coef=0.1))
    out.loss.backward()
    assert float(out.metrics["ratio/max"]) == 1.0
    h, w = hidden.detach().double(), weight.detach().double()
    exact = (h @ w.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(out.logp.double(), exact, rtol=0, atol=1e-4)
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_run(tiny_vl, tmp_path, dtype):
    train(load_config(write_small_run(tmp_path, tiny_vl), ["model.device=cuda", f"model.dtype={dtype}"]))
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 7
    assert all(row["loss"] is not None for row in rows)
