"""What the families name, what they refuse, and their way from disk and back."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3MoeConfig

from revisual_fast.config import ModelConfig
from revisual_fast.policy.attention import NAME
from revisual_fast.policy.families import FAMILIES, family_for
from revisual_fast.policy.families.shapes import model_shape
from revisual_fast.policy.load import export_model, load_policy
from revisual_fast.policy.model import Policy
from tests.groups import make_groups, make_prompt, packed_logp
from tests.models import TEXT, VISION, as_transformers, tiny, tiny_config

EVERY = TEXT + VISION


def settings(path, **options) -> ModelConfig:
    return ModelConfig(path=str(path), dtype="float32", device="cpu", **options)


def test_every_family_is_tested():
    assert set(EVERY) == FAMILIES.keys()


# ---- parts


@pytest.mark.parametrize("name", EVERY)
def test_parts(name):
    model = tiny(name)
    family = family_for(name)(model)
    assert family.embedding is model.get_input_embeddings()
    assert family.head is model.get_output_embeddings()
    assert len(family.text.layers) == model.config.get_text_config().num_hidden_layers
    assert family.shape == model_shape(model.config)
    vision = {n for n, _ in model.named_parameters() if family.is_vision(n)}
    if name in TEXT:
        assert (family.visual, family.image_token_id, family.deepstack) == (None, None, 0)
        assert not vision
    else:
        assert family.image_token_id == model.config.image_token_id
        assert (family.merge_size, family.deepstack) == (2, 2 if name == "qwen3_vl" else 0)
        inside = {id(p) for p in family.visual.parameters()}
        assert vision == {n for n, p in model.named_parameters() if id(p) in inside}


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("images", [[], [(1, 4, 6), (1, 2, 2)], [(1, 10, 2)]])
def test_positions_are_those_of_transformers(name, images):
    model = tiny(name)
    family = family_for(name)(model)
    prompt = make_prompt(family, 3, images, seed=3)
    ids = prompt.ids[None]
    types = (ids == family.image_token_id).int()
    expected, _ = model.model.get_rope_index(ids, types, image_grid_thw=prompt.grids)
    assert torch.equal(family.positions(prompt.ids, prompt.grids), expected[:, 0])


@pytest.mark.parametrize("name", TEXT)
def test_a_text_model_counts_its_tokens_and_takes_no_image(name):
    family = family_for(name)(tiny(name))
    assert family.positions(torch.zeros(4), torch.empty(0, 3)).tolist() == [[0, 1, 2, 3]] * 3
    with pytest.raises(ValueError, match=f"{name}: this model has no vision tower"):
        family.encode_images(torch.zeros(4, 8), torch.tensor([[1, 2, 2]]))


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_no_mask_is_built_and_every_layer_attends_through_the_plan(name, monkeypatch):
    policy = Policy(tiny(name))
    masks, layers = [], []

    class Plan:
        def attend(self, layer, query, key, value, scaling):
            layers.append(layer)
            return query.transpose(1, 2)

    original = type(policy.family.text.layers[0]).forward

    def layer_forward(layer, *args, attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return original(layer, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(type(policy.family.text.layers[0]), "forward", layer_forward)
    policy.family.run_text(torch.randn(1, 9, 64), torch.arange(9).expand(4, 1, 9), Plan())
    assert masks == [None] * 3
    assert layers == [0, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_the_models_own_forward_works_beside_the_packed_one(name):
    """Deepstack features are added by a mask there and by rows here."""
    policy, other = Policy(tiny(name)), tiny(name)
    images = [(1, 4, 6), (1, 2, 2)] if name in VISION else []
    prompt = make_prompt(policy.family, 9, images, seed=1)
    inputs = {"input_ids": prompt.ids[None]}
    if images:
        types = (prompt.ids[None] == policy.family.image_token_id).int()
        inputs |= {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grids, "mm_token_type_ids": types}
    with as_transformers(policy) as model:
        assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    assert policy.family.text.config._attn_implementation == NAME


# ---- refusals


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_vl_moe", "qwen2_moe"])
def test_mixtures_of_experts_are_refused(model_type):
    with pytest.raises(
        ValueError, match=rf"'{model_type}' \(a mixture of experts\) is not supported; supported: llama"
    ):
        family_for(model_type)


def test_another_family_is_refused():
    with pytest.raises(ValueError, match="'gpt2' is not supported; supported: llama, qwen2, qwen2_5_vl, qwen2_vl"):
        family_for("gpt2")


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl"])
def test_a_sliding_window_is_refused(name):
    config = deepcopy(tiny_config(name))
    family_for(name).check(config)
    config.get_text_config().layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"a sliding window is not supported.*set use_sliding_window to false"):
        family_for(name).check(config)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("name", EVERY)
def test_a_rotation_that_depends_on_the_row_is_refused(name, kind):
    config = deepcopy(tiny_config(name))
    config.get_text_config().rope_parameters["rope_type"] = kind
    with pytest.raises(ValueError, match=f"rope_type '{kind}' is not supported"):
        family_for(name).check(config)


def test_a_model_that_is_not_supported_is_refused_before_its_weights_are_read(tmp_path):
    config = tiny_config("qwen2")
    config.layer_types = ["sliding_attention"] * 3
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a sliding window is not supported"):
        load_policy(tmp_path, settings(tmp_path))
    Qwen3MoeConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a mixture of experts"):
        load_policy(tmp_path, settings(tmp_path))


# ---- from disk and back


@torch.no_grad()
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.parametrize("name", EVERY)
def test_a_saved_model_is_loaded_trained_and_exported(name, lora, tmp_path):
    if lora:
        pytest.importorskip("peft")
    torch.manual_seed(0)
    tiny(name).save_pretrained(tmp_path / "given")
    policy = load_policy(tmp_path / "given", settings(tmp_path / "given", lora=lora))
    if lora:  # as if it had been trained
        trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * 7 * 3, "two factors for each projection of the text tower's three layers"
        for parameter in trained.values():
            parameter.normal_(0, 0.1)
    images = [(1, 4, 6)] if name in VISION else []
    groups = make_groups(policy.family, [(7, images, [4, 3]), (4, [], [2])])
    before = packed_logp(policy, groups)
    export_model(policy, tmp_path / "exported")
    loader = AutoModelForImageTextToText if name in VISION else AutoModelForCausalLM
    again = packed_logp(Policy(loader.from_pretrained(tmp_path / "exported", dtype=torch.float32)), groups)
    if lora:  # merging rounds; the adapters themselves change log-probs by tenths
        torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-5)
        with policy.without_adapter():
            assert (packed_logp(policy, groups) - before).abs().max() > 0.1
    else:
        assert torch.equal(again, before)


@torch.no_grad()
def test_a_tower_alone_in_half_precision_gives_features_of_its_own_dtype():
    policy = Policy(tiny("qwen3_vl").bfloat16())
    prompt = make_prompt(policy.family, 5, [(1, 4, 4)], seed=0)
    assert policy.family.encode_images(prompt.pixel_values, prompt.grids).dtype == torch.bfloat16
