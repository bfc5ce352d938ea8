"""What a stage makes of an engine whose weights and log-probs are not its own."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from revisual_fast.config_file import load_config
from revisual_fast.curriculum import Curriculum, train
from revisual_fast.policy.model import Policy
from revisual_fast.rewards import RewardTable
from revisual_fast.rollout import build as build_module
from revisual_fast.rollout.build import EngineRoom, engine_settings
from revisual_fast.rollout.engine import RequestError
from revisual_fast.stages import updates
from revisual_fast.telemetry import read_jsonl
from tests.engines import CopyEngine
from tests.integration.test_resume import assert_continues_exactly, assert_same_run, train_and_stop
from tests.integration.test_stages import ON_POLICY, build_stage, capture_gradients

AHEAD = ["rollout.engine=vllm", "rollout.async=one_step", "stages.rl.objective.rollout_correction=truncate"]


@pytest.fixture
def copying(monkeypatch) -> list[CopyEngine]:
    """Every engine is a copying one; those that were made."""
    made: list[CopyEngine] = []

    def vllm(room: EngineRoom, policy: Policy) -> CopyEngine:
        made.append(CopyEngine(room.processor.eos_token_ids))
        return made[-1]

    monkeypatch.setattr(build_module, "pick_engine", lambda config, device: ("vllm", "for the test"))
    monkeypatch.setattr(EngineRoom, "_vllm", vllm)
    return made


def shifted(engine: CopyEngine, by: float) -> CopyEngine:
    """An engine that says it had sampled with log-probs which are lower ``by`` so much."""
    generate = engine.generate

    def tell(*arguments):
        return [[replace(r, logp=r.logp - by) for r in group] for group in generate(*arguments)]

    engine.generate = tell  # type: ignore[method-assign]
    return engine


def gradients(small_run: Path, shift: float, *overrides: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Of the first update of a step, and its metrics."""
    stage = build_stage(small_run, "rl", *ON_POLICY, *overrides)
    session = stage.collector.session
    session.engine = shifted(CopyEngine(stage.processor.eos_token_ids), shift)
    seen = capture_gradients(stage)
    metrics = stage.run_step()
    return seen[0], metrics


def assert_scaled(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], factor: float) -> None:
    for name, gradient in one.items():
        error = float((gradient * factor - other[name]).norm() / other[name].norm().clamp(min=1e-12))
        assert error < 1e-4, f"{name}: off by {error:.1e} of its norm"


def test_the_distance_to_the_engine_is_measured(small_run):
    _, same = gradients(small_run, 0.0)
    assert abs(same["mismatch/mean"]) < 1e-5, "fp32: decoding and the packed forward pass differ by rounding"
    assert same["mismatch/max"] < 1e-3
    assert same["mismatch/kl"] < 1e-6
    _, lower = gradients(small_run, 0.5)
    assert lower["mismatch/mean"] == pytest.approx(0.5, abs=1e-4)
    assert lower["mismatch/kl"] == pytest.approx(math.exp(0.5) - 1.5, rel=1e-3)


def test_the_rollout_correction_weighs_by_trainer_over_engine(small_run):
    """A shift of -0.5 in all of the engine's log-probs is a weight of exp(0.5) = 1.65 for every token."""
    plain, _ = gradients(small_run, 0.5)
    truncate = "stages.rl.objective.rollout_correction=truncate"
    weighted, _ = gradients(small_run, 0.5, truncate)
    assert_scaled(plain, weighted, 1.6487213)
    capped, _ = gradients(small_run, 0.5, truncate, "stages.rl.objective.rollout_cap=1.25")
    assert_scaled(plain, capped, 1.25)
    dropped, _ = gradients(
        small_run, 0.5, "stages.rl.objective.rollout_correction=mask", "stages.rl.objective.rollout_cap=1.25"
    )
    assert all(not gradient.any() for gradient in dropped.values())


def test_the_engines_log_probs_as_the_old_policy_need_no_pass(small_run, monkeypatch):
    """Ratio exp(0.1) in the first update already; below the clip the gradient is scaled by it."""
    monkeypatch.setattr(updates, "linear_logprob", lambda *a, **k: pytest.fail("a log-prob pass was run"))
    plain, _ = gradients(small_run, 0.0)
    off, metrics = gradients(
        small_run,
        0.1,
        "stages.rl.old_logp=engine",
        "stages.rl.objective.clip_high=9.0",
        "stages.rl.objective.clip_low=9.0",
    )
    assert_scaled(plain, off, 1.1051709)
    assert metrics["policy/ratio/max"] == pytest.approx(1.1051709, rel=1e-3)


