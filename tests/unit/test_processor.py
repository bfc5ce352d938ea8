"""Token ids and image patches, with the real Qwen2.5-VL tokenizer and with the tiny model's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from revisual_fast.config import ChatConfig
from revisual_fast.data import BadRecordError, BadRecords, ImageRef, Record
from revisual_fast.data.bad import MISSING_IMAGE, NO_VISION, SPECIAL_TOKEN, UNREADABLE_IMAGE
from revisual_fast.data.processor import Processor
from tests.models import tiny_config

VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def real(shared_data):
    return shared_data / "qwen2_5_vl_processor"


@pytest.fixture(scope="module")
def processor(real):
    return Processor(real, ChatConfig())


@pytest.fixture(scope="module")
def tiny(tiny_vl):
    return Processor(tiny_vl, ChatConfig())


def record(prompt="Why?", *images, response=None):
    refs = tuple(ImageRef(image) for image in images)
    return Record(prompt, refs, "5", response, "math", (), "data.jsonl:1", "d", {})


def picture(width, height, colour="red"):
    return Image.new("RGB", (width, height), colour)


# ---- the chat template


def test_chat_text(processor):
    assert processor.chat_text("<image>What <image> now?") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{VISION}What {VISION} now?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_text_with_system_prefix_and_suffix(real):
    processor = Processor(real, ChatConfig(system="Be brief.", prefix="Q: ", suffix="\nThink."))
    assert processor.chat_text("Why?") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ: Why?\nThink.<|im_end|>\n<|im_start|>assistant\n"
    )


# ---- prompts


@pytest.mark.parametrize(
    ("size", "grid"),
    [((280, 140), (1, 10, 20)), ((100, 60), (1, 4, 8)), ((20, 20), (1, 4, 4)), ((300, 512), (1, 36, 22))],
)
def test_an_image_takes_a_token_per_four_patches(processor, size, grid):
    prompt = processor.encode(record("<image>Why?", picture(*size))).prompt
    patches = grid[1] * grid[2]
    assert prompt.grids.tolist() == [list(grid)]
    assert prompt.pixel_values.shape == (patches, 3 * 2 * 14 * 14)
    assert prompt.pixel_values.dtype == torch.float32
    assert int((prompt.ids == processor.image_token_id).sum()) == patches // 4
    without = processor.encode(record("Why?")).prompt
    assert len(prompt.ids) == len(without.ids) + patches // 4 + 2


def test_images_of_different_sizes_keep_their_order_and_place(processor):
    images = [picture(280, 140), picture(140, 140, "blue")]
    prompt = processor.encode(record("<image> or <image>?", *images)).prompt
    assert prompt.grids.tolist() == [[1, 10, 20], [1, 10, 10]]
    image = prompt.ids == processor.image_token_id
    starts = prompt.ids == processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    first, second = starts.nonzero().flatten().tolist()
    assert image[first + 1 : first + 51].all()
    assert not image[first + 51]
    assert image[second + 1 : second + 26].all()
    assert int(image.sum()) == 75
    alone = [processor.encode(record("<image>", i)).prompt.pixel_values for i in images]
    assert torch.equal(prompt.pixel_values, torch.cat(alone))
    assert prompt.image_keys == tuple(ImageRef(i).key for i in images)


def test_pixels_are_normalised_as_the_model_expects(processor):
    pixels = processor.encode(record("<image>", picture(56, 56, "white"))).prompt.pixel_values
    per_channel = pixels.view(16, 3, -1).mean(dim=(0, 2))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(per_channel, (1 - mean) / std)


def test_a_text_prompt_has_no_patches(processor):
    prompt = processor.encode(record("Why?")).prompt
    assert prompt.pixel_values is None
    assert prompt.grids.shape == (0, 3)
    assert prompt.grids.dtype == prompt.ids.dtype == torch.int64
    assert prompt.image_keys == ()
    assert processor.tokenizer.decode(prompt.ids) == processor.chat_text("Why?")


def test_pixel_limits(tiny_vl):
    processor = Processor(tiny_vl, ChatConfig(), min_pixels=28 * 28 * 16, max_pixels=28 * 28 * 25)
    counts = [int(processor.encode(record("<image>", picture(s, s))).prompt.grids.prod()) // 4 for s in (20, 112, 2000)]
    assert counts == [16, 16, 25]


def test_the_cache_is_bounded_and_gives_the_same_patches(tiny_vl):
    patch = 3 * 2 * 14 * 14 * 4
    processor = Processor(tiny_vl, ChatConfig(), cache_bytes=2 * 16 * patch)
    records = [record("<image>", picture(56, 56, colour)) for colour in ("red", "blue", "green")]
    first = [processor.encode(r).prompt.pixel_values.clone() for r in records]
    assert len(processor._cache) == 2
    assert all(torch.equal(processor.encode(r).prompt.pixel_values, p) for r, p in zip(records, first, strict=True))
    processor.encode(record("<image>", picture(560, 560)))  # larger than the whole cache
    assert len(processor._cache) == 0
    assert processor._cache_room == 2 * 16 * patch


# ---- responses


def test_a_response_ends_with_eos_and_decodes_to_itself(processor):
    text = "<think>2 + 3 = 5, ½ of 10\n</think>\\boxed{5}"
    example = processor.encode(record("Why?", response=text), with_response=True)
    assert example.response.dtype == torch.int64
    assert example.response[-1] == processor.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert processor.eos_token_id not in example.response[:-1]
    assert processor.decode(example.response) == text
    assert processor.decode(example.response.tolist()) == text
    assert processor.encode(record("Why?", response=text)).response is None


def test_sft_without_a_response_says_what_to_set(processor):
    with pytest.raises(ValueError, match=r"data\.jsonl:1: no response; set data\.d\.response"):
        processor.encode(record("Why?"), with_response=True)


# ---- records that cannot be encoded


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("Why <|image_pad|>?"), SPECIAL_TOKEN),
        (record("Why?", response="a<|im_end|>b"), SPECIAL_TOKEN),
        (record("Why?", response="a<|image_pad|>b"), SPECIAL_TOKEN),
        (record("<image>", picture(2000, 2)), UNREADABLE_IMAGE),
    ],
)
def test_bad_records_are_errors_or_counted(processor, bad, reason):
    with pytest.raises(BadRecordError) as caught:
        processor.encode(bad, with_response=bad.response is not None)
    assert (caught.value.reason, caught.value.source) == (reason, "data.jsonl:1")

    counts = BadRecords()
    with_response = bad.response is not None
    assert processor.encode_or_report(bad, counts, "skip", with_response) is None
    assert counts.counts == {reason: 1}
    with pytest.raises(BadRecordError, match=r"data\.jsonl:1: .*on_bad_record"):
        processor.encode_or_report(bad, counts, "error", with_response)


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (Path.unlink, MISSING_IMAGE),
        (lambda path: path.write_bytes(b"no picture"), UNREADABLE_IMAGE),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), UNREADABLE_IMAGE),
        (lambda path: (path.unlink(), path.mkdir()), UNREADABLE_IMAGE),
    ],
)
def test_an_image_spoilt_after_loading_is_a_bad_record(tiny, tmp_path, spoil, reason, read_before):
    picture(56, 56, "pink").save(tmp_path / "a.png")
    ref = ImageRef.of("a.png", tmp_path)
    if read_before:  # its key is known, the patches are not
        assert ref.key
    spoil(tmp_path / "a.png")
    bad = Record("<image>", (ref,), "5", None, "math", (), "data.jsonl:1", "d", {})
    with pytest.raises(BadRecordError, match=r"^data\.jsonl:1: .*a\.png") as caught:
        tiny.encode(bad)
    assert (caught.value.reason, caught.value.source) == (reason, "data.jsonl:1")
    counts = BadRecords()
    assert tiny.encode_or_report(bad, counts, "skip") is None
    assert counts.counts == {reason: 1}


def test_a_good_record_is_not_reported(processor):
    counts = BadRecords()
    assert processor.encode_or_report(record("Why?"), counts, "error").record.prompt == "Why?"
    assert counts.counts == {}


# ---- the model directory


@pytest.mark.parametrize(
    ("files", "more"),
    [
        ({}, []),
        ({"generation_config.json": {"eos_token_id": ["eos", 7, 5]}}, [7, 5]),
        ({"generation_config.json": {"eos_token_id": 7}, "config.json": {"eos_token_id": 9}}, [7]),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": [9]}}, [9]),
        ({"config.json": {"text_config": {"eos_token_id": 9}}}, [9]),
    ],
)
def test_the_tokens_that_end_an_answer(tiny, tiny_vl, tmp_path, files, more):
    for path in tiny_vl.iterdir():
        if path.name not in ("config.json", "generation_config.json") and path.suffix in (".json", ".jinja"):
            shutil.copy(path, tmp_path)
    settings = json.loads((tiny_vl / "config.json").read_text())
    settings["text_config"].pop("eos_token_id", None)
    settings.pop("eos_token_id", None)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        text = json.dumps(content).replace('"eos"', str(tiny.eos_token_id))
        extra = settings if name == "config.json" else {}
        (tmp_path / name).write_text(json.dumps({**extra, **json.loads(text)}))
    assert Processor(tmp_path, ChatConfig()).eos_token_ids == (tiny.eos_token_id, *more)


def test_a_broken_generation_config_is_named(tiny_vl, tmp_path):
    shutil.copytree(tiny_vl, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.path: .*generation_config\.json is not valid JSON"):
        Processor(tmp_path / "model", ChatConfig())


def test_without_model_files_only_the_tokenizers_token_ends_an_answer(processor):
    assert processor.eos_token_ids == (processor.eos_token_id,)


def test_saved_files_give_the_same_processor(real, tmp_path):
    processor = Processor(real, ChatConfig(), max_pixels=28 * 28 * 9)
    processor.save(tmp_path)
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "Qwen2VLImageProcessor"
    assert settings["size"]["longest_edge"] == 28 * 28 * 9

    question = record("<image>Why?", picture(300, 200))
    before, after = processor.encode(question).prompt, Processor(tmp_path, ChatConfig()).encode(question).prompt
    assert torch.equal(before.ids, after.ids)
    assert torch.equal(before.pixel_values, after.pixel_values)
    assert int(after.grids.prod()) // 4 <= 9


def test_directories_that_cannot_be_used(tiny_vl, tmp_path):
    with pytest.raises(ValueError, match=r"model\.path: .*nowhere"):
        Processor(tmp_path / "nowhere", ChatConfig())
    shutil.copy(tiny_vl / "tokenizer.json", tmp_path)
    settings = json.loads((tiny_vl / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"model\.path: .*preprocessor_config\.json"):
        Processor(tmp_path, ChatConfig())
    shutil.copy(tiny_vl / "preprocessor_config.json", tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        Processor(tmp_path, ChatConfig())


def test_settings_that_cannot_be_used(tiny_vl):
    with pytest.raises(ValueError, match=r"model\.min_pixels, model\.max_pixels: 5000 is larger than 4000"):
        Processor(tiny_vl, ChatConfig(), min_pixels=5000, max_pixels=4000)
    with pytest.raises(ValueError, match=r"chat\.suffix: an image placeholder"):
        Processor(tiny_vl, ChatConfig(suffix="<image>"))


# ---- the tiny model


def test_the_tiny_model_reads_a_scan_as_one_token(tiny):
    text = "<think>3</think>\\boxed{3}"
    example = tiny.encode(record("Read <image>", picture(28, 28), response=text), with_response=True)
    assert example.prompt.grids.tolist() == [[1, 2, 2]]
    assert int((example.prompt.ids == tiny.image_token_id).sum()) == 1
    assert example.response[-1] == tiny.eos_token_id
    assert tiny.decode(example.response) == text


# ---- other families


@pytest.fixture(scope="module")
def text_only(tiny_vl, tmp_path_factory):
    """A text model's folder, with the kind of template that such models have: a message's content is a string."""
    folder = tmp_path_factory.mktemp("text_only")
    tiny_config("qwen2").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_vl)
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_a_text_model_has_no_image_settings(text_only, tmp_path):
    processor = Processor(text_only, ChatConfig(prefix="Q: "))
    assert processor.image_processor is None
    assert processor.image_token_id is None
    example = processor.encode(record("Why?", response="So."), with_response=True)
    assert processor.chat_text("Why?") == "<|im_start|>user\nQ: Why?"
    assert example.prompt.ids.tolist() == processor.tokenizer(processor.chat_text("Why?"))["input_ids"]
    assert example.response[-1] == processor.eos_token_id
    assert (example.prompt.pixel_values, example.prompt.grids.shape, example.prompt.image_keys) == (None, (0, 3), ())
    processor.save(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()


def test_a_text_model_refuses_images_record_by_record(text_only):
    processor, counts = Processor(text_only, ChatConfig()), BadRecords()
    question = record("Read <image>", picture(28, 28))
    assert processor.encode_or_report(question, counts, "skip") is None
    assert counts.counts == {NO_VISION: 1}
    with pytest.raises(BadRecordError, match=r"data\.jsonl:1: .*no vision tower; leave data with images out"):
        processor.encode_or_report(question, counts, "error")


def test_image_settings_for_a_text_model_are_refused(text_only):
    with pytest.raises(ValueError, match=r"model\.max_pixels: .* has no vision tower; remove the setting"):
        Processor(text_only, ChatConfig(), max_pixels=28 * 28)


def test_the_image_settings_of_a_qwen3_vl(tiny_vl, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_vl / name, tmp_path)
    settings = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2}
    settings |= {"merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    settings |= {"processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = Processor(tmp_path, ChatConfig())
    prompt = processor.encode(record("<image>", picture(320, 290, "white"))).prompt
    assert prompt.grids.tolist() == [[1, 18, 20]]  # both sides multiples of 32 pixels
    assert prompt.pixel_values.shape == (360, 3 * 2 * 16 * 16)
    assert int((prompt.ids == processor.image_token_id).sum()) == 90
    assert torch.equal(prompt.pixel_values, torch.ones(360, 1536))
    small = processor.encode(record("<image>", picture(20, 20))).prompt
    assert small.grids.tolist() == [[1, 16, 16]]  # shortest_edge: 256 * 256 pixels
