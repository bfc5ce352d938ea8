"""Liger's constructor and call with our loss: against Liger's own class, and both against autograd in float64."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast.integrations.liger import LigerFusedLinearGRPOLoss
from tests.numerics import LargestTensor, relative_error
from tests.processes import run_code

B, T, H, V = 5, 7, 16, 50
LENGTHS = torch.tensor([7, 3, 0, 5, 1])
DIFFERENTIABLE = ("_input", "lin_weight", "bias")
needs_liger = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "epsilon_high": 0.28},
    "grpo, delta": {"loss_type": "grpo", "delta": 1.1},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo"},
    "dapo, hot": {"loss_type": "dapo", "temperature": 0.7},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 11},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "cispo, cap below 1": {"loss_type": "cispo"},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.3},
    "vespo": {"loss_type": "vespo", "vespo_k_neg": 2.5},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1},
    "gspo, dapo": {"loss_type": "dapo", "importance_sampling_level": "sequence", "delta": 1.05},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
}
KL: dict[str, dict[str, Any]] = {
    "no kl": {"beta": 0.0, "use_ref_model": False},
    "kl": {"beta": 0.3},
    "corrected kl": {"beta": 0.3, "use_bias_correction_kl": True},
    "kl without a reference": {"beta": 0.3, "use_ref_model": False},
}
RATIOS = ("no ratio", "a ratio a token", "a ratio a sequence")


def batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x: dict[str, Any] = {"_input": noise(B, T, H), "lin_weight": noise(V, H) / 2, "bias": noise(V)}
    x = {name: value.to(dtype).requires_grad_() for name, value in x.items()}
    x["selected_token_ids"] = torch.randint(V, (B, T), generator=g)
    x["attention_mask"] = (torch.arange(T) < LENGTHS[:, None]).long()
    x["advantages"] = torch.tensor([1.2, -0.7, 0.3, -1.5, 0.0])
    logp = naive_logp({**x, **{n: x[n].detach().double() for n in DIFFERENTIABLE}}, 1.0)
    x["old_per_token_logps"] = (logp + 0.3 * noise(B, T)).float()
    x["ref_per_token_logps"] = (logp + 0.5 * noise(B, T)).float()
    x["ref_input"], x["ref_weight"], x["ref_bias"] = noise(B, T, H).to(dtype), noise(V, H).to(dtype), noise(V).to(dtype)
    x["ratios"] = {
        "no ratio": None,
        "a ratio a token": (0.3 * noise(B, T)).exp().float().where(x["attention_mask"].bool(), torch.ones(())),
        "a ratio a sequence": (0.3 * noise(B, 1)).exp().float(),
    }
    return x


def naive_logp(x: dict[str, Any], temperature: float) -> Tensor:
    logits = x["_input"] @ x["lin_weight"].T + x["bias"]
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).div(temperature).log_softmax(-1)
    return log_p.gather(2, x["selected_token_ids"][..., None])[..., 0]


def naive(x: dict[str, Any], ratio: Tensor | None, options: dict[str, Any]) -> list[Tensor]:
    """Loss, metrics and gradients through full logits in the dtype of ``x``, by Liger's formulas."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    names = {k: v for k, v in options.items() if k not in ("temperature", "use_ref_model")}
    logp = naive_logp(x, options.get("temperature", 1.0))
    kind, given = logp.dtype, options.get("use_ref_model", True)
    loss, metrics = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logp,
        x["attention_mask"],
        x["advantages"].to(kind),
        x["attention_mask"],
        x["ref_per_token_logps"].to(kind) if given else None,
        x["old_per_token_logps"].to(kind),
        vllm_is_ratio=None if ratio is None else ratio.to(kind),
        **names,
    )
    return [loss.detach(), *metrics, *torch.autograd.grad(loss, [x[n] for n in DIFFERENTIABLE])]


def call(
    loss_class: Any, x: dict[str, Any], ratio: Tensor | None, options: dict[str, Any], **more: Any
) -> list[Tensor]:
    unused = ("ref_input", "ref_weight", "ref_bias", "ratios")
    given = {k: v for k, v in x.items() if k not in unused}
    loss, metrics = loss_class(**options)(**{**given, "vllm_is_ratio": ratio, **more})
    assert isinstance(metrics, tuple)
    return [loss.detach(), *metrics, *torch.autograd.grad(loss, [x[n] for n in DIFFERENTIABLE])]