def test_later_updates_take_the_engines_log_probs_too(small_run, monkeypatch):
    monkeypatch.setattr(updates, "linear_logprob", lambda *a, **k: pytest.fail("a log-prob pass was run"))
    stage = build_stage(
        small_run, "rl", "stages.rl.old_logp=engine", "stages.rl.objective.kl_coef=0", "stages.rl.update_batch=2"
    )
    tokens, seen = stage._tokens, []
    monkeypatch.setattr(stage, "_tokens", lambda m, b: seen.append((m, tokens(m, b))) or seen[-1][1])
    stage.run_step()
    assert len(seen) > 1
    for members, batch in seen:
        assert torch.equal(batch.old_logp, torch.cat([m.rollout.logp for m in members]))


def test_the_distance_is_measured_in_later_updates_before_they_train(small_run):
    """Two updates a step at a high learning rate: the second's old log-probs are still those of the engine."""
    stage = build_stage(small_run, "rl", "stages.rl.optimizer.lr=1e-2", "stages.rl.pad.mode=off")
    stage.collector.session.engine = shifted(CopyEngine(stage.processor.eos_token_ids), 0.5)
    metrics = stage.run_step()
    assert sum(len(d) for d in stage.differences) == 16 * 8, "every token of the step"
    assert metrics["mismatch/min"] == pytest.approx(0.5, abs=1e-3)
    assert metrics["mismatch/max"] == pytest.approx(0.5, abs=1e-3)


def test_a_resampled_step_trains_on_its_chosen_groups_and_reports_all(small_run, monkeypatch):
    """Groups 1, 3, 5 and 7 are right by turns; 0, 2, 4 and 6 are replaced."""
    stage = build_stage(small_run, "rl", *ON_POLICY, "stages.rl.pad.mode=off", "stages.rl.resample.tries=5")
    groups = []

    def score(completions) -> RewardTable:
        groups.append(completions[0].record)
        accuracy = torch.zeros(len(completions))
        accuracy[0] = float(len(groups) % 2 == 0)
        return RewardTable({"accuracy": accuracy}, accuracy, accuracy)

    monkeypatch.setattr(stage.collector, "rewards", score)
    trained = []
    active = stage._active
    monkeypatch.setattr(stage, "_active", lambda share, update: trained.extend(share) or active(share, update))
    metrics = stage.run_step()
    assert [s.example.record for s in trained[::4]] == groups[1::2]
    assert len({s.advantage for s in trained if s.advantage > 0}) == 1, "normalised within groups that differ"
    assert (metrics["resample/tries"], metrics["resample/groups"], metrics["resample/filled"]) == (3, 8, 0)
    assert metrics["reward/accuracy"] == pytest.approx(4 / 32), "of everything that was sampled"
    assert metrics["stagnation/accuracy"] == 0.5


def test_sampling_masks_are_replayed(small_run):
    """With them the trainer's log-probs are the engine's; without, it looks at ids that could not be sampled."""
    settings = ("stages.rl.sampling={top_p: 0.6, top_k: 6}",)
    _, replayed = gradients(small_run, 0.0, *settings)
    assert abs(replayed["mismatch/min"]) < 1e-3
    _, ignored = gradients(small_run, 0.0, "stages.rl.sampling={top_p: 0.6, top_k: 6, replay: ignore}")
    assert ignored["mismatch/mean"] < -0.1, "over the whole vocabulary every token is less likely"


@pytest.mark.parametrize("change", ["rollout.async=off", "stages.rl.group_size=2", "stages.rl.rollout_batch=2"])
def test_rollouts_that_were_made_with_other_settings_are_made_again(small_run, copying, change):
    """And their prompts are drawn again: no record is left out."""
    settings = [*AHEAD, "stages.rl.update_batch=2"]
    train_and_stop(load_config(small_run, settings), 2)
    resumed = Curriculum(load_config(small_run, [*settings, change]), resume=True, overwrite=False)
    resumed.start()
    stage = resumed.build_stage("rl")
    assert (stage.position, stage.collector.ahead) == (8, None), "two steps of four prompts"
    stage.run_step()


