"""What a stage computes, what it leaves out, and what it does when something goes wrong."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from revisual_fast.config_file import load_config
from revisual_fast.curriculum import Curriculum, train
from revisual_fast.kernels import plan
from revisual_fast.packing import activation_bytes
from revisual_fast.rewards import RewardTable
from revisual_fast.stages import updates
from revisual_fast.stages.grpo import GRPOStage
from revisual_fast.stages.stage import NonFiniteError, Stage, Stopwatch
from revisual_fast.stages.updates import entropy_coefficient
from revisual_fast.telemetry import read_jsonl
from tests.integration.conftest import write_small_run
from tests.models import build, tiny_config


def build_stage(config_path: Path, name: str, *overrides: str) -> Stage:
    curriculum = Curriculum(
        load_config(config_path, [f"curriculum=[{name}]", *overrides]), resume=False, overwrite=True
    )
    curriculum.start()
    return curriculum.build_stage(name)


def copies(stage: Stage, *, vision: bool) -> dict[str, torch.Tensor]:
    is_vision = stage.policy.family.is_vision
    return {n: p.detach().clone() for n, p in stage.policy.model.named_parameters() if is_vision(n) == vision}


@pytest.mark.parametrize("name", ["warm", "rl"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_does_not_move_and_an_unfrozen_one_does(small_run, name, frozen):
    stage = build_stage(
        small_run,
        name,
        f"stages.{name}.freeze_vision={str(frozen).lower()}",
        "stages.warm.data=[digits]",
        'data.digits.response="{response}"',
    )
    tower, rest = copies(stage, vision=True), copies(stage, vision=False)
    assert len(tower) > 10, "the model has a vision tower"
    for _ in range(2):
        stage.run_step()
        now = copies(stage, vision=True)
        moved = [n for n in tower if not torch.equal(tower[n], now[n])]
        assert not moved if frozen else len(moved) > len(tower) // 2
    assert any(not torch.equal(rest[n], after) for n, after in copies(stage, vision=False).items())
    trained = set(stage.optimizer.parameters)
    assert trained.isdisjoint(tower) if frozen else trained >= tower.keys()


def capture_gradients(stage: Stage) -> list[dict[str, torch.Tensor]]:
    """Gradients of every update from now on; the weights stay as they are."""
    seen: list[dict[str, torch.Tensor]] = []

    def record(factor: float) -> float:
        seen.append({n: p.grad.clone() for n, p in stage.optimizer.parameters.items() if p.grad is not None})
        stage.optimizer.zero_grad()
        return 1.0

    stage.optimizer.step = record  # type: ignore[method-assign]
    return seen


ON_POLICY = ("stages.rl.update_batch=null", "stages.rl.objective.kl_coef=0", "stages.rl.entropy.start=0")


def test_the_gradient_is_that_of_grpo_written_out(small_run, tiny_vl, monkeypatch):
    """Against transformers' plain forward, one sequence at a time: -sum A logp / (S n_s)."""
    stage = build_stage(small_run, "rl", *ON_POLICY, "stages.rl.sampling.temperature=0.7")
    assert isinstance(stage, GRPOStage)
    gradients, kept = capture_gradients(stage), []
    select = stage._select
    monkeypatch.setattr(stage, "_select", lambda *a: kept.append(select(*a)) or kept[-1])
    stage.run_step()
    (sequences, _), (got,) = kept[0], gradients
    assert len({s.advantage for s in sequences}) > 2
    model = AutoModelForImageTextToText.from_pretrained(tiny_vl, dtype=torch.float32)
    for s in sequences:
        prompt, ids = s.example.prompt, torch.cat([s.example.prompt.ids, s.rollout.ids])[None]
        family = stage.policy.family
        types = (ids == family.image_token_id).int()
        types[:, len(prompt.ids) :] = 0
        embeds = model.get_input_embeddings()(ids)
        features = model.model.visual(prompt.pixel_values, grid_thw=prompt.grids).pooler_output
        embeds = embeds.masked_scatter((types == 1)[..., None].expand_as(embeds), features)
        top = family.positions(prompt.ids, prompt.grids)
        after = int(top.max()) + 1 + torch.arange(len(s.rollout.ids)).expand(3, -1)
        out = model.model.language_model(inputs_embeds=embeds, position_ids=torch.cat([top, after], 1)[:, None])
        logits = model.lm_head(out.last_hidden_state)[0, len(prompt.ids) - 1 : -1] / 0.7
        logp = logits.log_softmax(-1).gather(1, s.rollout.ids[:, None])
        (-s.advantage * logp.sum() / (len(sequences) * len(s.rollout.ids))).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                got[name], parameter.grad, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", ["warm", "rl"])