def combinations() -> list[tuple[str, str, str]]:
    """All in which Liger is right: luspo without any term that differs from token to token."""
    every = itertools.product(CASES, KL, RATIOS)
    return [c for c in every if c[0] != "luspo" or (c[1] == "no kl" and c[2] != "a ratio a token")]


@needs_liger
@pytest.mark.parametrize(("case", "kl", "ratio"), combinations())
def test_as_liger_and_no_worse_than_plain_torch(case: str, kl: str, ratio: str) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs

    options = {**CASES[case], **KL[kl]}
    for dtype in (torch.float32, torch.bfloat16):
        x = batch(dtype)
        importance = x["ratios"][ratio]
        got = call(LigerFusedLinearGRPOLoss, x, importance, options)
        theirs = call(Theirs, x, importance, {**options, "compiled": False})
        exact = {**x, **{n: x[n].detach().double().requires_grad_() for n in DIFFERENTIABLE}}
        truth, plain = naive(exact, importance, options), naive(x, importance, options)
        assert len(got) == len(theirs) == len(truth)
        for ours, liger, wanted, torch_ in zip(got, theirs, truth, plain, strict=True):
            assert ours.dtype == liger.dtype
            assert ours.shape == liger.shape
            unit = torch.finfo(dtype).eps if ours.ndim else 1e-6  # a gradient is rounded to its dtype
            assert relative_error(ours, wanted) <= max(2 * relative_error(torch_, wanted), unit)
            if dtype == torch.float32:
                assert relative_error(ours, liger) < 2e-5


@needs_liger
@pytest.mark.parametrize("kl", ["kl", "corrected kl"])
def test_the_reference_from_hidden_states_and_on_policy(kl: str) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs

    x, options = batch(), {**KL[kl], "loss_type": "grpo", "temperature": 1.3}
    more = {n: x[n] for n in ("ref_input", "ref_weight", "ref_bias")}
    more |= {"ref_per_token_logps": None, "old_per_token_logps": None}
    got = call(LigerFusedLinearGRPOLoss, x, None, options, **more)
    theirs = call(Theirs, x, None, {**options, "compiled": False}, **more)
    for ours, liger in zip(got, theirs, strict=True):
        assert relative_error(ours, liger) < 2e-5
    with pytest.warns(UserWarning, match="ref_input is not used"):
        call(LigerFusedLinearGRPOLoss, x, None, options, ref_input=x["ref_input"])


@needs_liger
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
@pytest.mark.parametrize("items", [40, torch.tensor(40)])
def test_the_tokens_of_the_whole_batch(loss_type: str, items: Any) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs

    x, options = batch(), {"loss_type": loss_type, "epsilon_high": 1.2}
    got = call(LigerFusedLinearGRPOLoss, x, None, options, num_items_in_batch=items)
    theirs = call(Theirs, x, None, {**options, "compiled": False}, num_items_in_batch=items)
    for ours, liger in zip(got, theirs, strict=True):
        assert relative_error(ours, liger) < 2e-5


@needs_liger
def test_the_same_constructor_and_call() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs

    for name in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(c, name)).parameters for c in (LigerFusedLinearGRPOLoss, Theirs))
        assert [(p.name, p.default, p.kind) for p in ours.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]
    ours, theirs = vars(LigerFusedLinearGRPOLoss()), vars(Theirs())
    assert {k: v for k, v in ours.items() if not k.startswith("_")} == {
        k: v for k, v in theirs.items() if not k.startswith("_")
    }


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_luspo_counts_a_sequence_by_its_tokens_and_padding_not_at_all(level: str, beta: float) -> None:
    x = batch()
    loss = LigerFusedLinearGRPOLoss(
        loss_type="luspo", importance_sampling_level=level, beta=beta, epsilon_low=0.1, epsilon_high=0.1
    )
    given = {k: v for k, v in x.items() if k != "ratios" and not k.startswith(("ref_input", "ref_weight", "ref_bias"))}
    value, _ = loss(**given)
    exact = {**x, **{n: x[n].detach().double().requires_grad_() for n in DIFFERENTIABLE}}
    logp, wanted = naive_logp(exact, 1.0), torch.zeros((), dtype=torch.float64)
    for b, n in enumerate(LENGTHS.tolist()):
        if n == 0:
            continue
        log_ratio = logp[b, :n] - x["old_per_token_logps"][b, :n].double()
        ratio = (log_ratio.mean().expand(n) if level == "sequence" else log_ratio).exp()
        a = x["advantages"][b].double()
        d = x["ref_per_token_logps"][b, :n].double() - logp[b, :n]
        rows = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a) + beta * (d.exp() - d - 1)
        wanted = wanted + n * rows.mean() / B
    assert relative_error(value.detach(), wanted.detach()) < 1e-5
    for got, truth in zip(
        torch.autograd.grad(value, [x[n] for n in DIFFERENTIABLE]),
        torch.autograd.grad(wanted, [exact[n] for n in DIFFERENTIABLE]),
        strict=True,
    ):
        assert relative_error(got, truth) < 1e-5


