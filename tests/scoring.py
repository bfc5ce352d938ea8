"""Small models of many families of transformers, and their log-probs from their own logits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from revisual_fast.integrations.transformers import IGNORE, accelerate_scoring
from tests.numerics import relative_error

V = 67
SMALL = {
    **{"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0},
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout": 0.0, "dropout": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "recurrent_gemma": {"logits_soft_cap": 2.0},
    "nanochat": {},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {},
    "hyperclovax": {"logits_scaling": 1.7},
    "phi": {},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "bloom": {},
    "stablelm": {},
    "olmo2": {},
    "glm4": {},
    "mixtral": {**EXPERTS, "output_router_logits": True},
    "qwen3_moe": EXPERTS,
    "granitemoe": {**EXPERTS, "logits_scaling": 0.5},
}
LABELS = [[IGNORE, 5, 6, IGNORE, 9, 4, 3, 8], [7, 3, 9, 10, 11, IGNORE, IGNORE, IGNORE]]


def build(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **NO_DROPOUT, **FAMILIES.get(family, {}), **more})
    moe = {"experts_implementation": "eager"} if "num_experts_per_tok" in FAMILIES.get(family, {}) else {}
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", **moe)


def batch() -> dict[str, Tensor]:
    labels = torch.tensor(LABELS)
    mask = torch.ones_like(labels)
    mask[1, 5:] = 0
    ids = torch.tensor([[3, 5, 6, 7, 9, 4, 3, 8], [7, 3, 9, 10, 11, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(model: Any, x: dict[str, Any], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """logp and entropy ``[B, T]`` from the model's own logits."""
    given = {k: v for k, v in x.items() if k != "labels"}
    logits = model(**given).logits[:, :-1]
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).div(temperature).log_softmax(-1)
    counts = x["labels"][:, 1:] != IGNORE
    logp = log_p.gather(2, x["labels"][:, 1:, None].clamp(min=0))[..., 0] * counts
    entropy = -(log_p.exp() * log_p).sum(-1) * counts
    return nn.functional.pad(logp, (1, 0)), nn.functional.pad(entropy, (1, 0))


def outcome(model: Any, logp: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """Values, and the gradient of each parameter of a sum that weighs every one differently."""
    weights = torch.linspace(0.5, 1.5, logp.numel()).view(logp.shape).to(logp)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = (weights * logp).sum() + 0.3 * (weights * entropy).sum()
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True, materialize_grads=True)
    return {"logp": logp.detach(), "entropy": entropy.detach(), **dict(zip(named, gradients, strict=True))}


def check(model: Any, x: dict[str, Any], temperature: float) -> None:
    """``model`` in fp32 as exact as its own logits in fp32, both against a copy in float64."""
    wide = copy.deepcopy(model).double()
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    truth = outcome(wide, *plain(wide, doubled, temperature))
    wanted = outcome(model, *plain(model, x, temperature))
    out = accelerate_scoring(model)(**x, score=True, temperature=temperature)
    got = outcome(model, out.logp, out.entropy)
    assert out.get("logits") is None
    assert got["logp"].dtype == torch.float32
    whole = max(value.double().norm().item() for name, value in truth.items() if name not in ("logp", "entropy"))
    for name, value in got.items():
        if truth[name].norm() < 1e-6 * whole:  # such as a key's bias, which changes nothing
            assert value.norm() < 1e-5 * whole, name
            continue
        bound = max(2 * relative_error(wanted[name], truth[name]), 2e-6)
        assert relative_error(value, truth[name]) <= bound, name
    n = (x["labels"][:, 1:] != IGNORE).sum()
    torch.testing.assert_close(out.loss.double(), -truth["logp"].sum() / n, rtol=1e-5, atol=0)
