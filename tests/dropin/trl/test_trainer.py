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
    "vespo": {"loss_type": "vespo", "learning_rate": 5e-4},
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


def of_a_tool(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Rollouts whose second and third tokens are those of a tool."""
    rows = [[20 + (3 * i + j) % 30 for j in range(3 + i % 6)] for i in range(len(prompts))]
    masks = [[0 if j in (1, 2) else 1 for j in range(len(row))] for row in rows]
    return {"prompt_ids": [[2, 30, 31, 3]] * len(rows), "completion_ids": rows, "logprobs": None, "env_mask": masks}


def test_tokens_of_a_tool_are_not_trained_on(tmp_path):
    fast, stock = both(tmp_path, images=False, more={"rollout_func": of_a_tool}, num_iterations=2)
    assert_equal(fast, stock)
    assert fast.metrics["clip_ratio/region_mean"]


@pytest.mark.parametrize("settings", [{"entropy_coef": 0.1}, {"off_policy_mask_threshold": 1.0}], ids=str)
def test_tokens_that_are_not_trained_on_do_not_make_nan_of_trls_own_loss(tmp_path, settings):
    """Where their old log-probs are far below what has an exponential."""
    more = {"rollout_func": of_a_tool}
    fast, stock = both(
        tmp_path, images=False, more=more, num_iterations=2, temperature=0.02, learning_rate=0.0, **settings
    )
    assert not any(v != v for values in fast.metrics.values() for v in values)
    assert_equal(fast, stock)


def test_a_micro_batch_of_truncated_completions(tmp_path):
    """Nothing to train on in some micro-batches: 0, and no warning."""
    rollouts = Rollouts()
    for cls in (GRPOTrainer, FastGRPOTrainer):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="FastGRPOTrainer leaves")
            run = train(
                cls,
                tmp_path / cls.__name__,
                rollouts,
                mask_truncated_completions=True,
                num_iterations=2,
                end=lambda turn, i: 1 if turn else 20,
                steps=4,
            )
        if cls is GRPOTrainer:
            stock = run
    assert stock.losses[:2] == run.losses[:2] == [0, 0]
    run.gradients, stock.gradients = run.gradients[2:], stock.gradients[2:]
    assert_equal(run, stock)


@pytest.mark.parametrize("name", ["beta", "epsilon_high", "loss_type"])
def test_a_setting_that_changes_on_the_way(tmp_path, name):
    def scheduled(cls: type) -> type:
        class Scheduled(cls):
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                if self.state.global_step == 1:
                    setattr(self, name, {"beta": 0.5, "epsilon_high": 0.01, "loss_type": "vespo"}[name])
                return super().training_step(*args, **kwargs)

        return Scheduled

    settings = {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "learning_rate": 0.002}
    rollouts = Rollouts()
    stock = train(scheduled(GRPOTrainer), tmp_path / "a", rollouts, **settings)
    fast = train(scheduled(FastGRPOTrainer), tmp_path / "b", rollouts, **settings)
    assert_equal(fast, stock)


def test_an_adapter_with_a_copy_as_reference(tmp_path):
    from peft import LoraConfig, get_peft_model

    from tests.dropin.trl.runs import loaded, saved

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    path, rollouts, runs = saved(tiny_config("qwen2_5_vl"), tmp_path), Rollouts(), []
    for cls in (GRPOTrainer, FastGRPOTrainer):
        torch.manual_seed(1)
        model = get_peft_model(loaded(path), config)
        runs.append(train(cls, tmp_path / cls.__name__, rollouts, model=model, beta=0.1, num_iterations=2))
    assert "ref" in runs[1].trainer.model.peft_config
    assert_equal(runs[1], runs[0])


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
    with pytest.warns(RuntimeWarning, match="FastGRPOTrainer leaves this to TRL: model_type 'mi") as said:
        fast = train(FastGRPOTrainer, tmp_path / "b", rollouts, images=False, config=config)
    assert len([w for w in said if "leaves this to TRL" in str(w.message)]) == 1
    assert all(torch.equal(fast.weights[n], w) for n, w in stock.weights.items())


def listened_to(model: Any) -> Any:
    """Halves what a vision-language model's two towers have made."""

    def halve(module: Any, given: Any, out: Any) -> Any:
        out.last_hidden_state = out.last_hidden_state / 2
        return out

    model.model.register_forward_hook(halve)
    return model


@pytest.mark.parametrize("why", ["a hook", "NEFTune", "image tokens"])
def test_what_a_packed_pass_would_get_wrong_is_trls(tmp_path, why):
    from tests.dropin.trl.runs import loaded, saved

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        rows = [[20 + (3 * i + j) % 30 for j in range(3 + i % 6)] for i in range(len(prompts))]
        return {"prompt_ids": [[2, 5, 31, 3]] * len(rows), "completion_ids": rows, "logprobs": None}

    path, rollouts, runs = saved(tiny_config("qwen2_5_vl"), tmp_path), Rollouts(), []
    said = {"a hook": "listens to", "NEFTune": "NEFTune", "image tokens": "1 image tokens, and its images give 0"}[why]
    for cls in (GRPOTrainer, FastGRPOTrainer):
        model = listened_to(loaded(path)) if why == "a hook" else loaded(path)
        settings: dict[str, Any] = {"neftune_noise_alpha": 5.0} if why == "NEFTune" else {}
        settings |= {"more": {"rollout_func": rollout}, "images": False} if why == "image tokens" else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runs.append(train(cls, tmp_path / cls.__name__, rollouts, model=model, ours_order=False, **settings))
        assert sum(said in str(w.message) for w in caught) == (cls is FastGRPOTrainer)
    assert all(torch.equal(runs[1].weights[n], w) for n, w in runs[0].weights.items())


def test_two_trainers_of_one_model(tmp_path):
    """Each gives back what is its own."""
    from tests.dropin.trl.runs import loaded, saved

    model, rollouts = loaded(saved(tiny_config("qwen2_5_vl"), tmp_path)), Rollouts()
    own = {n: vars(m).get("forward") for n, m in model.named_modules()}
    first = train(FastGRPOTrainer, tmp_path / "a", rollouts, model=model, steps=1)
    second = train(FastGRPOTrainer, tmp_path / "b", rollouts, model=model, steps=1)
    first.trainer.release()
    second.trainer.compute_loss(second.trainer.model, second.trainer._buffered_inputs[0]).backward()
    second.trainer.release()
    changed = {n for n, m in model.named_modules() if vars(m).get("forward") is not own[n]}
    assert changed == {""}  # the second trainer's fused head, with ours in it, which has nothing more to do
    assert not any(x.borrowers for n, x in vars(model).items() if n.startswith("_revisual"))


def test_a_wrapper_that_came_later_stays(tmp_path):
    """accelerate's, for mixed precision: it goes on to call the model's own forward."""
    mixed = train(FastGRPOTrainer, tmp_path, Rollouts(), steps=1, bf16=True)
    model = mixed.trainer.model
    wrapper = vars(model)["forward"]
    mixed.trainer.release()
    assert vars(model)["forward"] is wrapper
    ids = torch.arange(20, 26)[None]
    assert model(input_ids=ids).logits.dtype == torch.float32
    with pytest.raises(ValueError, match="given back"):
        model(revisual_fast_work=lambda: None)


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
    with pytest.raises(SeamError, match="_compute_loss of this TRL, or of a subclass, is another loss"):
        train(FastGRPOTrainer, tmp_path, Rollouts())
    train(FastGRPOTrainer, tmp_path, Rollouts(), steps=1, loss_type="vespo")  # TRL's own code, whatever it is