def test_what_stands_in_padding_does_not_matter() -> None:
    x = batch()
    padding = x["attention_mask"] == 0
    for case in CASES.values():
        clean = call(LigerFusedLinearGRPOLoss, x, x["ratios"]["a ratio a token"], case)
        y = {**x, "_input": x["_input"].detach().masked_fill(padding[..., None], torch.nan).requires_grad_()}
        y["selected_token_ids"] = x["selected_token_ids"].masked_fill(padding, -100)
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            y[name] = x[name].masked_fill(padding, torch.nan)
        dirty = call(LigerFusedLinearGRPOLoss, y, x["ratios"]["a ratio a token"].masked_fill(padding, torch.nan), case)
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_no_token_counts(case: str) -> None:
    x = batch()
    x["attention_mask"] = torch.zeros_like(x["attention_mask"])
    loss, *rest = call(LigerFusedLinearGRPOLoss, x, None, CASES[case])
    assert loss == 0
    assert all((value == 0).all() for value in rest)


def test_the_gradient_is_made_with_the_loss() -> None:
    """No [B T, V] is kept; an upstream gradient scales it; a frozen head gets none; a narrow weight is widened."""
    x = batch()
    loss = LigerFusedLinearGRPOLoss(beta=0.0)
    args = [x[n] for n in ("_input", "lin_weight", "selected_token_ids", "attention_mask", "advantages")]
    value, _ = loss(*args)
    (once,) = torch.autograd.grad(value, x["_input"], retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * value, x["_input"])
    torch.testing.assert_close(3 * once, thrice)
    frozen = x["lin_weight"].detach().bfloat16()
    value, (clipped,) = loss(args[0], frozen, *args[2:])
    value.backward()
    assert clipped == 0
    assert value.dtype == torch.float32
    with LargestTensor() as seen, torch.no_grad():
        loss(*args)
    assert seen.numel <= max(B * T, V) * max(H, V)


def test_attributes_can_be_set_later() -> None:
    x = batch()
    args = [x[n] for n in ("_input", "lin_weight", "selected_token_ids", "attention_mask", "advantages")]
    loss = LigerFusedLinearGRPOLoss(beta=0.0)
    loss.loss_type, loss.temperature = "sapo", 0.5
    assert loss(*args)[0] == LigerFusedLinearGRPOLoss(beta=0.0, loss_type="sapo", temperature=0.5)(*args)[0]


def test_what_does_not_fit_is_refused() -> None:
    x = batch()
    args = [x[n] for n in ("_input", "lin_weight", "selected_token_ids", "attention_mask", "advantages")]
    for name in ("sapo_temperature_pos", "sapo_temperature_neg", "delta"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            LigerFusedLinearGRPOLoss(**{name: 0.0})
    refused: list[tuple[dict[str, Any], str]] = [
        ({"loss_type": "ppo"}, "loss_type='ppo' is unknown"),
        ({"loss_type": "dr_grpo"}, "needs max_completion_length"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "use importance_sampling_level='token'"),
        ({"importance_sampling_level": "word"}, "word"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            LigerFusedLinearGRPOLoss(**{"beta": 0.0, **options})(*args)
    with pytest.raises(ValueError, match="needs ref_per_token_logps, or ref_input and ref_weight"):
        LigerFusedLinearGRPOLoss()(*args)
    loss = LigerFusedLinearGRPOLoss(beta=0.0)
    with pytest.raises(ValueError, match="advantages"):
        loss(*args[:-1], x["advantages"][:2])
    with pytest.raises(ValueError, match="hidden states must be"):
        loss(x["_input"][:, :2], *args[1:])
    with pytest.raises(ValueError, match="0 or 1"):
        loss(*args[:3], 2 * args[3], args[4])
    with pytest.raises(ValueError, match="vllm_is_ratio must be"):
        loss(*args, vllm_is_ratio=torch.ones(B))


def test_importing_it_imports_no_liger() -> None:
    code = "import sys; sys.modules['liger_kernel'] = None; import revisual_fast.integrations.liger"
    run_code(code)
