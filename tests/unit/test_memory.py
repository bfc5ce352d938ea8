"""The estimate of activation memory against the storages that are alive during a training pass on the CPU."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from revisual_fast import PolicyObjective, TokenBatch, linear_policy_loss
from revisual_fast.kernels.plan import CHUNK_BYTES
from revisual_fast.packing import PackedBatch
from revisual_fast.packing.cost import ModelShape, VisionShape
from revisual_fast.packing.memory import activation_bytes
from revisual_fast.policy.model import Policy
from tests import models
from tests.groups import make_groups
from tests.memory import LiveStorages

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 1024,
}
MAIN, F32, BF16 = "qwen2_5_vl", torch.float32, torch.bfloat16
GRIDS = [(1, 16, 16), (1, 12, 20)]


def medium_config(model_type: str, sizes: dict[str, int]) -> Any:
    """A configuration of that family with the decoder's ``sizes``, a tower of four blocks, and heads of any width."""
    with mock.patch.dict(models.DECODER, sizes), mock.patch.dict(models.TOWER, depth=4):
        config = models.tiny_config(model_type)
    if hasattr(config, "vision_config"):
        text, vision = config.text_config, config.vision_config
        tower = {"embed_dim": 192, "hidden_size": text.hidden_size}  # as Qwen2-VL calls them
        if model_type != "qwen2_vl":
            tower = {"hidden_size": 192, "intermediate_size": 400, "out_hidden_size": text.hidden_size}
        for name, size in tower.items():
            setattr(vision, name, size)
        width = text.hidden_size // text.num_attention_heads
        if model_type == "qwen3_vl":
            text.head_dim = width
        sections = [width // 8, width * 3 // 16, width * 3 // 16]
        text.rope_parameters = {**text.rope_parameters, "mrope_section": sections}
    return config


def medium(model_type: str, dtype: torch.dtype = torch.float32) -> Policy:
    """A model of that family, so large that nothing constant matters."""
    policy = Policy(models.build(medium_config(model_type, SIZES), std=0.05).to(dtype))
    policy.model.train()
    return policy


def batch_of(policy: Policy, images: bool) -> PackedBatch:
    shapes = [(150, [grid] if images else [], [90, 60, 70, 110]) for grid in GRIDS]
    return policy.pack(make_groups(policy.family, shapes))


def train(policy: Policy, batch: PackedBatch) -> int:
    """A forward and backward pass; returns the bytes at its peak, weights and their gradients left out."""
    parameters = list(policy.model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    gradients = [p.grad for p in parameters if p.grad is not None]
    tokens = TokenBatch(torch.ones(len(batch.targets)), cu_seqlens=batch.cu_seqlens)
    with LiveStorages([*parameters, *gradients, *policy.model.buffers()]) as live:
        linear_policy_loss(
            policy.hidden(batch), policy.head_weight, batch.targets, tokens, PolicyObjective(), bias=policy.head_bias
        ).loss.backward()
    return live.peak


def estimate(policy: Policy, batch: PackedBatch, **options: Any) -> int:
    activations = activation_bytes(
        policy.family.shape,
        dtype_bytes=policy.head_weight.dtype.itemsize,
        attention="sdpa",
        vision_trained=policy.vision_trained,
        chunk_bytes=CHUNK_BYTES["cpu"],
        **options,
    )
    plan: Any = policy.plan(batch)
    gathered = {"queries": sum(plan.n_queries), "keys": sum(plan.n_keys)}
    return activations.peak(len(batch.ids), len(batch.targets), int(batch.grids.prod(1).sum()), **gathered)


CASES = [
    *((MAIN, dtype, c, images) for dtype in (F32, BF16) for c in (False, True) for images in ("none", "frozen", "yes")),
    *((name, *case, "none") for name in models.TEXT for case in ((F32, False), (BF16, True))),
    *((name, *case, "yes") for name in models.VISION if name != MAIN for case in ((F32, True), (BF16, False))),
]


@pytest.mark.parametrize(("model_type", "dtype", "checkpointing", "images"), CASES, ids=str)
def test_the_estimate_is_what_a_training_pass_takes(model_type, dtype, checkpointing, images):
    """Within a tenth: the estimate leaves out masks, index tensors and the scratch of the CPU's kernels."""
    policy = medium(model_type, dtype)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    if images == "frozen":
        policy.freeze_vision()
    batch = batch_of(policy, images != "none")
    assert estimate(policy, batch, checkpointing=checkpointing) == pytest.approx(train(policy, batch), rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_adapters(dtype, checkpointing):
    """peft's are in fp32 and keep copies of their inputs, which a model in bf16 notices."""
    peft = pytest.importorskip("peft")
    model = models.build(medium_config("qwen2", SIZES), std=0.05).to(dtype)
    policy = Policy(peft.get_peft_model(model, peft.LoraConfig(r=16, lora_dropout=0.0, target_modules="all-linear")))
    policy.model.train()
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(policy, images=False)
    expected = estimate(policy, batch, checkpointing=checkpointing, lora_rank=16, head_trained=False)
    assert expected == pytest.approx(train(policy, batch), rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_large_image_and_little_text(checkpointing):
    """The vision tower's backward pass is the peak, not the text tower's."""
    policy = medium(MAIN)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = policy.pack(make_groups(policy.family, [(20, [(1, 32, 32)], [30, 20])]))
    pixels = sum(image.nbytes for image in batch.pixel_values)  # of one image: not copied where they already lie
    wanted = pytest.approx(train(policy, batch) + pixels, rel=0.1)
    assert estimate(policy, batch, checkpointing=checkpointing) == wanted


SHAPE = ModelShape(2048, 36, 11008, 16, 2, 128, 151936)  # Qwen2.5-VL-3B, without its images
TOWER_3B = VisionShape(1280, 32, 3420, 16, 1176, 2, 2048, window=8, full_blocks=4, gated=True, rms_norm=True)


def test_what_the_estimate_grows_with():
    plain = activation_bytes(SHAPE, dtype_bytes=2, attention="sdpa", head_trained=False)
    assert plain.peak(2000) - plain.peak(1000) == 1000 * plain.per_token, "linear in the rows"
    wide = plain.peak(1000, keys=1700) - plain.peak(1000)
    assert wide == 700 * 36 * 2 * 2 * 2 * 128, "key and value in bf16, of two heads, in every layer"
    again = activation_bytes(SHAPE, dtype_bytes=2, checkpointing=True)
    assert again.per_token < plain.per_token / 10
    assert activation_bytes(SHAPE, dtype_bytes=2, liger=True).per_token < 0.8 * plain.per_token
    assert activation_bytes(SHAPE, dtype_bytes=4).per_token > plain.per_token * 1.5


def test_only_a_trained_tower_keeps_something():
    shape = replace(SHAPE, vision=TOWER_3B)
    frozen, trained = (activation_bytes(shape, dtype_bytes=2, vision_trained=on) for on in (False, True))
    assert (frozen.per_patch, frozen.patch_work) == (0, 0)
    assert frozen == activation_bytes(SHAPE, dtype_bytes=2)
    assert trained.peak(1000, 0, 400) == frozen.peak(1000) + 400 * trained.per_patch


def test_the_loss_takes_its_chunk_at_most():
    budget = 64 << 20
    full = activation_bytes(SHAPE, dtype_bytes=2, chunk_bytes=budget)
    free = replace(full, chunk=0)
    few, many, head = 10, 1000, 151936 * 2048
    assert full.peak(2000, few) - free.peak(2000, few) == few * 151936 * (4 + 2) - 2 * head, "one product: dW in bf16"
    assert full.peak(2000, many) - free.peak(2000, many) == budget
    assert free.head == 4 * head, "the gradient of the weight in fp32"


def test_a_superchunk_has_a_budget_of_its_own():
    chunk, superchunk, head = 2 << 30, 5 << 29, 151936 * 2048
    full = activation_bytes(SHAPE, dtype_bytes=2, chunk_bytes=chunk, superchunk_bytes=superchunk)
    full = replace(full, row_work=0)  # no layer's backward pass is the peak
    free = replace(full, chunk=0, superchunk=0, head=0, head_once=0)
    for targets, wanted in (
        (1000, 151936 * 2000 + max(151936 * 4000, 2 * head)),
        (8192, 151936 * 2 * 8192 + chunk),  # one product, for which the logits make room
        (10_000, superchunk + chunk + 4 * head),
    ):
        assert full.peak(2000, targets) - free.peak(2000, targets) == wanted
    wide = activation_bytes(SHAPE, dtype_bytes=4, chunk_bytes=chunk, superchunk_bytes=superchunk)
    assert wide.logits == 0, "they become the gradient"


def test_the_line_for_a_run():
    estimate = activation_bytes(replace(SHAPE, vision=TOWER_3B), dtype_bytes=2, checkpointing=True)
    line = estimate.describe(16384)
    assert line == "activations: 331 KiB a token, 97.9 KiB an image patch, 5.2 GiB for micro_batch_tokens 16384 of text"


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="8 bytes a number"):
        activation_bytes(SHAPE, dtype_bytes=8)


def test_storages_are_counted_while_they_live():
    weight = torch.zeros(100)
    with LiveStorages([weight]) as live:
        a = torch.ones(1000)
        view = a.view(10, 100)
        a.add_(1)
        assert (live.now, live.peak) == (4000, 4000)
        del a
        assert live.now == 4000, "the view holds it"
        b = view + weight.view(1, 100)
        del view
        assert (live.now, live.peak) == (4000, 8000)
        del b
        torch.mul(weight, 2, out=weight)
    assert (live.now, live.peak) == (0, 8000)


def test_the_peak_of_an_autograd_pass_is_known():
    """x and exp(x) are kept; backward adds the gradient of exp's input while they are there."""
    x = torch.zeros(1000, requires_grad=True)
    with LiveStorages([x]) as live:
        y = x.exp().exp()
        assert live.now == 8000
        y.sum().backward()
        assert live.peak == 8000 + 4 + 4 + 2 * 4000
