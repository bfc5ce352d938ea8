"""Configuration: what is read, what is refused, and what the message says."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from revisual_fast.advantages import group_advantages, pad_select
from revisual_fast.config import Config, GRPOConfig, ObjectiveConfig
from revisual_fast.config_file import ConfigError, load_config
from revisual_fast.losses import PRESETS, PolicyObjective

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = """
run: {dir: runs/x}
model: {path: somewhere}
data:
  text: {path: data/text.jsonl, response: "{solution}"}
stages:
  warm: {kind: sft, data: [text], steps: 3}
  rl: {kind: grpo, data: [text], steps: 3, rewards: {accuracy: {}, mine: {function: "rewards.py:score"}}}
curriculum: [warm, rl]
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.rl.optimzer.lr=1", "unknown key 'stages.rl.optimzer'; did you mean 'optimizer'?"),
        ("stages.rl.pad.t_hihg=1", "unknown key 'stages.rl.pad.t_hihg'; did you mean 't_high'?"),
        ("stages.warm.group_size=8", "unknown key 'stages.warm.group_size'"),
        ("model.lora.ranks=3", "unknown key 'model.lora.ranks'; did you mean 'rank'?"),
        ("trian.max_steps=3", "unknown key 'trian'; did you mean 'train'?"),
        ("stages.rl.optimizer.lr=-1", "stages.rl.optimizer.lr: Input should be greater than 0 (given: -1)"),
        ("stages.rl.group_size=1", "stages.rl.group_size: Input should be greater than or equal to 2 (given: 1)"),
        ("train.max_steps=many", "train.max_steps: Input should be a valid integer"),
        ("model.dtype=fp8", "model.dtype: Input should be 'float32' or 'bfloat16' (given: 'fp8')"),
        ("stages.rl.pad.mode=none", "'paper', 'released', 'filter', 'sample' or 'off' (given: 'none')"),
        ("model.trust_remote_code=true", "model.trust_remote_code: Input should be False (given: True)"),
        ("curriculum=[warm, lr]", "curriculum: 'lr' is not defined; did you mean 'rl'?"),
        ("stages.rl.data=[txt]", "stages.rl.data: 'txt' is not defined; did you mean 'text'?"),
        ("stages.rl.epochs=1", "give exactly one of steps, epochs"),
        ("stages.rl.update_batch=100", "update_batch 100 must divide rollout_batch 512"),
        ("stages.rl.rewards={format: {}}", "rewards needs a component named accuracy"),
        ("data.text.hub=openai/gsm8k", "give exactly one of path, hub, function"),
        ("data.text.response=null", "data.text.response must say what the target is"),
        ("model.path=null", "model: give path (a directory or hub id), init (tiny-vl, smollm2-vl) or both"),
        ("model={path: x, min_pixels: 9, max_pixels: 8}", "model: min_pixels 9 must be at most max_pixels 8"),
        ("stages.rl.pad.t_high=1e-5", "stages.rl.pad: t_low 0.0001 must be below t_high 1e-05"),
        ("stages.rl.pad.t_high=.nan", "stages.rl.pad.t_high: Input should be greater than 0 (given: nan)"),
        ("stages.rl.optimizer.lr=.inf", "stages.rl.optimizer.lr: Input should be a finite number (given: inf)"),
        (
            "stages.rl.rewards.accuracy.weight=.nan",
            "rewards.accuracy.weight: Input should be a finite number (given: nan)",
        ),
        ("stages.rl.optimizer.betas=[0.9, 1]", "stages.rl.optimizer.betas.1: Input should be less than 1 (given: 1)"),
        ("stages.rl.optimizer.betas=[0.9]", "stages.rl.optimizer.betas.1: Field required"),
        ("stages.rl.optimizer.betas=[0.9, true]", "betas.1: Input should be a valid number (given: True)"),
        ("stages.rl.optimizer.betas=0.9", "stages.rl.optimizer.betas: Input should be a list (given: 0.9)"),
        ("train.max_steps=true", "train.max_steps: Input should be a valid integer (given: True)"),
        ("train.max_steps=3.0", "train.max_steps: Input should be a valid integer (given: 3.0)"),
        ("train.max_steps='5'", "train.max_steps: Input should be a valid integer (given: '5')"),
        ("stages.rl.pad.rho=true", "stages.rl.pad.rho: Input should be a valid number (given: True)"),
        ("stages.rl.pad.rho='0.5'", "stages.rl.pad.rho: Input should be a valid number (given: '0.5')"),
        ("telemetry.progress=yes", "telemetry.progress: Input should be true or false (given: 'yes')"),
        ("telemetry.progress=1", "telemetry.progress: Input should be true or false (given: 1)"),
        ("run.dir=5", "run.dir: Input should be a valid string (given: 5)"),
        ("rollout.engine=hf", "rollout.engine: Input should be 'auto', 'embedded' or 'vllm' (given: 'hf')"),
        ("rollout={engine: embedded, url: 'http://x'}", "rollout: url: of vllm, without effect on engine embedded"),
        ("rollout={engine: embedded, async: one_step}", "rollout: async one_step needs engine vllm"),
        ("rollout={engine: vllm, async: one_step}", "stages.rl: with rollout.async: one_step completions are sampled"),
        ("rollout={url: 'http://x', transfer: ipc}", "rollout: transfer ipc reaches an engine process of our own"),
        ("rollout={async: one_step, sleep: 1}", "rollout: sleep cannot be combined with async one_step"),
        ("stages.rl.objective.rollout_cap=2.0", "rollout_cap have no effect without rollout_correction"),
        (
            "stages.rl={kind: grpo, data: [text], steps: 1, old_logp: engine, objective: {rollout_correction: mask}}",
            "stages.rl: objective.rollout_correction weighs the old policy against the engine's",
        ),
        (
            "stages.rl={kind: grpo, data: [text], steps: 1, sampling: {top_p: 0.9}, entropy: {start: 0.1}}",
            "stages.rl: entropy.start: KL and entropy are over the whole vocabulary",
        ),
        ("model.attn=sdpa", "unknown key 'model.attn'"),
        (
            "stages.start={kind: sft, data: [text], steps: 1}",
            "stages.start: a stage's name is letters, digits, _ and -",
        ),
        ("stages.a b={kind: sft, data: [text], steps: 1}", "stages.a b: a stage's name is letters, digits, _ and -"),
        ("stages.5={kind: sft, data: [text], steps: 1, lr: 1}", "unknown key 'stages.5.lr'"),
        ("stages={5: {kind: sft, data: [text], steps: 1}}", "stages.5: Input should be a valid string (given: 5)"),
        ("data.text.answer=null", "data.text.answer must say what the right answer is: stages.rl.data uses it"),
        ("stages.ml.steps=3", "stages.ml.kind: missing; 'sft' or 'grpo' (or did you mean stages.rl?)"),
        ("stages.zzz.steps=3", "stages.zzz.kind: missing; 'sft' or 'grpo'"),
        ("stages.rl.kind=ppo", "stages.rl.kind: Input should be 'sft' or 'grpo' (given: 'ppo')"),
        ("stages.rl=5", "stages.rl: Input should be a mapping (given: 5)"),
        ("stages.grpo={kind: grpo, data: [text], stps: 1}", "unknown key 'stages.grpo.stps'; did you mean 'steps'?"),
        (
            "stages.sft={kind: sft, data: [text], steps: 0}",
            "stages.sft.steps: Input should be greater than 0 (given: 0)",
        ),
        ("data.txt.limit=3", "data.txt: give exactly one of path, hub, function (or did you mean data.text?)"),
        ("data={a.b: {path: x, lmit: 3}}", "unknown key 'data.a.b.lmit'; did you mean 'limit'?"),
        ("data.text.path=5", "data.text.path: Input should be a string or a list of strings (given: 5)"),
        ("data.text.path=[a, 5]", "data.text.path: Input should be a string or a list of strings (given: ['a', 5])"),
        ("data.text.replace=[[a]]", "data.text.replace.0.1: Field required"),
        ("train=null", "train: Input should be a mapping (given: None)"),
        ("train.max_steps=2025-13-01", "--set train.max_steps=2025-13-01: the value is not valid YAML: month must be"),
        ("run.dir.x=1", "run.dir is a value, not a section"),
        ("nonsense", "expected KEY=VALUE"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_key_and_the_fix(small, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(small, [override])
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "meant"), [("stages.mlr.steps=3", "stages.mrl"), ("data.digts.limit=3", "data.digits")]
)
def test_a_misspelt_stage_or_dataset_gets_the_nearest_name(override, meant):
    with pytest.raises(ConfigError, match=rf"or did you mean {meant}\?"):
        load_config(CONFIGS / "quickstart.yaml", [override])


