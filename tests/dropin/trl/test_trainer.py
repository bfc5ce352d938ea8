"""Three steps of TRL's trainer, stock and fast, on the same rollouts: losses, metrics and gradients."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from revisual_fast.integrations import SeamError, unpatch
from revisual_fast.integrations.trl import FastGRPOTrainer
from tests.dropin.trl.runs import Rollouts, Run, differences, train
from tests.models import TEXT, tiny_config

TOLERANCE = 1e-5


def both(
    tmp_path: Path, more: dict[str, Any] | None = None, ours: dict[str, Any] | None = None, **settings: Any
) -> tuple[Run, Run]:
    """(fast, stock), nothing of it left to TRL. ``more``: keywords of both constructors, ``ours``: of the fast one."""
    rollouts = Rollouts()
    stock = train(GRPOTrainer, tmp_path / "stock", rollouts, more=more, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FastGRPOTrainer leaves")
        fast = train(FastGRPOTrainer, tmp_path / "fast", rollouts, more={**(more or {}), **(ours or {})}, **settings)
    return fast, stock


def assert_equal(fast: Run, stock: Run) -> None:
    wrong = {name: error for name, error in differences(fast, stock).items() if not error <= TOLERANCE}
    assert not {n: e for n, e in wrong.items() if "per_second" not in n}


SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 0.02, "learning_rate": 5e-4}
ONE_PASS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "grpo, reference": {"loss_type": "grpo", "beta": 0.1},
    "grpo, corrected KL": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
    "gspo": {"loss_type": "grpo", **SEQUENCE},
    "gspo, corrected KL": {"loss_type": "grpo", **SEQUENCE, "beta": 0.1, "use_bias_correction_kl": True},
    "bnpo, delta": {"loss_type": "bnpo", "delta": 1.25},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon_high": 0.28},
    "dapo": {"loss_type": "dapo", "beta": 0.05},
    "dapo, sequence": {"loss_type": "dapo", **SEQUENCE},
    "luspo": {"loss_type": "luspo", **SEQUENCE, "learning_rate": 1e-4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.02},
    "sapo": {"loss_type": "sapo"},
    "sapo, sequence": {"loss_type": "sapo", **SEQUENCE},
    "truncated": {"loss_type": "dapo", "mask_truncated_completions": True},
    "no checkpointing": {"gradient_checkpointing": False},
}
"""Losses that are a PolicyObjective."""
INSIDE: dict[str, dict[str, Any]] = {
    "vespo": {"loss_type": "vespo"},
    "cispo, as grpo's range": {"loss_type": "cispo"},
    "entropy bonus": {"entropy_coef": 0.05, "loss_type": "grpo"},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 3.9, "entropy_coef_delta": 0.01},
    "entropy quantile": {"top_entropy_quantile": 0.4},
    "off-policy mask": {"off_policy_mask_threshold": 1e-3, "loss_type": "grpo"},
}
"""Losses that TRL's own code computes inside the fused loss."""


@pytest.mark.parametrize("name", [*ONE_PASS, *INSIDE])
def test_losses(tmp_path, name):
    settings = {**ONE_PASS, **INSIDE}[name]
    fast, stock = both(tmp_path, num_iterations=2, steps=4, **settings)
    assert (fast.trainer._objective is not None) == (name in ONE_PASS)
    assert_equal(fast, stock)


CORRECTIONS = [
    ("token_truncate", "dapo"),
    ("token_mask", "grpo"),
    ("sequence_truncate", "grpo"),
    ("sequence_mask", "dr_grpo"),
    ("token_truncate", "vespo"),
]


@pytest.mark.parametrize(("mode", "loss"), CORRECTIONS)
def test_an_engines_log_probs_are_corrected_for(tmp_path, mode, loss):
    settings = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.1, "loss_type": loss}
    fast, stock = both(tmp_path, engine=True, **settings)
    assert_equal(fast, stock)
    ratio = "sampling/importance_sampling_ratio/min"
    assert fast.metrics[ratio] != [1.0] * 3


@pytest.mark.parametrize("settings", [{"loss_type": "grpo"}, {"entropy_coef": 0.1}], ids=str)
def test_accumulation_deals_the_same_rows(tmp_path, settings):
    """In TRL's order everything is equal; in ours the steps' gradients are, where micro-batches may be dealt anew."""
    common = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, **settings}
    fast, stock = both(tmp_path / "a", ours={"keep_groups": False}, **common)
    assert_equal(fast, stock)
    fast, stock = both(tmp_path / "b", **common)
    found = differences(fast, stock)
    assert found["gradients"] <= TOLERANCE
    assert found["loss"] <= TOLERANCE


