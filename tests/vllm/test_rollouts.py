"""Completions from vLLM against transformers' generate, the embedded engine, and the trainer's own log-probs."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast.packing import Group
from revisual_fast.policy.model import Policy
from revisual_fast.rollout.engine import RequestError, Sampling
from revisual_fast.rollout.hf import HFEngine
from tests.groups import make_prompt
from tests.vllm.engines import MAX_LENGTH, Engines, Vllm, trainer_logp, transformers_greedy

TOKENS = 24


@pytest.fixture(scope="module")
def vllm(engines: Engines, tiny_vl: Path) -> Vllm:
    return engines.get("fp32", tiny_vl)


@pytest.fixture(scope="module")
def vllm_bf16(engines: Engines, tiny_vl: Path) -> Vllm:
    return engines.get("bf16", tiny_vl, dtype="bfloat16")


def flat(groups: Any) -> Tensor:
    return torch.cat([r.logp for group in groups for r in group])


def test_greedy_equals_transformers_and_the_embedded_engine(vllm: Vllm) -> None:
    eos = vllm.processor.eos_token_ids
    got = vllm.greedy(TOKENS)
    assert got == [transformers_greedy(vllm.policy, p, eos, TOKENS) for p in vllm.prompts]
    embedded = HFEngine(vllm.policy, eos).generate(vllm.prompts, 1, Sampling(TOKENS, temperature=0))
    assert got == [group[0].ids.tolist() for group in embedded]
    assert len({tuple(ids) for ids in got}) == len(got)  # the prompts matter


def test_a_greedy_group_is_one_answer_repeated(vllm: Vllm) -> None:
    once, thrice = (vllm.generate(Sampling(8, temperature=0), n) for n in (1, 3))
    for (single,), group in zip(once, thrice, strict=True):
        assert [r.ids.tolist() for r in group] == [single.ids.tolist()] * 3


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(TOKENS, temperature=0, seed=1),
        Sampling(TOKENS, temperature=1.0, seed=2),
        Sampling(TOKENS, temperature=0.7, seed=3),
    ],
)
def test_log_probs_equal_the_trainers_in_fp32(vllm: Vllm, sampling: Sampling) -> None:
    groups = vllm.generate(sampling, 4)
    expected = trainer_logp(vllm.policy, vllm.prompts, groups, sampling.temperature or 1.0)
    torch.testing.assert_close(flat(groups), expected, rtol=1e-4, atol=1e-4)


def test_log_probs_equal_the_trainers_within_bf16_error(vllm_bf16: Vllm) -> None:
    """Against fp64 with the same weights, the engine is no further off than twice what the trainer is."""
    groups = vllm_bf16.generate(Sampling(TOKENS, temperature=1.0, seed=4), 4)
    trainer = trainer_logp(vllm_bf16.policy, vllm_bf16.prompts, groups, 1.0)
    exact_policy = Policy(copy.deepcopy(vllm_bf16.policy.base).double())
    packed = [Group(p, [r.ids for r in g]) for p, g in zip(vllm_bf16.prompts, groups, strict=True)]
    with torch.no_grad():
        batch = exact_policy.pack(packed)
        logits = exact_policy.family.head(exact_policy.hidden(batch))
    exact = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    ours, theirs = (trainer - exact).abs(), (flat(groups) - exact).abs()
    assert theirs.mean() < 2 * ours.mean()
    assert theirs.max() < 2 * ours.max()


@pytest.mark.parametrize("truncation", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.8}])
def test_log_probs_are_of_the_truncated_distribution(vllm: Vllm, truncation: dict[str, Any]) -> None:
    """Those of the ids that are kept add up to one, so each is the trainer's, raised by the same amount."""
    sampling = Sampling(6, temperature=0.8, seed=5, **truncation)
    groups = vllm.generate(sampling, 4)
    packed = [Group(p, [r.ids for r in g]) for p, g in zip(vllm.prompts, groups, strict=True)]
    with torch.no_grad():
        batch = vllm.policy.pack(packed)
        logp = (vllm.policy.logits(vllm.policy.hidden(batch)) / sampling.temperature).log_softmax(-1)
    ordered = logp.sort(descending=True)
    keep = torch.ones_like(logp, dtype=torch.bool)
    if sampling.top_k:
        keep &= torch.arange(logp.shape[1]) < sampling.top_k
    within = ordered.values.masked_fill(~keep, -torch.inf).softmax(-1)
    keep &= within.cumsum(-1) - within < sampling.top_p
    kept = ordered.values.masked_fill(~keep, -torch.inf).logsumexp(-1)
    expected = logp.gather(1, batch.targets[:, None])[:, 0] - kept
    torch.testing.assert_close(flat(groups), expected, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_completions(vllm: Vllm) -> None:
    one, same, other = (
        [[r.ids.tolist() for r in g] for g in vllm.generate(Sampling(12, seed=s), 4)] for s in (1, 1, 2)
    )
    assert one == same
    assert one != other
    assert all(len({tuple(ids) for ids in group}) > 1 for group in one)  # completions of a group differ


def test_an_answer_does_not_depend_on_its_neighbours(vllm: Vllm) -> None:
    """Not on the prompts beside it, nor on what of it was cached before."""
    together = vllm.greedy(12)
    assert [vllm.generate(Sampling(12, temperature=0), 1, [p])[0][0].ids.tolist() for p in vllm.prompts] == together


def test_completions_end_with_the_models_eos_or_at_the_limit(vllm: Vllm) -> None:
    eos = set(vllm.processor.eos_token_ids)
    assert vllm.probe()["eos"] == eos
    rollouts = [r for g in vllm.generate(Sampling(60, temperature=2.0, seed=6), 16) for r in g]
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        assert len(r.ids) == len(r.logp)
        assert r.finished == (int(r.ids[-1]) in eos)
        assert eos.isdisjoint(r.ids[:-1].tolist())
        assert r.finished or len(r.ids) == 60


def test_a_prompt_and_its_image_are_computed_once_for_all_its_completions(vllm: Vllm) -> None:
    vllm.update()  # the caches are empty
    prompt = make_prompt(vllm.policy.family, 300, [(1, 4, 4)], 99)
    vllm.probe()
    vllm.generate(Sampling(1), 8, [prompt])
    found = vllm.probe()
    assert found["images"] == 1
    length, block = len(prompt.ids), 128
    assert found["tokens"] == length + 7 * (length % block)


def test_two_prompts_with_one_image_encode_it_once(vllm: Vllm) -> None:
    vllm.update()
    prompts = [make_prompt(vllm.policy.family, 9, [(1, 4, 4)], seed, keys="a") for seed in (1, 2)]
    vllm.probe()
    vllm.generate(Sampling(2), 2, prompts)
    assert vllm.probe()["images"] == 1


def test_a_request_that_cannot_be_served_names_its_prompt(vllm: Vllm) -> None:
    prompts = [vllm.prompts[0], make_prompt(vllm.policy.family, MAX_LENGTH, [], 1)]
    with pytest.raises(RequestError, match=r"prompt 1: a prompt of 512 and a response of 4 tokens"):
        vllm.generate(Sampling(4), 2, prompts)
    broken = dataclasses.replace(vllm.prompts[2], grids=torch.tensor([[1, 4, 4], [1, 2, 4]]))
    with pytest.raises(RequestError, match="image tokens"):
        vllm.generate(Sampling(4), 2, [broken])
    empty = dataclasses.replace(vllm.prompts[0], ids=vllm.prompts[0].ids[:0])
    with pytest.raises(RequestError, match=r"prompt 1: .*empty.*tried"):  # refused by vLLM itself
        vllm.generate(Sampling(4), 2, [vllm.prompts[0], empty])
    vllm.greedy(4)
    assert vllm.engine.counts["restarts"] == 0, "the engine is well"


def test_what_a_cpu_cannot_do_is_refused(vllm: Vllm) -> None:
    from revisual_fast.rollout.engine import EngineError

    with pytest.raises(EngineError, match="CUDA only"):
        vllm.connection.call("sleep", level=1)
    vllm.greedy(4)
