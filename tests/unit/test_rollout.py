"""The embedded engine against transformers' generate and against the trainer's own log-probs."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from revisual_fast.config import ModelConfig
from revisual_fast.packing import Group
from revisual_fast.policy.load import load_policy
from revisual_fast.rollout.engine import Sampling
from revisual_fast.rollout.hf import GROW, DecodePlan, HFEngine, sample
from tests.groups import make_prompt, packed_logp


@pytest.fixture(scope="module")
def policy(tiny_vl: Path):
    return load_policy(tiny_vl, ModelConfig(path=str(tiny_vl), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def prompts(policy):
    shapes = [(5, []), (11, [(1, 2, 2)]), (7, [(1, 4, 4), (1, 2, 2)]), (30, [])]
    return [make_prompt(policy.family, text, grids, seed) for seed, (text, grids) in enumerate(shapes)]


def eos_for(policy, prompts) -> int:
    """A token that random weights do produce, so that some sequences end early."""
    groups = HFEngine(policy, []).generate(prompts, 4, Sampling(12, seed=3))
    tokens = torch.cat([r.ids for group in groups for r in group])
    return int(tokens.mode().values)


def test_greedy_equals_transformers_generate(policy, prompts, tiny_vl):
    plain = AutoModelForImageTextToText.from_pretrained(tiny_vl, dtype=torch.float32)
    eos = eos_for(policy, prompts)
    ours = HFEngine(policy, [eos]).generate(prompts, 1, Sampling(12, temperature=0))
    for prompt, (rollout,) in zip(prompts, ours, strict=True):
        ids = prompt.ids[None]
        images = {}
        if prompt.pixel_values is not None:
            images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grids}
        types = (ids == policy.family.image_token_id).int()
        out = plain.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=types,
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=eos,
            pad_token_id=0,
            **images,
        )
        assert rollout.ids.tolist() == out[0, ids.shape[1] :].tolist()


def test_log_probs_equal_the_trainers(policy, prompts):
    engine = HFEngine(policy, [eos_for(policy, prompts)])
    rollouts = engine.generate(prompts, 5, Sampling(20, temperature=1.0, seed=1))
    groups = [Group(p, [r.ids for r in g]) for p, g in zip(prompts, rollouts, strict=True)]
    with torch.no_grad():
        expected = packed_logp(policy, groups)
    got = torch.cat([r.logp for g in rollouts for r in g])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_sequences_end_at_eos_or_at_the_limit(policy, prompts):
    eos = eos_for(policy, prompts)
    rollouts = [r for g in HFEngine(policy, [eos]).generate(prompts, 8, Sampling(15, seed=2)) for r in g]
    assert any(r.finished for r in rollouts)
    assert any(not r.finished for r in rollouts)
    for r in rollouts:
        assert len(r.ids) == len(r.logp)
        assert (r.ids[:-1] != eos).all()
        assert r.finished == (r.ids[-1] == eos)
        assert r.finished or len(r.ids) == 15


def test_a_prompts_greedy_answer_does_not_depend_on_its_neighbours(policy, prompts):
    engine = HFEngine(policy, [eos_for(policy, prompts)])
    together = engine.generate(prompts, 2, Sampling(80, temperature=0))
    alone = [engine.generate([p], 1, Sampling(80, temperature=0))[0][0] for p in prompts]
    for group, single in zip(together, alone, strict=True):
        assert [r.ids.tolist() for r in group] == [single.ids.tolist()] * 2


LONG = Sampling(200, temperature=0)  # the cache grows twice


@pytest.mark.parametrize(
    "budgets",
    [
        {"max_batch": 4},
        {"max_batch": 1},  # below n
        {"max_cached_tokens": 2 * 2 * (30 + LONG.max_tokens)},
        {"max_cached_tokens": 1},
        {"prefill_tokens": 16},
        {"prefill_tokens": 1},
        {"max_batch": 6, "prefill_tokens": 20},
    ],
)
def test_greedy_answers_do_not_depend_on_the_budgets(policy, prompts, budgets):
    endless = [r.ids.tolist() for (r,) in HFEngine(policy, []).generate(prompts, 1, LONG)]
    eos = [next(t for t in endless[0][4:] if not all(t in ids for ids in endless))]  # ends some, not all
    expected, got = (HFEngine(policy, eos, **b).generate(prompts, 2, LONG) for b in ({}, budgets))
    assert {len(r.ids) == LONG.max_tokens for g in expected for r in g} == {True, False}
    for one, other in zip(expected, got, strict=True):
        assert [r.ids.tolist() for r in one] == [r.ids.tolist() for r in other]
        torch.testing.assert_close(torch.cat([r.logp for r in one]), torch.cat([r.logp for r in other]))


class Spy:
    """Notes the size of every packed prefill and the shape of every cache, and does nothing else."""

    def __init__(self, policy, monkeypatch):
        self.prefills: list[int] = []
        self.caches: list[tuple[int, int]] = []
        states, mask = policy.states, DecodePlan._mask
        monkeypatch.setattr(policy, "states", lambda b, plan: (self.prefills.append(len(b.ids)), states(b, plan))[1])
        monkeypatch.setattr(DecodePlan, "_mask", lambda plan: (mask(plan), self.caches.append(tuple(plan.mask.shape))))


def test_budgets_bound_the_prefill_and_the_cache(policy, prompts, monkeypatch):
    sizes = [len(p.ids) for p in prompts]
    spy = Spy(policy, monkeypatch)
    budget = 2 * 2 * (max(sizes[:2]) + 300)
    HFEngine(policy, [], max_cached_tokens=budget, prefill_tokens=max(sizes)).generate(prompts, 2, Sampling(300))
    assert sum(spy.prefills) == sum(sizes)
    assert max(spy.prefills) <= max(sizes)
    assert max(rows * width for rows, width in spy.caches) <= budget
    assert spy.caches[0] == (4, max(sizes[:2]) + GROW)

    spy = Spy(policy, monkeypatch)
    HFEngine(policy, [], max_cached_tokens=1, max_batch=1).generate(prompts[:2], 3, Sampling(2))
    assert spy.prefills == sizes[:2]
    assert {rows for rows, _ in spy.caches} == {3}


def test_a_cache_grows_by_a_quarter_but_not_past_what_is_needed(policy, prompts, monkeypatch):
    spy = Spy(policy, monkeypatch)
    size = len(prompts[3].ids)
    HFEngine(policy, []).generate([prompts[3]], 1, Sampling(600, temperature=0))
    widths = sorted({width for _, width in spy.caches})
    expected = [size + GROW]
    while expected[-1] < size + 600:
        expected.append(min(expected[-1] + max(GROW, expected[-1] // 4), size + 600))
    assert widths == expected


def test_any_end_of_sequence_token_ends_a_sequence(policy, prompts):
    endless = HFEngine(policy, []).generate(prompts, 1, Sampling(30, temperature=0))
    first, second = (endless[i][0].ids for i in (0, 1))
    ends = [int(first[5]), int(second[8])]
    ended = HFEngine(policy, ends).generate(prompts, 1, Sampling(30, temperature=0))
    for group, (whole,) in zip(ended, endless, strict=True):
        hits = torch.isin(whole.ids, torch.tensor(ends)).nonzero().flatten().tolist()
        assert group[0].finished == bool(hits)
        assert group[0].ids.tolist() == whole.ids[: hits[0] + 1 if hits else 30].tolist()


def test_equal_seeds_give_equal_rollouts_and_others_do_not(policy, prompts):
    engine = HFEngine(policy, [])
    first, again, other = (engine.generate(prompts, 2, Sampling(10, seed=s))[0][0].ids.tolist() for s in (5, 5, 6))
    assert first == again != other


def test_sampling_follows_the_truncated_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20000, 1)
    generator = torch.Generator().manual_seed(0)
    share = {}
    for name, sampling in {
        "all": Sampling(1, temperature=2.0),
        "top_k": Sampling(1, top_k=2),
        "top_p": Sampling(1, top_p=0.7),
    }.items():
        token, logp = sample(logits, sampling, generator)
        share[name] = torch.bincount(token, minlength=4) / len(token)
        scaled = (logits[0] / sampling.temperature).log_softmax(-1)
        assert torch.equal(logp, scaled[token])
    torch.testing.assert_close(share["all"], (logits[0] / 2).softmax(-1), atol=0.015, rtol=0)
    pair = logits[0, :2].softmax(-1)
    torch.testing.assert_close(share["top_k"], torch.cat([pair, torch.zeros(2)]), atol=0.015, rtol=0)
    torch.testing.assert_close(share["top_p"], torch.cat([pair, torch.zeros(2)]), atol=0.015, rtol=0)
