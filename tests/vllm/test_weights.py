"""The engine follows the policy's weights: what is sent, that it arrives, and that nothing of the old ones stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from revisual_fast.rollout.engine import EngineError, Sampling
from revisual_fast.rollout.weights import WeightSource
from tests.vllm.engines import Engines, Vllm, transformers_greedy

TOKENS = 16


@pytest.fixture(scope="module")
def vllm(engines: Engines, tiny_vl: Path) -> Vllm:
    return engines.get("untied", tiny_vl)


@pytest.fixture(scope="module")
def tied(engines: Engines, tiny_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Vllm:
    """The tiny model with one matrix for both ends, and with LoRA."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(tiny_vl, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    return engines.get("tied", folder, lora={"rank": 4, "target_modules": ["q_proj", "up_proj", "o_proj"]})


def disturb(vllm: Vllm, chosen: Callable[[str, nn.Parameter], bool] = lambda name, p: True) -> None:
    """Change the weights that are trained, and ``chosen``, by much."""
    rng = torch.Generator().manual_seed(vllm.version)
    with torch.no_grad():
        for name, parameter in vllm.policy.model.named_parameters():
            if parameter.requires_grad and chosen(name, parameter):
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.add_(noise, alpha=0.5 * float(parameter.std()) if parameter.std() else 0.1)


def expect_the_policys_answers(vllm: Vllm) -> None:
    eos = vllm.processor.eos_token_ids
    assert vllm.greedy(TOKENS) == [transformers_greedy(vllm.policy, p, eos, TOKENS) for p in vllm.prompts]


def named(vllm: Vllm, part: str) -> set[str]:
    return {entry.name for entry in WeightSource(vllm.policy).entries() if part in entry.name}


def test_after_an_update_the_outputs_follow(vllm: Vllm) -> None:
    before = vllm.greedy(TOKENS)
    for _ in range(2):
        disturb(vllm)
        vllm.update()  # compares the fingerprints as well
        after = vllm.greedy(TOKENS)
        assert all(a != b for a, b in zip(before, after, strict=True))
        expect_the_policys_answers(vllm)
        before = after


def test_all_weights_are_sent_once(vllm: Vllm) -> None:
    entries = WeightSource(vllm.policy).entries()
    sync = vllm.update()
    assert sync.tensors == len(entries) == len(list(vllm.policy.base.parameters()))
    assert sync.bytes == sum(p.nbytes for p in vllm.policy.base.parameters())
    assert sync.seconds > 0


def test_an_update_leaves_no_trace_in_the_log(vllm: Vllm) -> None:
    """vLLM would warn of every layer that gets no weights."""
    size = vllm.connection.log.stat().st_size
    vllm.update()
    assert vllm.connection.log.stat().st_size == size


def test_nothing_of_an_update_stays_and_memory_does_not_grow(vllm: Vllm) -> None:
    used = []
    for step in range(20):
        vllm.generate(Sampling(4, seed=step), 2)
        found = vllm.probe()
        assert found["cached_images"] > 0
        assert found["cached_blocks"] > 0
        vllm.update()
        found = vllm.probe()
        assert found["cached_images"] == 0
        assert found["cached_blocks"] == 0
        used.append(vllm.engine.memory())
    assert used[-1] - used[4] < 2**24  # the weights alone are 6 MiB, a leak would be 15 times that


def test_a_wrong_weight_is_found_by_name(vllm: Vllm) -> None:
    assert vllm.differences() == []
    vllm.connection.call("spoil", parameter="language_model.model.layers.2.mlp.gate_up_proj.weight")
    vllm.connection.call("spoil", parameter="visual.patch_embed.proj.weight")
    layer, patch = vllm.differences()
    assert "model.language_model.layers.2.mlp.gate_proj.weight" in layer
    assert "model.language_model.layers.2.mlp.up_proj.weight" in layer
    assert "model.visual.patch_embed.proj.weight" in patch
    vllm.policy.freeze_vision()
    vllm.engine._trained = frozenset()  # as if the tower had not been trained before
    disturb(vllm)
    with pytest.raises(EngineError, match=r"model\.visual\.patch_embed\.proj\.weight"):
        vllm.update()
    vllm.update()  # the engine is a new one, so that it gets everything
    assert vllm.differences() == []


def test_a_frozen_tower_is_not_sent_again(vllm: Vllm) -> None:
    vllm.policy.freeze_vision()
    vllm.update()
    disturb(vllm)
    sync = vllm.update()
    tower = named(vllm, "visual")
    assert tower
    sizes = {entry.name: entry.bytes for entry in WeightSource(vllm.policy).entries() if entry.name not in tower}
    assert (sync.tensors, sync.bytes) == (len(sizes), sum(sizes.values()))
    expect_the_policys_answers(vllm)


def test_a_part_of_a_fused_weight_takes_the_whole_with_it(vllm: Vllm) -> None:
    for name, parameter in vllm.policy.model.named_parameters():
        parameter.requires_grad_("layers.1.self_attn.k_proj.weight" in name)
    vllm.update()
    disturb(vllm)
    sync = vllm.update()
    assert sync.tensors == len(named(vllm, "layers.1.self_attn")) == 7
    expect_the_policys_answers(vllm)


def test_merged_adapters_arrive_with_all_that_is_fused_with_them(tied: Vllm) -> None:
    assert tied.policy.head_weight is tied.policy.family.embedding.weight
    expect_the_policys_answers(tied)
    before = tied.greedy(TOKENS)
    disturb(tied)
    sync = tied.update()
    assert sync.tensors == len(named(tied, "self_attn") | named(tied, ".mlp.") - named(tied, "merger"))
    expect_the_policys_answers(tied)
    assert tied.greedy(TOKENS) != before


def test_a_trained_tied_embedding_reaches_both_ends(tied: Vllm) -> None:
    table = tied.policy.family.embedding.weight
    table.requires_grad_(True)
    tied.update()
    before = tied.greedy(TOKENS)
    disturb(tied, lambda name, parameter: parameter is table)
    sync = tied.update()
    assert sync.tensors > 1
    assert tied.greedy(TOKENS) != before
    expect_the_policys_answers(tied)


def test_tensor_parallel_workers_get_their_shares(engines: Engines, tiny_vl: Path) -> None:
    vllm = engines.get("two", tiny_vl, tensor_parallel=2)
    assert vllm.connection.call("world_size") == 2
    expect_the_policys_answers(vllm)
    vllm.policy.freeze_vision()
    disturb(vllm)
    vllm.update()
    expect_the_policys_answers(vllm)