def test_neither_micro_batches_nor_the_layout_change_the_gradient(small_run, name):
    results = []
    for budget, layout in ((32, "shared"), (100000, "shared"), (100, "varlen")):
        settings = [f"train.micro_batch_tokens={budget}", f"train.layout={layout}", "stages.rl.update_batch=null"]
        stage = build_stage(small_run, name, *settings)
        gradients = capture_gradients(stage)
        stage.run_step()
        results.append(gradients[0])
    for n, gradient in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(gradient, other[n], rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


def test_a_micro_batch_above_the_budget_is_told_once(small_run, capsys):
    stage = build_stage(small_run, "warm", "train.micro_batch_tokens=5")
    for _ in range(2):
        stage.run_step()
    told = [line for line in capsys.readouterr().out.splitlines() if "train.micro_batch_tokens (5)" in line]
    assert len(told) >= 1
    assert len(set(told)) == len(told), "again only for a larger one"


@pytest.mark.parametrize(("mib", "frozen"), [(64, True), (0, True), (64, False)])
def test_a_stage_estimates_what_it_does(small_run, mib, frozen):
    settings = [f"model.vision_cache_mib={mib}", f"stages.rl.freeze_vision={str(frozen).lower()}"]
    stage = build_stage(small_run, "rl", *settings)
    assert stage.policy.images.capacity == mib * 2**20
    assert stage.cost.vision_cached == (frozen and mib > 0)
    assert stage.cost.vision_trained == (not frozen)
    wanted = activation_bytes(
        stage.policy.family.shape,
        dtype_bytes=4,
        attention="sdpa",
        vision_trained=not frozen,
        chunk_bytes=plan.CHUNK_BYTES["cpu"],
    )
    assert stage.activations == wanted


def test_gradient_checkpointing_recomputes_and_does_not_change_the_gradient(small_run):
    results, runs = [], []
    for on in ("false", "true"):
        stage = build_stage(small_run, "rl", "stages.rl.update_batch=null", f"model.gradient_checkpointing={on}")
        layer = stage.policy.family.text.layers[0].self_attn
        counter = []
        layer.register_forward_pre_hook(lambda *_, c=counter: c.append(1))
        gradients = capture_gradients(stage)
        stage.run_step()
        results.append(gradients[0])
        runs.append(len(counter))
    assert runs[1] > runs[0], "the layers ran again in the backward pass"
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_nothing_is_computed_that_cannot_change_the_gradient(small_run, monkeypatch):
    """On-policy and without KL: no old and no reference log-probs, no reference model, no zero-advantage sequence."""
    stage = build_stage(small_run, "rl", *ON_POLICY, "stages.rl.pad.mode=off")
    assert isinstance(stage, GRPOStage)
    assert stage.reference is None
    monkeypatch.setattr(updates, "linear_logprob", lambda *a, **k: pytest.fail("a log-prob pass was run"))
    packed = []
    pack = stage.policy.pack
    monkeypatch.setattr(stage.policy, "pack", lambda groups, *a: packed.extend(groups) or pack(groups, *a))
    monkeypatch.setattr(stage.collector, "rewards", OnlyTheFirstIsRight())
    metrics = stage.step(Stopwatch(stage.context.progress))
    in_prefill = len([g for g in packed if not g.completions])
    trained = [g for g in packed if g.completions]
    assert in_prefill == 4
    assert metrics["reward/accuracy"] == pytest.approx(1 / 16)
    assert [len(g.completions) for g in trained] == [4], "three of the four groups have equal rewards"


class OnlyTheFirstIsRight:
    """Rewards: 1 for the first completion of the first group."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list) -> RewardTable:
        accuracy = torch.zeros(len(completions))
        accuracy[0] = float(self.calls == 0)
        self.calls += 1
        return RewardTable({"accuracy": accuracy}, accuracy, accuracy)


def test_later_updates_of_a_step_use_the_log_probs_from_its_start(small_run, monkeypatch):
    stage = build_stage(small_run, "rl", "stages.rl.optimizer.lr=1e-2")
    seen = []
    tokens = stage._tokens
    monkeypatch.setattr(stage, "_tokens", lambda m, b: seen.append((stage.updates, tokens(m, b))) or seen[-1][1])
    metrics = stage.run_step()
    first = [t for u, t in seen if u == 0]
    second = [t for u, t in seen if u == 1]
    assert first
    assert second
    assert all(t.old_logp is None for t in first)
    assert all(t.old_logp is not None for t in second)
    assert all(t.ref_logp is not None for _, t in seen)
    assert metrics["policy/ratio/max"] > 1.0001, "the policy has moved between the two updates"


def test_an_empty_effective_set_is_no_update_and_is_counted(small_run):
    stage = build_stage(small_run, "rl", "stages.rl.pad.t_low=1e9")
    before = copies(stage, vision=False)
    metrics = stage.run_step()
    assert metrics["updates/skipped"] == 2
    assert all(torch.equal(before[n], p) for n, p in copies(stage, vision=False).items())


def test_non_finite_gradients_are_skipped_then_stop_the_run(small_run, tmp_path, monkeypatch):
    config = load_config(small_run, ["train.max_nonfinite=2", "curriculum=[rl]", "stages.rl.update_batch=null"])
    original = updates.linear_policy_loss
    calls = []

    def poisoned(*args, **kwargs):
        out = original(*args, **kwargs)
        calls.append(1)
        object.__setattr__(out, "loss", out.loss * (float("nan") if stepped() >= 2 else 1.0))
        return out

    def stepped() -> int:
        return len(read_jsonl(tmp_path / "run" / "metrics.jsonl"))

    monkeypatch.setattr(updates, "linear_policy_loss", poisoned)
    with pytest.raises(NonFiniteError, match="2 updates in a row") as error:
        train(config)
    assert "step-00000002" in str(error.value), "the last good checkpoint is named"
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["updates/skipped"] for row in rows] == [0, 0, 1]
    weights = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/checkpoints/step-00000002/model").state_dict()
    assert all(torch.isfinite(w).all() for w in weights.values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.rl.rewards.formt={}", "stages.rl.rewards.formt: there is no built-in reward of this name"),
        ("stages.rl.rewards.mine.function=rewards.py:scor", "stages.rl.rewards.mine.function"),
        ("stages.rl.rewards.length={}", "budget"),
        ("data.digits.args={sise: 64}", "data.digits.args"),
        ("model.device=gpu", "model.device: 'gpu' is no device"),
        ("model.path=no/such/model", "model.path: there is no directory no/such/model"),
        ("model.attention=varlen", "model.attention: varlen is made for CUDA, the model is on cpu; set it to auto"),
    ],
)
def test_a_mistake_in_a_later_stage_stops_the_run_before_it_starts(small_run, tmp_path, override, message):
    with pytest.raises(ValueError) as error:
        train(load_config(small_run, [override]))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_overwritten_only_by_one_that_starts(small_run, tmp_path):
    old = tmp_path / "run"
    old.mkdir()
    (old / "run.json").write_text("{}")
    (old / "precious").touch()
    with pytest.raises(ValueError, match=r"model\.device"):
        train(load_config(small_run, ["model.device=gpu"]), overwrite=True)
    assert sorted(p.name for p in old.iterdir()) == ["precious", "run.json"]
    train(load_config(small_run, ["train.max_steps=1", "curriculum=[warm]"]), overwrite=True)
    assert not (old / "precious").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".overwritten")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["curriculum=[rl, warm]"], "has gone through"),
        (["run.seed=9"], "cannot change run.seed (3 -> 9)"),
        (["data.text.args.size=32"], "cannot change data.text.args.size"),
        (["model.dtype=bfloat16"], "cannot change model.dtype"),
        (["stages.warm.steps=9"], "stage warm is finished"),
        (["train.max_steps=2"], "stage warm is finished"),
    ],
)
def test_resume_refuses_what_would_make_it_another_run(small_run, changes, message):
    train(load_config(small_run, ["curriculum=[warm]", "train.max_steps=1"]))
    with pytest.raises(ValueError) as error:
        train(load_config(small_run, ["train.max_steps=1", *changes]), resume=True)
    assert message in str(error.value)


def test_a_curriculum_can_be_continued_by_another_stage(small_run, tmp_path):
    train(load_config(small_run, ["curriculum=[warm]", "train.max_steps=1"]))
    train(load_config(small_run, ["train.max_steps=1"]), resume=True)
    assert [row["stage"] for row in read_jsonl(tmp_path / "run/metrics.jsonl")] == ["warm", "rl"]


def test_a_bad_record_found_late_saves_the_run_and_can_be_repaired(small_run, tmp_path):
    """Limits are only known when a record is drawn: the message names file and line, nothing that was done is lost."""
    data = tmp_path / "data.jsonl"
    lines = ['{"problem": "1 + 1 = ?", "answer": "2", "response": "<think>1 + 1 = 2</think>"}'] * 12
    broken = list(lines)
    broken[7] = lines[0].replace("1 = 2", "1 = 2; " * 40)
    overrides = [
        "curriculum=[warm]",
        "stages.warm.max_length=64",
        "stages.warm.batch_size=2",
        "stages.warm.steps=6",
        f"data.text={{path: {data}, response: '{{response}}', verifier: number}}",
        "evaluation.every=null",
    ]
    data.write_text("\n".join(broken))
    with pytest.raises(ValueError, match=r"data\.jsonl:8: response over the limit") as error:
        train(load_config(small_run, overrides))
    assert "continue with --resume" in str(error.value)
    data.write_text("\n".join(lines))
    train(load_config(small_run, overrides), resume=True)
    assert [row["step"] for row in read_jsonl(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_every_stage_result_loads_with_transformers(small_run, tmp_path):
    train(load_config(small_run, ["train.max_steps=1"]))
    for name in ("warm", "rl"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/models" / name)
        assert model.config.model_type == "qwen2_5_vl"


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_a_text_only_model_goes_through_both_kinds_of_stage(tmp_path, tiny_vl, model_type):
    sizes = tiny_config(model_type)
    sizes.vocab_size = 128  # of the tokenizer
    model = build(sizes, std=0.1)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(tmp_path / "text")
    AutoTokenizer.from_pretrained(tiny_vl).save_pretrained(tmp_path / "text")
    frozen = ["stages.rl.data=[text]", "evaluation={}", "stages.rl.freeze_vision=true"]
    with pytest.raises(ValueError, match=r"stages\.rl\.freeze_vision: this model has no vision tower; set it to false"):
        train(load_config(write_small_run(tmp_path, tmp_path / "text"), frozen))
    assert not (tmp_path / "run").exists()
    text_only = ["stages.rl.data=[text]", "evaluation={}", "train.max_steps=2", "stages.rl.freeze_vision=false"]
    config = load_config(write_small_run(tmp_path, tmp_path / "text"), text_only)
    train(config)
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("warm", 1), ("warm", 2), ("rl", 1), ("rl", 2)]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/models/rl")
    moved = [not torch.equal(p, dict(model.named_parameters())[n]) for n, p in loaded.named_parameters()]
    assert all(moved)


def test_lora_trains_only_adapters_and_exports_a_whole_model(small_run, tmp_path, tiny_vl):
    pytest.importorskip("peft")
    overrides = [
        "model.lora={rank: 4}",
        "stages.rl.freeze_vision=true",
        "stages.rl.optimizer.lr=1e-2",
        "curriculum=[rl]",
    ]
    train(load_config(small_run, overrides))
    before = AutoModelForImageTextToText.from_pretrained(tiny_vl).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/models/rl").state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved
    assert all(".language_model." in n and n.endswith("_proj.weight") for n in moved)


def test_lora_dropout_does_not_blur_the_ratio(small_run):
    """With weights that do not move, every log-prob of the second update equals the one from the step's start."""
    pytest.importorskip("peft")
    stage = build_stage(small_run, "rl", "model.lora={rank: 4, dropout: 0.5}", "stages.rl.optimizer.lr=1e-20")
    for name, parameter in stage.policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    metrics = stage.run_step()
    assert metrics["policy/ratio/max"] == pytest.approx(1.0, abs=1e-5)


def test_bf16_training_moves_weights_by_less_than_their_resolution(small_run):
    """The fp32 master copy collects updates that bf16 alone would round away."""
    stage = build_stage(
        small_run, "warm", "model.dtype=bfloat16", "stages.warm.optimizer.lr=1e-6", "stages.warm.steps=6"
    )
    masters = {n: m.detach().clone() for n, m in stage.optimizer.masters.items()}
    stage.run_step()
    moved = [(stage.optimizer.masters[n] - m).abs().max() for n, m in masters.items()]
    assert max(moved) > 0
    assert all(p.dtype == torch.bfloat16 for p in stage.optimizer.parameters.values())
    name = next(n for n in masters if n.endswith("embed_tokens.weight"))
    expected = stage.optimizer.masters[name].to(torch.bfloat16)
    assert torch.equal(stage.optimizer.parameters[name], expected)


def test_the_entropy_coefficient_follows_its_schedule():
    from revisual_fast.config import EntropyConfig

    config = EntropyConfig(start=0.02, warmup=140, decay=0.985, floor=0.001)
    assert entropy_coefficient(config, 139) == 0
    assert entropy_coefficient(config, 140) == 0.02
    assert entropy_coefficient(config, 150) == pytest.approx(0.02 * 0.985**10)
    assert entropy_coefficient(config, 10_000) == 0.001
