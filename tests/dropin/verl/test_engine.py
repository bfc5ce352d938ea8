"""The packing engine against verl's own, on one process: loss, metrics, log-probs, entropies, all gradients."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="needs verl: make test-dropin")
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from verl.utils import tensordict_utils as tu
from verl.workers.config import PolicyLossConfig
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.utils.padding import no_padding_2_padding

from revisual_fast.integrations.verl.policy import EnginePolicy
from revisual_fast.integrations.verl.rows import CannotPack, Layout, check_request, grouped
from tests.dropin.verl.engines import FP32, Step, batch_of, engine_of, rows_of, save, score, step
from tests.models import tiny, worst_difference
from tests.numerics import relative_error

pytestmark = pytest.mark.usefixtures("cpu", "transformers_classes")

TEXT = rows_of([(7, [], [5, 3, 4, 6]), (9, [], [2, 1]), (4, [], [8])])
MIXED: list[Any] = [(7, [(1, 4, 6)], [5, 3, 4]), (9, [], [2, 8]), (5, [(1, 8, 8), (1, 4, 4)], [6, 1, 3])]
IMAGES = rows_of(MIXED)
RUNS = rows_of([(7, [], [5, 3, 4]), (9, [], [2, 1, 3]), (4, [], [8, 2, 2]), (5, [], [1, 1, 4])])
SETTINGS: dict[str, Any] = {"entropy_coeff": 0.01, "use_kl_loss": True, "kl_loss_coef": 0.05}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def path(kind: str) -> Path:
        if kind not in made:
            made[kind] = save(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return path


@pytest.fixture
def fsdp1_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP1 broadcasts its first weights on a GPU only, and verl asks for that: not here, with one process."""

    class WithoutBroadcast(FullyShardedDataParallel):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "sync_module_states": False})

    monkeypatch.setattr(transformer_impl, "FSDP", WithoutBroadcast)


def check(ours: Step, verls: Step, tolerance: float = 1e-5) -> None:
    assert ours.loss == pytest.approx(verls.loss, rel=tolerance)
    assert ours.metrics.keys() == verls.metrics.keys()
    for name, value in verls.metrics.items():
        got, expected = ([x.aggregate()] if hasattr(x, "aggregate") else x for x in (ours.metrics[name], value))
        assert got == pytest.approx(expected, rel=tolerance, abs=1e-7), name
    for name, value in verls.outputs.items():
        assert relative_error(ours.outputs[name], value) < tolerance, name
    assert sum(g.norm() > 0 for g in verls.gradients.values()) > len(verls.gradients) / 3
    worst = worst_difference(ours.gradients, verls.gradients)
    assert worst[0] < tolerance, worst


