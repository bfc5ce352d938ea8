"""OpenRLHF's own Actor and PolicyLoss, stock against patched: log-probs, entropy, loss and every gradient."""

from __future__ import annotations

import copy
import runpy
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revisual_fast.integrations.seams import _SAID, SeamError, patched, unpatch
from tests.processes import run_code

T, A = 9, 5
IDS = torch.tensor([[3, 5, 6, 7, 9, 4, 3, 8, 2], [0, 0, 3, 10, 11, 12, 5, 1, 0], [0, 4, 5, 9, 30, 31, 2, 0, 0]])
ATTENTION = torch.tensor([[1] * 9, [0, 0] + [1] * 6 + [0], [0] + [1] * 6 + [0, 0]])
ACTIONS = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from tests.models import tiny
    from tests.scoring import build

    out = {}
    models = {"llama": build("llama"), "gemma2": build("gemma2"), "cohere": build("cohere"), "vl": tiny("qwen2_5_vl")}
    models["mixtral"] = build("mixtral")
    for name, model in models.items():
        out[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(out[name])
    return out


def make(openrlhf: Any, path: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return openrlhf.Actor(path, **{"attn_implementation": "eager", "temperature": 0.8, **more}).float()


def step(openrlhf: Any, actor: Any, kind: dict[str, Any], **inputs: Any) -> dict[str, Tensor]:
    """What ``ActorPPOTrainer.training_step`` makes of one batch: values and gradients."""
    g = torch.Generator().manual_seed(1)
    logp, out = actor(IDS, ACTIONS, attention_mask=ATTENTION, return_output=True, return_entropy=True, **inputs)
    old, rollout = (logp.detach() + 0.3 * torch.randn(logp.shape, generator=g) for _ in range(2))
    advantages = torch.randn(3, 1, generator=g).expand(3, A)
    loss, *metrics = openrlhf.PolicyLoss(**kind)(
        logp, old, advantages, action_mask=ACTIONS, rollout_log_probs=rollout, dp_size=1
    )
    entropy = out.entropy[:, -A:]
    loss = loss - 0.1 * openrlhf.aggregate_loss(entropy, ACTIONS)
    if out.get("aux_loss") is not None:
        loss = loss + 0.02 * out.aux_loss
    actor.zero_grad()
    loss.backward()
    values = {"logp": logp.detach(), "entropy": (entropy * ACTIONS).detach(), "loss": loss.detach()}
    values |= {f"metric {i}": m for i, m in enumerate(metrics) if m is not None}
    return values | {n: p.grad for n, p in actor.named_parameters() if p.grad is not None}


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    whole = max(g.norm() for g in wanted.values())
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-5 * max(value.norm(), 1e-3 * whole), name


@contextmanager
def ours() -> Iterator[None]:
    """Patched inside; a warning is an error."""
    from revisual_fast.integrations.openrlhf import patch_openrlhf

    _SAID.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        patch_openrlhf()
        yield
        unpatch("openrlhf")


KINDS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "dual clip": {"dual_clip": 1.5, "clip_eps_high": 0.28},
    "gspo": {"policy_loss_type": "gspo", "clip_eps_low": 0.1, "clip_eps_high": 0.1},
    "corrected": {"is_correction_level": "token", "is_correction_mode": "clip", "token_level_loss": False},
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step(openrlhf: Any, saved: dict[str, str], kind: str, packing: bool) -> None:
    actor = make(openrlhf, saved["llama"], packing_samples=packing)
    wanted = step(openrlhf, actor, KINDS[kind])
    with ours():
        same(step(openrlhf, actor, KINDS[kind]), wanted)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "mixtral"])
def test_models(openrlhf: Any, saved: dict[str, str], name: str) -> None:
    actor = make(openrlhf, saved[name])
    wanted = step(openrlhf, actor, {})
    with ours():
        same(step(openrlhf, actor, {}), wanted)


def test_images(openrlhf: Any, saved: dict[str, str]) -> None:
    actor = make(openrlhf, saved["vl"])
    assert actor.is_vlm
    ids = torch.tensor([[7, 5, 8, 10, 20, 30, 40, 41, 42], [7, 5, 8, 11, 21, 31, 41, 1, 0]])
    g = torch.Generator().manual_seed(0)
    inputs = {
        "attention_mask": torch.tensor([[1] * 9, [1] * 8 + [0]]),
        "pixel_values": torch.randn(8, 3 * 2 * 14**2, generator=g),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
    }

    def gradients() -> dict[str, Tensor]:
        actor.zero_grad()
        logp = actor(ids, ACTIONS[:2], **inputs)
        (logp * torch.linspace(0.5, 2, 10).view(2, 5)).sum().backward()
        return {"logp": logp.detach(), **{n: p.grad for n, p in actor.named_parameters() if p.grad is not None}}

    wanted = gradients()
    assert any("visual" in name for name in wanted)
    with ours():
        same(gradients(), wanted)


