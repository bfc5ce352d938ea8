"""Scoring beside peft, accelerate and FSDP2, and what is refused: a model whose logits cannot be known above all."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSeq2SeqLM, LlamaForCausalLM, T5Config

from revisual_fast.integrations.transformers import accelerate_scoring, unaccelerate_scoring
from tests.numerics import relative_error
from tests.scoring import V, batch, build, outcome, plain
from tests.scoring_ranks import CASES

ROOT = Path(__file__).parents[2]


def test_peft() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    x = batch()
    base = build("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wanted = outcome(model, *plain(model, x))
    assert accelerate_scoring(model) is model
    out = model(**x, score=True)
    got = outcome(model, out.logp, out.entropy)
    assert any("lora_A" in name for name in got)
    for name, value in got.items():
        assert relative_error(value, wanted[name]) < 2e-5, name
    with model.disable_adapter():
        torch.testing.assert_close(model(**x, score=True).logp, plain(model, x)[0])
    unaccelerate_scoring(model)
    assert "forward" not in vars(base)
    for options in ({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        adapted = peft.get_peft_model(build("mistral"), peft.LoraConfig(**options))
        with pytest.raises(ValueError, match="leave adapters and quantisation off it"):
            accelerate_scoring(adapted)


def test_device_map() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    x = batch()
    for first in (True, False):
        model = build("llama")
        wanted, _ = plain(model, x)
        model = accelerate_scoring(model) if first else model
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        accelerate_scoring(model)
        torch.testing.assert_close(model(**x, score=True).logp, wanted)
        torch.testing.assert_close(plain(model, x)[0], wanted)
    model = accelerate_scoring(build("llama", tie_word_embeddings=False))
    accelerate.cpu_offload(model.lm_head, "cpu")
    with pytest.raises(ValueError, match="the head is offloaded"):
        model(**x, score=True)


def test_two_ranks() -> None:
    """DDP, FSDP2 and a head divided by rows: tests/scoring_ranks.py, in processes that have forked from a fresh one."""
    command = [sys.executable, "-m", "tests.scoring_ranks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split("\n")) == len(CASES) + 1


class Odd(LlamaForCausalLM):
    """Does something to its logits."""

    def what(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.what(out.logits)
        return out


def masked(_: Any, z: Tensor) -> Tensor:
    return z.masked_fill(torch.arange(z.shape[-1]) == 9, -1e9)


def learned(self: Any, z: Tensor) -> Tensor:
    return z * self.model.norm.weight[0]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (masked, "more to its logits than a scale and a softcap"),
        (lambda _, z: z + torch.linspace(0, 1, V), "more to its logits than a scale and a softcap"),
        (lambda _, z: z.log_softmax(-1), "more to its logits than a scale and a softcap"),
        (lambda _, z: z.clamp(-5, 5), "more to its logits than a scale and a softcap"),
        (lambda _, z: -z, "more to its logits than a scale and a softcap"),
        (lambda _, z: z[..., :-3], "does not return its head's output as logits"),
        (learned, "parameters after its head"),
        (lambda self, z: z + self.lm_head(torch.zeros(1, 1, 16)), "calls its head 2 times"),
        (None, "calls its head 0 times"),
        (lambda _, z: z.view(2, 8, V), "needs the logits themselves after its head"),
    ],
)
def test_what_cannot_be_known_is_refused(what: Any, message: str) -> None:
    model = accelerate_scoring(Odd(build("llama").config))
    if what is None:
        model.get_output_embeddings = lambda: nn.Linear(16, V)  # type: ignore[method-assign]
    else:
        model.what = types.MethodType(what, model)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=message):
        model(**batch(), score=True)


@pytest.mark.parametrize("what", [lambda _, z: z.float() / 7, lambda _, z: 0.5 * torch.tanh(z * 3)])
def test_a_scale_and_a_softcap_by_any_name_are_found(what: Any) -> None:
    model = Odd(build("llama").config).double()
    model.what = types.MethodType(what, model)
    x = batch()
    wanted = plain(model, x)
    out = accelerate_scoring(model)(**x, score=True)
    torch.testing.assert_close(out.logp, wanted[0].to(out.logp), rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    x, small = batch(), {"d_model": 16, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": V}
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        accelerate_scoring(AutoModelForSeq2SeqLM.from_config(T5Config(**small)))
    with pytest.raises(ValueError, match="no language-model head"):
        accelerate_scoring(AutoModel.from_config(build("llama").config))
    with pytest.raises(ValueError, match="pass the model before it is wrapped"):
        accelerate_scoring(nn.Linear(2, 2))
    model = accelerate_scoring(build("qwen2"))
    with pytest.raises(ValueError, match="needs labels"):
        model(x["input_ids"], score=True)
    with pytest.raises(ValueError, match="leave out logits_to_keep"):
        model(**x, score=True, logits_to_keep=3)
    with pytest.raises(TypeError, match="input_ids"):  # the model's own errors stay what they are
        model(x["input_ids"], **x, score=True)
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO stage 3"):
        model(**x, score=True)
    del model.lm_head.weight.ds_id
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:30].detach())
    with pytest.raises(ValueError, match=r"weight is \[30, 16\], not \[67, 16\]: it is sharded"):
        model(**x, score=True)