def packed_rows(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the text tower gets in each pass from here on."""
    seen: list[int] = []
    original = engine.policy.family.run_text

    def run_text(embeddings: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(embeddings.shape[1])
        return original(embeddings, *rest)

    monkeypatch.setattr(engine.policy.family, "run_text", run_text)
    return seen


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_a_step_and_the_passes_for_old_and_reference_policy(saved, kind, monkeypatch):
    vision = kind.endswith("vl")
    rows = (rows_of(MIXED, side=16) if kind == "qwen3_vl" else IMAGES) if vision else TEXT
    data = batch_of(rows, vision=vision)
    verls, ours = (engine_of(saved(kind), ours=own) for own in (False, True))
    seen = packed_rows(ours, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        check(step(ours, data, **SETTINGS), step(verls, data, **SETTINGS))
        got = score(ours, data)
    prompts = {row.prompt.numpy().tobytes(): len(row.prompt) for row in rows}
    assert seen == [sum(prompts.values()) + sum(len(r.response) - 1 for r in rows)] * 2, "a prompt stands there once"
    for name, expected in score(verls, data).items():
        assert relative_error(got[name], expected) < 1e-5


@pytest.mark.parametrize("kind", ["qwen3", "qwen2_5_vl"])
def test_under_fsdp1(saved, kind, fsdp1_on_a_cpu, monkeypatch):
    vision = kind.endswith("vl")
    data = batch_of(IMAGES if vision else TEXT, vision=vision)
    options = {"strategy": "fsdp", "engine": {"use_orig_params": True}}
    verls, ours = (engine_of(saved(kind), ours=own, **options) for own in (False, True))
    seen = packed_rows(ours, monkeypatch)
    check(step(ours, data, **SETTINGS), step(verls, data, **SETTINGS))
    assert len(seen) == 1


def test_under_fsdp1_with_flat_parameters(saved, fsdp1_on_a_cpu, monkeypatch):
    data = batch_of(TEXT, vision=False)
    verls, ours = (engine_of(saved("qwen3"), ours=own, strategy="fsdp") for own in (False, True))
    seen = packed_rows(ours, monkeypatch)
    check(step(ours, data, **SETTINGS), step(verls, data, **SETTINGS))
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["qwen3", "qwen2_5_vl"])
def test_with_gradient_checkpointing(saved, kind, monkeypatch):
    vision = kind.endswith("vl")
    data = batch_of(IMAGES if vision else TEXT, vision=vision)
    options = {"enable_gradient_checkpointing": True}
    verls, ours = (engine_of(saved(kind), ours=own, **options) for own in (False, True))
    seen = packed_rows(ours, monkeypatch)
    check(step(ours, data, **SETTINGS), step(verls, data, **SETTINGS))
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["qwen3", "qwen2_5_vl"])
def test_in_bf16_it_is_as_far_from_fp32_as_verl_is(saved, kind):
    vision = kind.endswith("vl")
    data = batch_of(IMAGES if vision else TEXT, vision=vision)
    truth = step(engine_of(saved(kind), ours=False), data, **SETTINGS)
    errors = []
    for own in (True, False):
        engine = engine_of(saved(kind), ours=own, engine={"mixed_precision": {**FP32, "param_dtype": "bf16"}})
        found = step(engine, data, **SETTINGS)
        pairs = [(found.gradients[n].flatten(), g.flatten()) for n, g in truth.gradients.items()]
        gradients = relative_error(*(torch.cat(side) for side in zip(*pairs, strict=True)))
        errors.append((relative_error(found.outputs["log_probs"], truth.outputs["log_probs"]), gradients))
    assert errors[0][0] < 1.1 * errors[1][0]
    assert errors[0][1] < 1.2 * errors[1][1]
    assert errors[1][0] > 1e-4


def test_rows_without_padding(saved):
    """verl's own engine runs them end to end in one row, under a mask of blocks."""
    data = batch_of(TEXT, vision=False, use_remove_padding=True)
    verls, ours = (engine_of(saved("qwen3"), ours=own, use_remove_padding=True) for own in (False, True))
    check(step(ours, data, **SETTINGS), step(verls, data, **SETTINGS))


def test_images_where_verl_has_replaced_the_attention(saved):
    """With use_remove_padding verl gives Qwen2.5-VL's attention a forward that needs flash-attn; packed rows do not."""
    data = batch_of(IMAGES, vision=True)
    expected = step(engine_of(saved("qwen2_5_vl"), ours=False), data, **SETTINGS)
    tu.assign_non_tensor(data, use_remove_padding=True)
    ours = engine_of(saved("qwen2_5_vl"), ours=True, use_remove_padding=True)
    attention = ours.policy.family.attentions()[0]
    assert type(attention).forward.__module__.startswith("verl.")
    check(step(ours, data, **SETTINGS), expected)
    ours.policy.release()
    assert "forward" not in vars(attention)
    assert "forward" not in vars(ours.policy.head)


@pytest.fixture
def blank_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl 0.9.1 takes the mean of what the tower returns for its blank image, which transformers 5 cannot give."""
    monkeypatch.setattr(BaseModelOutputWithPooling, "mean", lambda out: out.pooler_output.mean(), raising=False)


def test_micro_batches_and_a_batch_without_images(saved, blank_images):
    """The tower runs once for each of them, with verl's blank image, so that all processes gather the same weights."""
    data = batch_of(rows_of([(7, [], [5, 3]), (9, [], [2, 8]), (5, [(1, 4, 4)], [6, 1])]), vision=True)
    tu.assign_non_tensor(data, micro_batch_size_per_gpu=2)
    verls, ours = (engine_of(saved("qwen2_5_vl"), ours=own) for own in (False, True))
    passes = []
    tower = ours.policy.family.visual
    tower.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    check(step(ours, data, **SETTINGS), step(verls, data, **SETTINGS))
    assert passes == [16, 16, 16]
    text = batch_of(TEXT, vision=True)
    mine = step(ours, text, **SETTINGS)
    check(mine, step(verls, text, **SETTINGS))
    assert all(g.norm() == 0 for name, g in mine.gradients.items() if "visual" in name)


def test_a_frozen_tower(saved):
    data = batch_of(IMAGES, vision=True)
    verls, ours = (engine_of(saved("qwen2_5_vl"), ours=own) for own in (False, True))
    for engine in (verls, ours):
        for name, parameter in engine.module.named_parameters():
            parameter.requires_grad_("visual" not in name)
    check(step(ours, data, **SETTINGS), step(verls, data, **SETTINGS))


def test_a_temperature_for_each_row(saved):
    data = batch_of(TEXT, vision=False)
    data["temperature"] = torch.tensor([1.0, 0.5, 0.7, 1.3, 0.9, 2.0, 1.1])
    verls, ours = (engine_of(saved("qwen3"), ours=own) for own in (False, True))
    check(step(ours, data, **SETTINGS), step(verls, data, **SETTINGS))


def test_prompts_and_responses_that_are_jagged(saved):
    """As verl's transfer queue hands them on."""
    data = batch_of(TEXT, vision=False)
    verls, ours = (engine_of(saved("qwen3"), ours=own) for own in (False, True))
    expected = score(verls, data)
    for name in ("prompts", "responses"):
        parts = [getattr(row, name[:-1]) for row in TEXT]
        data[name] = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got = score(ours, data)
    for name, value in expected.items():
        assert relative_error(got[name], value) < 1e-5


@pytest.mark.parametrize("name", ["vanilla", "gspo"])
def test_with_this_packages_losses(saved, name):
    data = batch_of(TEXT, vision=False)
    del data["rollout_is_weights"]
    verls, ours = (engine_of(saved("qwen3"), ours=own) for own in (False, True))
    expected = step(verls, data, policy_loss=PolicyLossConfig(loss_mode=name), **SETTINGS)
    own = "revisual_fast" if name == "vanilla" else f"revisual_fast_{name}"
    check(step(ours, data, policy_loss=PolicyLossConfig(loss_mode=own), **SETTINGS), expected)


def test_lora_and_the_pass_without_it(saved):
    data = batch_of(TEXT, vision=False)
    options = {"lora_rank": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    torch.manual_seed(0)
    verls, ours = (engine_of(saved("qwen3"), ours=own, **options) for own in (False, True))
    weights = {n: torch.randn(p.shape) * 0.1 for n, p in verls.module.named_parameters() if "lora_" in n}
    for engine in (verls, ours):
        with torch.no_grad():
            for name, parameter in engine.module.named_parameters():
                if name in weights:
                    parameter.to_local().copy_(weights[name])
    mine = step(ours, data, **SETTINGS)
    verl_step = step(verls, data, **SETTINGS)
    trained = {n: g for n, g in verl_step.gradients.items() if "lora_" in n}
    assert all(g.norm() > 0 for g in trained.values())
    assert worst_difference({n: mine.gradients[n] for n in trained}, trained)[0] < 1e-5
    assert mine.loss == pytest.approx(verl_step.loss, rel=1e-5)
    found = []
    for engine in (ours, verls):
        with engine.disable_adapter():
            found.append(score(engine, data)["log_probs"])
    assert relative_error(*found) < 1e-5
    assert relative_error(found[0], mine.outputs["log_probs"]) > 1e-3


def test_the_pass_goes_through_the_wrapped_module(saved):
    """FSDP gathers and frees weights, and reduces gradients, in hooks of the module's forward."""
    data = batch_of(IMAGES, vision=True)
    ours = engine_of(saved("qwen2_5_vl"), ours=True)
    calls: list[str] = []
    watched = {"": ours.module, "lm_head": ours.module.lm_head, "layer": ours.policy.family.text.layers[0]}
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    step(ours, data)
    assert calls == ["layer", "lm_head", ""]
    assert all(isinstance(p, DTensor) for p in ours.module.parameters())


def test_rows_that_nobody_reads_are_nan(saved):
    data = batch_of(TEXT, vision=False)
    ours = engine_of(saved("qwen3"), ours=True)
    with ours.eval_mode():
        found = ours.infer_batch(data.clone())["model_output"]["log_probs"].unbind()
    for row, values in zip(TEXT, found, strict=True):
        read = torch.zeros(len(values), dtype=torch.bool)
        read[len(row.prompt) - 1 : -1] = True
        assert torch.equal(values.isnan(), ~read)


def test_a_groups_rows_stay_together_with_dynamic_batch_sizes(saved, monkeypatch):
    data = batch_of(RUNS, vision=False, use_dynamic_bsz=True, max_token_len_per_gpu=40)
    verls, ours = (engine_of(saved("qwen3"), ours=own) for own in (False, True))
    seen = packed_rows(ours, monkeypatch)
    mine = step(ours, data, **SETTINGS)
    sizes = [sum(len(r.response) - 1 for r in g) + len(g[0].prompt) for g in (RUNS[i : i + 3] for i in range(0, 12, 3))]
    assert sum(seen) == sum(sizes), "no prompt stands in two micro-batches"
    assert len(seen) > 1
    expected = step(verls, data, **SETTINGS)
    assert mine.loss == pytest.approx(expected.loss, rel=1e-5)
    assert worst_difference(mine.gradients, expected.gradients)[0] < 1e-5
    assert relative_error(mine.outputs["log_probs"], expected.outputs["log_probs"]) < 1e-5
    tu.assign_non_tensor(data, max_token_len_per_gpu=26)  # less than the longest group
    seen.clear()
    check(step(ours, data, **SETTINGS), step(verls, data, **SETTINGS))
    assert sum(seen) > sum(sizes)


def falls_back(engine: Any, data: Any, reason: str) -> None:
    """Runs verl's own code, to the last bit, and says so once."""
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        assert step(engine, data, **SETTINGS).loss == step(engine, data, **SETTINGS).loss
    assert len([w for w in caught if "revisual_fast" in str(w.message)]) == 1


def test_positions_that_are_not_the_packers(saved):
    data = batch_of(TEXT, vision=False)
    verls, ours = (engine_of(saved("qwen3"), ours=own) for own in (False, True))
    data["position_ids"].values()[3:].add_(2)
    falls_back(ours, data, "position_ids are not those of qwen3")
    check(step(ours, data, **SETTINGS), step(verls, data, **SETTINGS), tolerance=1e-12)


def test_inputs_other_than_images(saved):
    data = batch_of(IMAGES, vision=True)
    ours = engine_of(saved("qwen2_5_vl"), ours=True)
    rows = [dict(getattr(row, "data", row)) for row in data["multi_modal_inputs"]]
    rows[0]["second_per_grid_ts"] = None
    tu.assign_non_tensor_stack(data, "multi_modal_inputs", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        score(ours, data)  # a name without a value is nothing
    rows[0]["pixel_values_videos"] = torch.zeros(1)
    tu.assign_non_tensor_stack(data, "multi_modal_inputs", rows)
    with pytest.raises(CannotPack, match="multi_modal_inputs has pixel_values_videos; only images"):
        grouped(data, Layout.of(data))


def test_engines_that_never_pack(saved):
    options = {"engine": {"pad_to_length": True}, "use_remove_padding": True}
    ours = engine_of(saved("qwen3"), ours=True, **options)
    falls_back(ours, batch_of(TEXT, vision=False, use_remove_padding=True), "pad_to_length")
    dropout = engine_of(saved("qwen3"), ours=True, override_config={"attention_dropout": 0.5})
    with pytest.warns(RuntimeWarning, match="attention_dropout 0.5 is not supported"):
        score(dropout, batch_of(TEXT, vision=False))


def test_an_adapter_on_the_head_is_noticed():
    model = tiny("qwen3")
    policy = EnginePolicy(model)
    assert policy.why_not() is None
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    assert policy.why_not() == "the head is wrapped by Linear"


def test_models_that_cannot_be_packed_are_left_alone():
    model = tiny("qwen3")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="the head is a Sequential, not a linear layer"):
        EnginePolicy(model)
    assert not any("forward" in vars(module) for module in model.modules())
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match="'mamba' is not supported"):
        EnginePolicy(model)


@pytest.mark.parametrize("key", ["distillation_use_topk", "distillation_only", "calculate_sum_pi_squared"])
def test_what_needs_logits(saved, key):
    data = batch_of(TEXT, vision=False, **{key: True})
    with pytest.raises(CannotPack, match="the logits"):
        check_request(data, tu.get_non_tensor_data)


def test_batches_without_responses(saved):
    """As in verl's supervised fine-tuning."""
    verls, ours = (engine_of(saved("qwen3"), ours=own) for own in (False, True))
    data = batch_of(TEXT, vision=False)
    expected = score(verls, data)["log_probs"]
    kept = data.clone()
    del data["responses"]
    with pytest.warns(RuntimeWarning, match="the batch has no responses"), ours.eval_mode():
        found = ours.infer_batch(data)["model_output"]["log_probs"]
    assert torch.equal(no_padding_2_padding(found, kept), expected)


def test_verls_fused_head_computes_response_rows_only(saved):
    """Where an engine cannot pack, and verl's fused kernels are on."""
    options = {"use_remove_padding": True, "use_fused_kernels": True}
    data = batch_of(TEXT, vision=False, **options)
    plain = batch_of(TEXT, vision=False, use_remove_padding=True)
    expected = step(engine_of(saved("qwen2"), ours=False, use_remove_padding=True), plain, **SETTINGS)
    fused = engine_of(saved("qwen2"), ours=True, fused_kernel_options={"impl_backend": "triton"}, **options)
    fused._never = "this test wants verl's own code"
    with pytest.warns(RuntimeWarning, match="this test wants"):
        mine = step(fused, data, **SETTINGS)
    check(mine, expected)
    with fused.eval_mode():
        whole = fused.infer_batch(data.clone())["model_output"]["log_probs"].values()
    assert whole.isnan().sum() == len(whole) - sum(len(r.response) for r in TEXT)
