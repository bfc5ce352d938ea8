"""The ops against TRL's and Liger's own, where those run on a CPU: log-prob, entropy, loss and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective, TokenBatch, linear_logprob, linear_policy_loss
from tests.numerics import grads, make, make_tokens, relative_error

N, D, V, SEQUENCES = 24, 16, 130, 3


def case() -> tuple[Tensor, Tensor, Tensor, TokenBatch]:
    x = make(N, D, V, torch.float32, seed=2)
    cu = torch.arange(0, N + 1, N // SEQUENCES, dtype=torch.int32)
    return (
        x["hidden"],
        x["weight"],
        x["targets"],
        make_tokens(x, cu_seqlens=cu, advantages=torch.tensor([1.0, -1.0, 0.5])),
    )


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.0, 5.0)])
def test_trl_chunked_logprob(temperature: float, softcap: float | None) -> None:
    peer = pytest.importorskip("trl.kernels.chunked_logprob", reason="trl is not installed")
    hidden, weight, targets, _ = case()
    theirs = peer.ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, temperature, 64, softcap, 1.0, ("entropy",)
    )
    ours = linear_logprob(hidden, weight, targets, temperature=temperature, softcap=softcap)
    torch.testing.assert_close(ours, (theirs[0], theirs[1]), rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(-1, 1, N)
    wanted = grads((theirs[0] * upstream).sum(), hidden, weight)
    for got, expected in zip(grads((ours[0] * upstream).sum(), hidden, weight), wanted, strict=True):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize(("loss_type", "preset"), [("grpo", "grpo"), ("bnpo", "bnpo"), ("cispo", "cispo")])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_liger_fused_linear_grpo(loss_type: str, preset: str, kl_coef: float) -> None:
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    hidden, weight, targets, tokens = case()
    o = PolicyObjective.preset(preset, kl_coef=kl_coef)
    high = 1 + o.clip_high if preset == "cispo" else o.clip_high  # there the bound itself, not its distance from 1
    options = {"beta": kl_coef, "use_ref_model": kl_coef != 0, "loss_type": loss_type, "compiled": False}
    function = chunked_loss.LigerFusedLinearGRPOLoss(epsilon_low=o.clip_low, epsilon_high=high, **options)
    shape = (SEQUENCES, N // SEQUENCES)
    assert tokens.old_logp is not None
    assert tokens.ref_logp is not None
    loss, _ = function(
        hidden.view(*shape, D),
        weight,
        targets.view(shape),
        torch.ones(shape),
        tokens.advantages,
        ref_per_token_logps=tokens.ref_logp.float().view(shape) if kl_coef else None,
        old_per_token_logps=tokens.old_logp.float().view(shape),
    )
    out = linear_policy_loss(hidden, weight, targets, tokens, o)
    torch.testing.assert_close(out.loss, loss.to(out.loss.dtype), rtol=1e-5, atol=1e-5)
    wanted = grads(loss, hidden, weight)
    for got, expected in zip(grads(out.loss, hidden, weight), wanted, strict=True):
        assert relative_error(got, expected) < 1e-5