def test_the_quickstart_starts_in_its_own_folder():
    config = load_config(CONFIGS / "quickstart.yaml", ["run.dir=elsewhere"])
    assert (config.model.init, config.start_model) == ("tiny-vl", "elsewhere/start")
    assert [config.stages[name].pad.rho for name in ("mrl", "trl")] == [0.5, 0.25]


@pytest.mark.parametrize("section", ["heldout", "validation"])
def test_an_evaluation_needs_the_right_answers(small, section):
    new = "data.chat={path: x, answer: null}"
    assert load_config(small, [new]).data["chat"].answer is None
    with pytest.raises(ConfigError, match=rf"data\.chat\.answer must say .*: evaluation\.{section} uses it"):
        load_config(small, [new, f"evaluation.{section}={{talk: chat}}"])


def test_integers_are_numbers_lists_are_tuples_and_only_t_high_is_infinite(small):
    settings = ["optimizer.betas=[0, 0.99]", "optimizer.lr=1", "pad.t_high=.inf"]
    config = load_config(small, [f"stages.rl.{s}" for s in settings] + ["data.text.replace=[[a, b]]"])
    assert config.stages["rl"].optimizer.betas == (0, 0.99)
    assert config.stages["rl"].optimizer.lr == 1
    assert config.stages["rl"].pad.t_high == float("inf")
    assert config.data["text"].replace == [("a", "b")]


