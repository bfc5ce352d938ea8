"""Configuration: what is read, what is refused, and what the message says."""

from pathlib import Path

import pytest

from revisual_fast.config import Config
from revisual_fast.config_file import ConfigError, load_config

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
        ("run.dir.x=1", "run.dir is a value, not a section"),
        ("nonsense", "expected KEY=VALUE"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_key_and_the_fix(small, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(small, [override])
    assert message in str(error.value)


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
    [("a: [", "not valid YAML"), ("- a", "expected a mapping"), ("extends: bad.yaml", "extends itself")],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(tmp_path / "bad.yaml")
    assert "bad.yaml" in str(error.value)
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "missing.yaml")


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


@pytest.mark.parametrize(
    ("name", "mode"), [("pad", "paper"), ("grpo", "off"), ("filter", "filter"), ("sampling", "sample")]
)
def test_the_rows_of_table_4(name, mode):
    config = load_config(CONFIGS / "ablations" / f"stage2_{name}.yaml")
    assert config.stages["mrl"].pad.mode == mode
    assert config.curriculum == ["cold_start", "mrl"]
