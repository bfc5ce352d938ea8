"""TRL's log-probs by the fused head: every output, in every setting, and whole runs of other trainers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer import utils

from revisual_fast.integrations import SeamError, unpatch
from revisual_fast.integrations.trl import patch_trl
from revisual_fast.integrations.trl.kernel import STATISTICS, FusedLogProb
from tests.dropin.trl.runs import tokenizer
from tests.models import build, tiny_config
from tests.processes import run_code

OWN = utils._ChunkedLogProbFunction
NAMES = ("logprobs", "entropy", *STATISTICS)


@pytest.fixture(autouse=True)
def _patched():
    patch_trl()
    yield
    unpatch("trl")


def problem(dtype: torch.dtype, bias: bool) -> list[Any]:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 24, generator=rng).to(dtype).requires_grad_()
    weight = (torch.randn(301, 24, generator=rng) * 0.4).to(dtype)
    weight[7] = weight[3]  # equal logits
    targets = torch.randint(301, (50,), generator=rng)
    targets[:20] = (hidden @ weight.T).argmax(1)[:20]
    targets[20:22] = torch.tensor([3, 7])
    own_bias = torch.randn(301, generator=rng).to(dtype).requires_grad_() if bias else None
    return [hidden, weight.requires_grad_(), own_bias, targets]


def outputs(apply: Any, of: list[Any], settings: tuple[Any, ...], autocast: bool = False) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        made = dict(zip(NAMES, apply(*of, *settings), strict=True))
    rng = torch.Generator().manual_seed(1)
    up = torch.randn(2, 50, generator=rng)
    (made["logprobs"] * up[0] + made["entropy"] * up[1]).sum().backward()
    for name, x in zip(("d_hidden", "d_weight", "d_bias"), of[:3], strict=True):
        if x is not None:
            made[name], x.grad = x.grad, None
    return {n: x.detach().double() for n, x in made.items()}


def exact(of: list[Any], temperature: float, softcap: float | None, scale: float) -> dict[str, Tensor]:
    """In float64, by autograd."""
    wide = [x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x for x in of]

    def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
        z = scale * (hidden @ weight.T + (0 if bias is None else bias))
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        logp = z.log_softmax(1)
        chosen = logp.gather(1, targets[:, None])[:, 0]
        sq = (2 * logp).logsumexp(1)
        return chosen, -(logp.exp() * logp).sum(1), sq, z.mean(1), z.argmax(1) == targets

    return outputs(lambda *of: apply(*of), wide, ())


SETTINGS = [(1.0, None, 1.0), (0.7, None, 0.25), (0.9, 15.0, 1.0), (1.3, 20.0, 2.0)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
def test_outputs_and_gradients(kind, setting, bias):
    """No farther from float64 than twice TRL's, which rounds half-precision logits."""
    temperature, softcap, scale = setting
    of = problem(torch.bfloat16 if kind == "bf16" else torch.float32, bias)
    given = (temperature, 64, softcap, scale, ("log_probs", "entropy", *STATISTICS))
    wanted = exact(of, *setting)
    found, stock = (outputs(f.apply, of, given, kind == "autocast") for f in (utils._ChunkedLogProbFunction, OWN))
    assert utils._ChunkedLogProbFunction is FusedLogProb
    assert found.keys() == wanted.keys()
    assert wanted["is_top1"].any()
    top1 = found.pop("is_top1"), stock["is_top1"]
    assert (top1[0] != wanted["is_top1"]).sum() <= (top1[1] != wanted["is_top1"]).sum()
    for name, x in found.items():
        ours, theirs = ((y - wanted[name]).norm() / wanted[name].norm() for y in (x, stock[name]))
        assert ours <= 2 * theirs + 1e-6, name


def test_only_what_is_asked_for():
    of = problem(torch.float32, False)
    made = FusedLogProb.apply(*of, 1.0, 64, None, 1.0, ("log_probs",))
    assert [x is None for x in made] == [False, True, True, True, True]


def test_a_head_that_is_taken_away_is_left_to_trl_and_said_once():
    of = problem(torch.float32, False)
    of[1].ds_id = 3
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made, _ = (FusedLogProb.apply(*of, 1.0, 64, None, 1.0, ("log_probs",)) for _ in range(2))
    assert ["ZeRO-3" in str(w.message) for w in said] == [True]
    assert torch.equal(made[0], OWN.apply(*of, 1.0, 64, None, 1.0, ("log_probs",))[0])


def test_patching_twice_and_unpatching():
    patch_trl()
    assert FusedLogProb.original is OWN
    unpatch("trl")
    assert utils._ChunkedLogProbFunction is OWN
    unpatch("trl")


def test_a_seam_that_has_moved_is_named(monkeypatch):
    unpatch("trl")

    class Moved:
        @staticmethod
        def forward(ctx, weight, hidden, targets): ...

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Moved)
    with pytest.raises(SeamError, match=r"trl\.trainer\.utils:_ChunkedLogProbFunction"):
        patch_trl()
    assert utils._ChunkedLogProbFunction is Moved


def test_importing_patches_nothing():
    code = "import trl.trainer.utils as u; own = u._ChunkedLogProbFunction\n"
    code += "import revisual_fast, revisual_fast.integrations, revisual_fast.integrations.trl\n"
    code += "assert u._ChunkedLogProbFunction is own"
    run_code(code)


def history(name: str, folder: Path) -> list[dict[str, float]]:
    """Three steps of a trainer of text."""
    import trl
    from datasets import Dataset

    words = " ".join(f"w{i % 50}" for i in range(14))
    rows = {"sft": {"text": words}, "dpo": {"prompt": "w1 w2", "chosen": " w3 w4 w5", "rejected": " w6 w7"}}
    rows |= {"rloo": {"prompt": "w1 w2 w3"}}
    trainer, config = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    }[name]
    more: dict[str, Any] = {"rloo": {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}}.get(name, {})
    common: dict[str, Any] = {"output_dir": str(folder), "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    common |= {"use_cpu": True, "bf16": False, "max_steps": 3, "logging_steps": 1, "optim": "sgd", "seed": 5}
    common |= {"per_device_train_batch_size": 4, "learning_rate": 0.02}
    model = build(tiny_config("qwen2"), 0.1)
    model.save_pretrained(folder / "model")
    model = type(model).from_pretrained(folder / "model")
    rewards = {"reward_funcs": lambda completions, **_: [float(len(set(c.split()))) for c in completions]}
    made = trainer(
        model=model,
        args=config(**common, **more),
        train_dataset=Dataset.from_list([rows[name]] * 8),
        processing_class=tokenizer(),
        **(rewards if name == "rloo" else {}),
    )
    made.train()
    return [{n: v for n, v in e.items() if "time" not in n and "second" not in n} for e in made.state.log_history]


@pytest.mark.parametrize("name", ["sft", "dpo", "rloo"])
def test_other_trainers(name, tmp_path):
    fast = history(name, tmp_path / "fast")
    unpatch("trl")
    stock = history(name, tmp_path / "stock")
    assert len(fast) == len(stock) == 4
    for ours, theirs in zip(fast, stock, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5, nan_ok=True)
