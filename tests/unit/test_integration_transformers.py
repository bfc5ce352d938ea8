"""Scoring without logits, by family: values and every gradient against the model's own logits in float64."""

from __future__ import annotations

import copy
import inspect
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revisual_fast.integrations.head import TRANSFORMS
from revisual_fast.integrations.seams import SeamError
from revisual_fast.integrations.transformers import IGNORE, accelerate_scoring, score_tokens, unaccelerate_scoring
from tests.models import tiny
from tests.numerics import LargestTensor, relative_error
from tests.scoring import FAMILIES, batch, build, check, outcome, plain


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = build(family)
    check(model, batch(), temperature=0.7)
    transform = TRANSFORMS[model]
    config = FAMILIES[family]
    scale = {"granite": 1 / 3.0, "granitemoe": 2.0, "cohere": 0.3, "cohere2": 0.0625, "hyperclovax": 1.7}.get(family, 1)
    cap = config.get("final_logit_softcapping", config.get("logits_soft_cap", 15.0 if family == "nanochat" else None))
    assert transform.scale == pytest.approx(scale, rel=1e-7)
    assert transform.softcap == (None if cap is None else pytest.approx(cap, rel=1e-7))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_vision_language(family: str) -> None:
    model = tiny(family)
    ids = torch.tensor([[7, 5, 8, 10, 20, 30, 40], [7, 5, 8, 11, 21, 31, 41]])
    g = torch.Generator().manual_seed(0)
    patch = model.config.vision_config.patch_size
    x = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(torch.arange(7) < 4, IGNORE),
        "pixel_values": torch.randn(8, 3 * 2 * patch**2, generator=g),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
        "mm_token_type_ids": (ids == 5).int(),
    }
    check(model, x, temperature=1.3)


def test_the_loss_is_the_models_own() -> None:
    model, x = build("mixtral"), batch()
    own = model(**x)
    out = accelerate_scoring(model)(**x, score=True)
    torch.testing.assert_close(out.aux_loss, own.aux_loss)
    aux = model.config.router_aux_loss_coef * own.aux_loss
    torch.testing.assert_close(out.loss, own.loss - aux)
    for items in (5, torch.tensor(5)):
        shared = model(**x, score=True, num_items_in_batch=items).loss
        torch.testing.assert_close(shared, model(**x, num_items_in_batch=items).loss - aux)
    x["labels"] = torch.full_like(x["labels"], IGNORE)
    empty = model(**x, score=True)
    empty.loss.backward()
    assert empty.loss == 0
    assert not empty.logp.any()


def test_without_the_keyword_nothing_changes() -> None:
    model, x = build("qwen2").eval(), batch()
    before, signature = model(**x), inspect.signature(model.forward)
    generated = model.generate(x["input_ids"][:1], max_new_tokens=4, do_sample=False)
    assert accelerate_scoring(model) is model
    model(**x, score=True)
    after = model(**x)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model.generate(x["input_ids"][:1], max_new_tokens=4, do_sample=False), generated)


def test_no_logits_and_no_cache_are_made() -> None:
    model = build("llama", vocab_size=997)
    x = batch()
    accelerate_scoring(model)
    with LargestTensor(*model.parameters()) as seen:
        out = model(**x, score=True)
    assert out.past_key_values is None
    assert seen.numel < 16 * 997
    assert model(**x, score=True, use_cache=True, output_hidden_states=True).past_key_values is not None


def test_a_copy_is_bound_to_itself_and_twice_is_as_good_as_once() -> None:
    model, x = accelerate_scoring(accelerate_scoring(build("llama"))), batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(3)
    assert torch.equal(model(**x, score=True).logp, build_score(x))
    torch.testing.assert_close(twin(**x, score=True).logp, plain(twin, x)[0])
    assert not torch.allclose(twin(**x, score=True).logp, model(**x, score=True).logp)
    assert unaccelerate_scoring(unaccelerate_scoring(model)) is model
    assert "forward" not in vars(model)
    assert not any("scoring" in name for name in vars(model))
    model.forward = types.MethodType(lambda self, **_: "mine", model)
    assert accelerate_scoring(model)(**x) == "mine"
    assert unaccelerate_scoring(model)(**x) == "mine"
    accelerate_scoring(model)
    model.forward = lambda **_: "theirs"
    with pytest.raises(SeamError, match=r"LlamaForCausalLM.forward was replaced by somebody else"):
        unaccelerate_scoring(model)


def build_score(x: dict[str, Tensor]) -> Tensor:
    return accelerate_scoring(build("llama"))(**x, score=True).logp


def test_score_tokens_changes_nothing_and_runs_inside_a_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    model, x = build("gemma2"), batch()
    wanted, _ = plain(model, x, 0.9)
    inputs = {k: x[k] for k in ("input_ids", "attention_mask")}
    targets = nn.functional.pad(x["labels"][:, 1:], (0, 1), value=IGNORE)
    for module in (model, Wrapper(model)):
        out = score_tokens(module, targets, base=model, temperature=0.9, **inputs)
        torch.testing.assert_close(out.logp[:, :-1], wanted[:, 1:])
        assert "forward" not in vars(model)
        assert "forward" not in vars(model.lm_head)
    accelerate_scoring(model)
    torch.testing.assert_close(score_tokens(model, targets, temperature=0.9, **inputs).logp[:, :-1], wanted[:, 1:])
    stock, seen = inspect.signature(model.forward), []
    model.register_forward_pre_hook(lambda module, _: seen.append(inspect.signature(module.forward)))
    score_tokens(model, targets, **inputs)  # a trainer's hook takes from it what it may pass
    assert seen == [stock]
    with pytest.raises(ValueError, match="pass the model before it is wrapped"):
        score_tokens(Wrapper(model), targets, **inputs)


def test_gradient_checkpointing() -> None:
    x = batch()
    results = []
    for reentrant in (None, False, True):
        model = accelerate_scoring(build("qwen3")).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        out = model(**x, score=True)
        (out.loss + out.entropy.mean()).backward()
        results.append([p.grad for p in model.parameters()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast(weights: torch.dtype) -> None:
    model, x = build("llama").to(weights), batch()
    wide = copy.deepcopy(model).double()
    truth = outcome(wide, *plain(wide, x))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = outcome(model, *plain(model, x))
        out = accelerate_scoring(model)(**x, score=True)
    got = outcome(model, out.logp, out.entropy)
    assert got["logp"].dtype == torch.float32
    for name, value in got.items():
        assert relative_error(value, truth[name]) <= max(2 * relative_error(wanted[name], truth[name]), 2**-7), name
    unaccelerate_scoring(model)
    model.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(type(model).forward), model)
    within = accelerate_scoring(model)(**x, score=True)  # as accelerate prepares a model
    assert torch.equal(within.logp, out.logp)