@pytest.mark.parametrize(
    ("model", "start"),
    [("{path: a/b}", "a/b"), ("{init: tiny-vl}", "runs/x/start"), ("{path: a/b, init: tiny-vl}", "a/b")],
)
def test_the_curriculum_starts_from_the_path_or_from_the_runs_folder(small, model, start):
    assert load_config(small, [f"model={model}"]).start_model == start


def test_a_null_section_can_be_overridden_into(small):
    config = load_config(small, ["model.lora=null", "model.lora.rank=3"])
    assert config.model.lora.rank == 3


def test_an_override_changes_one_place_though_an_anchor_shares_the_mapping(small):
    warm = SMALL.replace("steps: 3}", "steps: 3, optimizer: &o {lr: 1}}")
    small.write_text(warm.replace("rewards:", "optimizer: *o, rewards:"))
    config = load_config(small, ["stages.rl.optimizer.lr=2"])
    assert (config.stages["warm"].optimizer.lr, config.stages["rl"].optimizer.lr) == (1, 2)


def test_overrides_are_read_as_yaml(small):
    config = load_config(small, ["stages.rl.optimizer.lr=1e-6", "stages.rl.pad.mode=off", "train.max_steps=7"])
    assert config.stages["rl"].optimizer.lr == 1e-6
    assert config.stages["rl"].pad.mode == "off"
    assert config.train.max_steps == 7


def test_paths_are_relative_to_the_file_that_names_them(small, tmp_path):
    folder = tmp_path / "below"
    folder.mkdir()
    (folder / "child.yaml").write_text("extends: ../small.yaml\ndata: {more: {path: more.jsonl}}\n")
    config = load_config(folder / "child.yaml")
    assert config.data["text"].path == str(tmp_path / "data/text.jsonl")
    assert config.data["more"].path == str(folder / "more.jsonl")
    assert config.stages["rl"].rewards["mine"].function == f"{tmp_path}/rewards.py:score"