def test_lora_and_checkpointing(openrlhf: Any, saved: dict[str, str]) -> None:
    actor = make(openrlhf, saved["llama"], lora_rank=4, target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        for name, p in actor.named_parameters():
            if "lora_B" in name:
                p.normal_()
    actor.gradient_checkpointing_enable()
    wanted = step(openrlhf, actor.train(), {})
    with ours():
        same(step(openrlhf, actor, {}), wanted)


@pytest.mark.parametrize("packing", [False, True])
def test_all_tokens(openrlhf: Any, saved: dict[str, str], packing: bool) -> None:
    """As SFT and DPO ask for them: without an action mask."""
    actor = make(openrlhf, saved["llama"], packing_samples=packing)
    real = ATTENTION[:, 1:] * ATTENTION[:, :-1]
    ask = {"attention_mask": ATTENTION, "return_logprobs": True}
    wanted = actor(IDS, **ask) * real
    with ours():
        got, out = actor(IDS, return_output=True, **ask)
        torch.testing.assert_close(got * real, wanted, rtol=1e-5, atol=1e-5)
        assert out.get("logits") is None
        assert torch.equal(actor(IDS, **ask), got)
        with torch.no_grad():
            torch.testing.assert_close(actor(IDS, **ask), got.detach())


@pytest.mark.usefixtures("patched")
def test_their_code_where_it_has_to_be(openrlhf: Any, saved: dict[str, str]) -> None:
    actor = make(openrlhf, saved["llama"])
    with pytest.warns(RuntimeWarning, match="OpenRLHF's own Actor.forward runs: a caller wants the logits themselves"):
        logits = actor(IDS, attention_mask=ATTENTION, return_output=True).logits
    assert logits.shape == (3, T, 67)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actor(IDS, attention_mask=ATTENTION, return_output=True)  # said once
    actor.model.lm_head.weight.ds_id = 3
    with pytest.warns(RuntimeWarning, match="zero_stage 3"):
        actor(IDS, ACTIONS, attention_mask=ATTENTION)
    adapted = make(openrlhf, saved["llama"], lora_rank=2, target_modules=["lm_head"])
    with pytest.warns(RuntimeWarning, match="leave adapters and quantisation off it"):
        adapted(IDS, ACTIONS, attention_mask=ATTENTION)


def test_patching(openrlhf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from revisual_fast.integrations.openrlhf import patch_openrlhf

    stock = openrlhf.Actor.forward
    assert not patched("openrlhf")
    patch_openrlhf()
    patch_openrlhf()
    assert openrlhf.Actor.forward is not stock
    unpatch("openrlhf")
    unpatch("openrlhf")
    assert openrlhf.Actor.forward is stock
    monkeypatch.setattr(openrlhf.Actor, "forward", lambda self, sequences, mask: None)
    with pytest.raises(SeamError, match=r"openrlhf.models.actor:Actor.forward takes \(self, sequences, mask\)"):
        patch_openrlhf()
    assert not patched("openrlhf")


def test_after_patching_twice_the_original_is_still_theirs(openrlhf: Any, saved: dict[str, str]) -> None:
    from revisual_fast.integrations.openrlhf import patch_openrlhf

    actor = make(openrlhf, saved["llama"])
    wanted = actor(IDS, attention_mask=ATTENTION, return_output=True).logits
    patch_openrlhf()
    patch_openrlhf()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(actor(IDS, attention_mask=ATTENTION, return_output=True).logits, wanted)
    finally:
        unpatch("openrlhf")


def test_importing_patches_nothing() -> None:
    code = (
        "from tests.dropin.openrlhf.stand_ins import install; install()\n"
        "from openrlhf.models import Actor; before = Actor.forward\n"
        "import revisual_fast.integrations.openrlhf\n"
        "assert Actor.forward is before"
    )
    run_code(code)


def test_a_wrapped_actor(openrlhf: Any, saved: dict[str, str]) -> None:
    """As DeepSpeed's engine holds it."""
    actor = make(openrlhf, saved["llama"])
    engine = nn.Module()
    engine.module = actor
    engine.forward = types.MethodType(lambda self, *args, **kwargs: self.module(*args, **kwargs), engine)
    wanted = copy.deepcopy(actor)(IDS, ACTIONS, attention_mask=ATTENTION)
    with ours():
        torch.testing.assert_close(engine(IDS, ACTIONS, attention_mask=ATTENTION), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("openrlhf")
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[3] / "examples" / "openrlhf_actor.py"))
    out = capsys.readouterr().out
    assert "logits: [4, 24, 5000]" in out
    assert "logits: none" in out
    assert float(out.rsplit(maxsplit=1)[1]) < 1e-5