def test_groups_are_kept_together(tmp_path):
    """Three prompts in three micro-batches of four rows each: one prompt in each, its image encoded once."""
    seen: list[tuple[int, int]] = []

    class Counting(FastGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            before = self._given
            if before is None:
                scorer = self._scorer(model)
                pack = scorer.policy.pack

                def counted(groups: Any, *args: Any) -> Any:
                    batch = pack(groups, *args)
                    seen.append((len(groups), len(batch.image_keys)))
                    return batch

                scorer.policy.pack = counted  # type: ignore[method-assign]
                try:
                    return super()._compute_loss(model, inputs)
                finally:
                    del scorer.policy.pack
            return super()._compute_loss(model, inputs)

    train(Counting, tmp_path, Rollouts(), gradient_accumulation_steps=3, per_device_train_batch_size=4, steps=2)
    assert seen == [(1, 1)] * 6


def test_lora_with_the_base_model_as_reference(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    fast, stock = both(tmp_path, peft=config, beta=0.1, num_iterations=2, loss_type="grpo")
    assert_equal(fast, stock)
    assert all(".lora_" in name for name in fast.gradients[0])
    assert stock.metrics["kl"][0] > 1e-3


@pytest.mark.parametrize("family", TEXT)
def test_text_models(tmp_path, family):
    fast, stock = both(tmp_path, images=False, family=family, num_iterations=2)
    assert_equal(fast, stock)


def test_evaluation(tmp_path):
    from tests.dropin.trl.runs import dataset

    rollouts, found = Rollouts(), []
    for cls in (GRPOTrainer, FastGRPOTrainer):
        run = train(cls, tmp_path / cls.__name__, rollouts, steps=1, per_device_eval_batch_size=8)
        metrics = run.trainer.evaluate(dataset(images=True, n=2))
        found.append({n: v for n, v in metrics.items() if "second" not in n and "runtime" not in n})
    assert found[0].keys() == found[1].keys()
    assert found[1] == pytest.approx(found[0], rel=TOLERANCE, abs=1e-7, nan_ok=True)


def test_tokens_of_a_tool_are_not_trained_on(tmp_path):
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        rows = [[20 + (3 * i + j) % 30 for j in range(3 + i % 6)] for i in range(len(prompts))]
        masks = [[0 if j in (1, 2) else 1 for j in range(len(row))] for row in rows]
        return {"prompt_ids": [[2, 30, 31, 3]] * len(rows), "completion_ids": rows, "logprobs": None, "env_mask": masks}

    fast, stock = both(tmp_path, images=False, more={"rollout_func": rollout}, num_iterations=2)
    assert_equal(fast, stock)
    assert fast.metrics["clip_ratio/region_mean"]


def test_mixed_precision_is_as_near_to_fp32_as_trls(tmp_path):
    rollouts = Rollouts()
    exact = train(GRPOTrainer, tmp_path / "exact", rollouts, steps=1)
    stock, fast = (
        train(c, tmp_path / c.__name__, rollouts, steps=1, bf16=True) for c in (GRPOTrainer, FastGRPOTrainer)
    )

    def distance(run: Run) -> float:
        pairs = [(run.gradients[0][n], g) for n, g in exact.gradients[0].items()]
        return float(sum((a - b).norm() ** 2 for a, b in pairs) ** 0.5)

    assert 0 < distance(fast) <= 1.2 * distance(stock)
    assert abs(fast.losses[0] - exact.losses[0]) <= 1.2 * abs(stock.losses[0] - exact.losses[0]) + 1e-6


def test_what_cannot_be_packed_is_trls_and_said_once(tmp_path):
    from transformers import MistralConfig

    config = MistralConfig(**{**tiny_config("qwen2").to_dict(), "model_type": "mistral", "sliding_window": 4096})
    rollouts = Rollouts()
    stock = train(GRPOTrainer, tmp_path / "a", rollouts, images=False, config=config)
    with pytest.warns(UserWarning, match="FastGRPOTrainer leaves this to TRL: model_type 'mi") as said:
        fast = train(FastGRPOTrainer, tmp_path / "b", rollouts, images=False, config=config)
    assert len([w for w in said if "leaves this to TRL" in str(w.message)]) == 1
    assert all(torch.equal(fast.weights[n], w) for n, w in stock.weights.items())


def test_a_model_that_was_given_back_trains_as_trls(tmp_path):
    rollouts = Rollouts()
    stock = train(GRPOTrainer, tmp_path / "a", rollouts, steps=1)
    fast = train(FastGRPOTrainer, tmp_path / "b", rollouts, steps=1, more={"keep_groups": False})
    unpatch("trl")
    kept = {n for n, m in fast.trainer.model.named_modules() if "forward" in vars(m)}
    assert kept == {n for n, m in stock.trainer.model.named_modules() if "forward" in vars(m)}
    fast.trainer.model.load_state_dict(stock.trainer.model.state_dict())
    found = []
    for run in (fast, stock):
        run.trainer.model.zero_grad()
        loss = run.trainer.compute_loss(run.trainer.model, run.trainer._buffered_inputs[0])
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in run.trainer.model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_seam_that_has_moved_is_named(tmp_path, monkeypatch):
    def moved(self: Any, model: Any, ids: Any) -> None: ...

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", moved)
    with pytest.raises(SeamError, match=r"GRPOTrainer\._get_per_token_logps_and_entropies takes"):
        train(FastGRPOTrainer, tmp_path, Rollouts())


@pytest.mark.parametrize("changed", [lambda loss: 1.01 * loss, lambda loss: loss + 0.1], ids=["gradient", "value"])
def test_another_loss_than_the_one_known_is_an_error(tmp_path, monkeypatch, changed):
    own = GRPOTrainer._compute_loss
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: changed(own(self, model, inputs)))
    with pytest.raises(SeamError, match="_compute_loss of this TRL is another loss"):
        train(FastGRPOTrainer, tmp_path, Rollouts())
    train(FastGRPOTrainer, tmp_path, Rollouts(), steps=1, loss_type="vespo")  # TRL's own code, whatever it is