def test_extends_merges_sections_and_replaces_lists(small, tmp_path):
    (tmp_path / "child.yaml").write_text("extends: small.yaml\ncurriculum: [rl]\nstages: {rl: {steps: 9}}\n")
    config = load_config(tmp_path / "child.yaml")
    assert config.curriculum == ["rl"]
    assert config.stages["rl"].steps == 9
    assert config.stages["rl"].data == ["text"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("a: 2025-13-01", "not valid YAML: month must be"),
        ("- a", "expected a mapping"),
        ("extends: bad.yaml", "extends itself"),
        ("extends: 5", r"extends: Input should be the path of a configuration file \(given: 5\)"),
        ("extends: .", "cannot be read: Is a directory"),
        (b"run: {dir: caf\xe9}", r"not UTF-8 \(.*\); save it as UTF-8"),
        ("run:\n  dir: a\n  seed: 1\n  dir: b", r"(?s)the key 'dir' stands here twice.*bad\.yaml\", line 4"),
        ("a: {b: {c: 1, 'c': 2}}", "the key 'c' stands here twice"),
        ("data: 5", r"data: Input should be a mapping \(given: 5\)"),
        ("data: [1]", r"data: Input should be a mapping \(given: \[1\]\)"),
        ("stages: [1]", r"stages: Input should be a mapping \(given: \[1\]\)"),
        ("stages: {x: {steps: 3}}", "stages.x.kind: missing; 'sft' or 'grpo'"),
        (
            "stages: {x: {kind: grpo, data: [a], steps: 1, rewards: [b]}}",
            r"stages\.x\.rewards: Input should be a mapping",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as error:
        load_config(tmp_path / "bad.yaml")
    assert str(tmp_path) in str(error.value)


def test_a_file_that_is_missing_or_a_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such configuration file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=f"{tmp_path}: cannot be read: Is a directory"):
        load_config(tmp_path)


def test_merge_keys_may_repeat_what_they_replace(small):
    merged = "data:\n  one: &a {<<: &b {path: x, limit: 1}, limit: 2}\n  two: {<<: [*a, *b], limit: 3}\n"
    small.write_text(SMALL.replace("data:\n", merged))
    config = load_config(small)
    assert [config.data[name].limit for name in ("one", "two")] == [2, 3]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_shipped_configuration_is_valid(path):
    assert isinstance(load_config(path), Config)


def test_the_7b_configuration_states_the_papers_settings():
    config = load_config(CONFIGS / "revisual_r1_7b.yaml")
    cold, mrl, trl = (config.stages[name] for name in ("cold_start", "mrl", "trl"))
    assert config.curriculum == ["cold_start", "mrl", "trl"]
    assert config.model.dtype == "bfloat16"
    assert (config.model.min_pixels, config.model.max_pixels) == (262144, 4194304)
    assert (cold.optimizer.lr, cold.optimizer.schedule, cold.optimizer.warmup) == (2e-5, "cosine", 0.05)
    assert (cold.epochs, cold.max_length) == (5, 32768)
    for stage in (mrl, trl):
        assert (stage.optimizer.lr, stage.optimizer.weight_decay, stage.optimizer.max_grad_norm) == (1e-6, 1e-2, 1.0)
        assert (stage.update_batch, stage.rollout_batch, stage.group_size) == (128, 512, 8)
        assert (stage.max_prompt_tokens, stage.max_response_tokens) == (8192, 8192)
        assert (stage.sampling.temperature, stage.sampling.top_p) == (1.0, 0.95)
        assert (stage.pad.mode, stage.pad.tau_start, stage.pad.tau_end) == ("paper", 1.0, 0.3)
        assert {"accuracy", "length"} <= stage.rewards.keys()
    assert mrl.objective.kl_coef == 0
    assert not mrl.freeze_vision
    assert (trl.objective.kl, trl.objective.kl_coef, trl.freeze_vision) == ("k3", 2e-3, True)
    assert (trl.entropy.warmup, trl.entropy.start, trl.entropy.decay, trl.entropy.floor) == (140, 0.02, 0.985, 0.0)


@pytest.mark.parametrize(
    ("name", "curriculum"),
    [
        ("order_cs", ["cold_start"]),
        ("order_cs_mrl", ["cold_start", "mrl"]),
        ("order_cs_trl", ["cold_start", "trl"]),
        ("order_cs_mrl_trl", ["cold_start", "mrl", "trl"]),
        ("order_cs_trl_mrl", ["cold_start", "trl", "mrl"]),
    ],
)
def test_the_orders_of_table_3(name, curriculum):
    assert load_config(CONFIGS / "ablations" / f"{name}.yaml").curriculum == curriculum


def test_the_rows_of_table_4_train_on_different_completions():
    rewards = torch.randint(2, (512, 8), generator=torch.Generator().manual_seed(0)).float()
    rewards[:64] = 1.0  # groups without signal, which filter leaves out
    advantages = group_advantages(rewards)
    rows = {}
    for name, mode in (("pad", "paper"), ("grpo", "off"), ("filter", "filter"), ("sampling", "sample")):
        config = load_config(CONFIGS / "ablations" / f"stage2_{name}.yaml")
        pad = config.stages["mrl"].pad
        assert (pad.mode, pad.rho, config.curriculum) == (mode, 0.5, ["cold_start", "mrl"])
        settings = pad.model_dump(include={"mode", "rho", "t_low", "t_high"})
        picked = pad_select(advantages, **settings, tau=pad.tau_start, generator=torch.Generator().manual_seed(1))
        rows[name] = tuple(picked.indices.tolist())
    assert len(set(rows.values())) == 4
    assert len(rows["pad"]) == len(rows["sampling"]) == 2048 < len(rows["filter"]) < len(rows["grpo"]) == 4096
    assert set(rows["pad"]) < set(rows["filter"])


def test_every_preset_of_a_policy_objective_is_a_choice(small: Path) -> None:
    assert set(get_args(ObjectiveConfig.model_fields["preset"].annotation)) == set(PRESETS) - {"sft"}
    for preset in ("gmpo", "vespo"):
        overrides = [f"stages.rl.objective.preset={preset}", "stages.rl.objective.off_policy_mask=0.5"]
        stage = load_config(small, overrides).stages["rl"]
        assert isinstance(stage, GRPOConfig)
        chosen = stage.objective.model_dump(exclude={"preset"}, exclude_none=True)
        assert PolicyObjective.preset(stage.objective.preset, **chosen).off_policy_mask == 0.5