def test_the_batch_ahead_keeps_its_order_through_a_checkpoint(small_run, copying):
    """Where resampling has put a later group first."""
    config = load_config(small_run, [*AHEAD, "curriculum=[rl]", "stages.rl.resample.tries=3"])
    curriculum = Curriculum(config, resume=False, overwrite=True)
    curriculum.start()
    stage, calls = curriculum.build_stage("rl"), []

    def score(completions) -> RewardTable:
        calls.append(completions)
        accuracy = torch.zeros(len(completions))
        accuracy[0] = float(len(calls) % 2 == 0)
        return RewardTable({"accuracy": accuracy}, accuracy, accuracy)

    stage.collector.rewards = score
    stage.run_step()
    state, tensors = stage.saved()
    assert state["ahead"]["groups"] == [1, 3, 5, 7]
    expected = stage.collector.ahead.future.result()
    stage.collector.ahead = None
    stage.load_saved(state, tensors)
    restored = stage.collector.ahead.future.result()
    assert [g.example.record for g in restored.groups] == [g.example.record for g in expected.groups]
    assert len(restored.drawn) == 8


def test_an_engine_without_masks_is_refused(small_run):
    stage = build_stage(small_run, "rl", *ON_POLICY, "stages.rl.sampling.top_p=0.5")
    engine = CopyEngine(stage.processor.eos_token_ids)
    generate = engine.generate
    engine.generate = lambda *a: [[replace(r, mask=None) for r in g] for g in generate(*a)]  # type: ignore[method-assign]
    stage.collector.session.engine = engine
    with pytest.raises(RuntimeError, match=r"stages\.rl\.sampling: the engine did not say .* set replay to ignore"):
        stage.run_step()


def test_one_step_ahead_says_how_old_every_sample_is(small_run, tmp_path, copying):
    train(load_config(small_run, AHEAD))
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "rl"]
    assert [row["staleness/max"] for row in rows] == [0, 1, 1, 1]
    assert [row["staleness/mean"] for row in rows] == [0, 1, 1, 1]
    ages = [{c["staleness"] for c in row["completions"]} for row in read_jsonl(tmp_path / "run" / "samples.jsonl")]
    assert ages == [{0}, {1}, {1}, {1}]
    assert max(abs(row["mismatch/max"]) for row in rows[1:]) > 1e-3, "one step of training moves the log-probs"
    (engine,) = copying
    assert engine.calls[-1] == "close"


def test_a_run_that_is_one_step_ahead_continues_exactly(small_run, tmp_path, copying):
    """The batch under way is part of the checkpoint: weights to sample it again with are gone."""
    settings = [*AHEAD, "stages.rl.resample={tries: 1}", "stages.rl.sampling.top_k=9", "stages.rl.sampling.top_p=0.9"]
    settings += ["stages.rl.objective.kl_coef=0", "stages.rl.entropy.start=0"]
    assert_continues_exactly(small_run, tmp_path, settings)


def test_an_engine_that_gives_up_saves_the_run(small_run, tmp_path, copying, monkeypatch):
    generate, asked = CopyEngine.generate, []

    def failing(self, prompts, n, sampling, on_group=None):
        asked.append(sampling.temperature)
        if asked.count(1.0) == 3:
            raise RequestError(1, "no answer", 3)
        return generate(self, prompts, n, sampling, on_group)

    settings = ["rollout.engine=vllm"]
    with monkeypatch.context() as patched:
        patched.setattr(CopyEngine, "generate", failing)
        with pytest.raises(ValueError, match=r"no answer \(tried 3 times\)\nsaved .*step-00000005.*--resume"):
            train(load_config(small_run, settings))
    train(load_config(small_run, settings), resume=True)
    train(load_config(small_run, [*settings, f"run.dir={tmp_path / 'straight'}"]))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_the_engine_is_as_large_as_the_longest_prompt_and_response(small_run):
    config = load_config(small_run, ["stages.rl.max_prompt_tokens=100", "stages.warm.max_prompt_tokens=120"])
    of = {"model": "a/model", "eos_token_ids": (3, 5)}
    settings = engine_settings(config, torch.device("cpu"), images=2, longest=4096, **of)
    assert (settings.max_model_len, settings.images, settings.transfer) == (128, 2, "host")
    assert (settings.model, settings.eos_token_ids) == ("a/model", (3, 5))
    assert not settings.masks
    longer = load_config(small_run, ["stages.rl.max_prompt_tokens=100", "stages.rl.max_response_tokens=300"])
    assert engine_settings(longer, torch.device("cpu"), images=2, longest=4096, **of).max_model_len == 4096
    assert engine_settings(longer, torch.device("cpu"), images=2, longest=9999, **of).max_model_len == 8192 + 8
    masked = load_config(small_run, [*ON_POLICY, "stages.rl.sampling.top_k=3"])
    assert engine_settings(masked, torch.device("cpu"), images=0, longest=4096, **of).masks
