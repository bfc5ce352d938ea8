"""The embedded engine against transformers' generate and against the trainer's own log-probs."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from revisual_fast.config import ModelConfig
from revisual_fast.packing import Group
from revisual_fast.policy.load import load_policy
from revisual_fast.rollout.decode import GROW, DecodePlan
from revisual_fast.rollout.engine import EngineError, Sampling, Sync
from revisual_fast.rollout.hf import HFEngine
from revisual_fast.rollout.sample import sample
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
        {"max_cached_tokens": 2 * 30 + 2 * 2 * LONG.max_tokens},
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
    """Notes the size of every packed prefill and how much every step caches, and does nothing else."""

    def __init__(self, policy, monkeypatch):
        self.prefills: list[int] = []
        self.caches: list[tuple[int, int, int, int]] = []  # prompts, longest of them, sequences, columns
        states, advance = policy.states, DecodePlan.advance
        monkeypatch.setattr(policy, "states", lambda b, plan: (self.prefills.append(len(b.ids)), states(b, plan))[1])
        monkeypatch.setattr(DecodePlan, "advance", lambda plan: (advance(plan), self.note(plan))[0])

    def note(self, plan):
        layer = plan.layers[0]
        assert layer.prompt_key.shape == layer.prompt_value.shape
        assert layer.key.shape == layer.value.shape
        self.caches.append((layer.prompt_key.shape[0], layer.prompt_key.shape[2], *layer.key.shape[0:3:2]))

    @property
    def most(self) -> int:
        return max(prompts * longest + rows * width for prompts, longest, rows, width in self.caches)


def test_budgets_bound_the_prefill_and_the_cache(policy, prompts, monkeypatch):
    sizes = [len(p.ids) for p in prompts]
    spy = Spy(policy, monkeypatch)
    budget = 2 * max(sizes[:2]) + 2 * 2 * 300
    HFEngine(policy, [], max_cached_tokens=budget, prefill_tokens=max(sizes)).generate(prompts, 2, Sampling(300))
    assert sum(spy.prefills) == sum(sizes)
    assert max(spy.prefills) <= max(sizes)
    assert spy.most <= budget
    assert spy.caches[0] == (2, max(sizes[:2]), 4, GROW), "a prompt is cached once"

    spy = Spy(policy, monkeypatch)
    HFEngine(policy, [], max_cached_tokens=1, max_batch=1).generate(prompts[:2], 3, Sampling(2))
    assert spy.prefills == sizes[:2]
    assert [rows for _, _, rows, _ in spy.caches] == [3] * 4


def test_a_cache_grows_by_a_quarter_but_not_past_what_is_needed(policy, prompts, monkeypatch):
    spy = Spy(policy, monkeypatch)
    HFEngine(policy, []).generate([prompts[3]], 1, Sampling(600, temperature=0))
    widths = sorted({width for *_, width in spy.caches})
    expected = [GROW]
    while expected[-1] < 600:
        expected.append(min(expected[-1] + max(GROW, expected[-1] // 4), 600))
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


# Sampling


def draw(logits, sampling, seed=0):
    """20,000 draws from one row of logits."""
    uniform = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return sample(logits.expand(len(uniform), -1), sampling, uniform)


@pytest.mark.parametrize("vocab", [4, 256, 257, 1000])
def test_sampling_follows_the_distribution(vocab):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    for temperature in (1.0, 2.0):
        drawn = draw(logits, Sampling(1, temperature=temperature))
        expected = (logits / temperature).log_softmax(-1)
        share = torch.bincount(drawn.token, minlength=vocab) / len(drawn.token)
        torch.testing.assert_close(share, expected.exp(), atol=0.012, rtol=0)
        torch.testing.assert_close(drawn.logp, expected[drawn.token], rtol=1e-5, atol=1e-6)
        assert drawn.kept is None


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"top_k": 2}, 2), ({"top_p": 0.7}, 2), ({"top_k": 3, "top_p": 0.95}, 3), ({"top_k": 3, "top_p": 0.9}, 2)],
)
def test_sampling_follows_the_truncated_distribution(options, kept):
    logits = torch.tensor([-1.0, 2.0, 0.0, 1.0])  # probabilities 0.03, 0.64, 0.09, 0.24
    ids = logits.argsort(descending=True)[:kept]
    drawn = draw(logits, Sampling(1, masks=True, **options))
    expected = torch.full((4,), -torch.inf)
    expected[ids] = logits[ids].log_softmax(-1)
    share = torch.bincount(drawn.token, minlength=4) / len(drawn.token)
    torch.testing.assert_close(share, expected.exp(), atol=0.015, rtol=0)
    torch.testing.assert_close(drawn.logp, expected[drawn.token], rtol=1e-5, atol=1e-6)
    counts, indices = drawn.kept
    assert counts.tolist() == [kept] * len(drawn.token)
    assert indices.view(-1, kept).unique(dim=0).tolist() == [ids.sort().values.tolist()]


def test_no_draw_leaves_the_kept_ids():
    """Not even at the ends of the distribution function, in a vocabulary of many blocks."""
    logits = torch.randn(64, 700, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.0, 1e-300, 1 - 2**-53, 1 - 2**-52], dtype=torch.float64)
    for sampling in (Sampling(1, top_k=3, masks=True), Sampling(1, top_p=0.01, masks=True)):
        for uniform in ends:
            drawn = sample(logits, sampling, uniform.expand(64))
            for token, ids in zip(drawn.token, drawn.kept[1].split(drawn.kept[0].tolist()), strict=True):
                assert token in ids
            assert (drawn.logp <= 1e-6).all()


@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8}, {}])
def test_masks_and_log_probs_are_those_of_the_distribution_sampled_from(policy, prompts, options):
    """Recomputed from the trainer's own logits."""
    sampling = Sampling(14, temperature=0.7, seed=4, masks=True, **options)
    engine = HFEngine(policy, [eos_for(policy, prompts)], max_batch=8)
    rollouts = engine.generate(prompts, 3, sampling)
    groups = [Group(p, [r.ids for r in g]) for p, g in zip(prompts, rollouts, strict=True)]
    with torch.no_grad():
        scaled = policy.logits(policy.hidden(policy.pack(groups))) / sampling.temperature
    rows = iter(scaled)
    for rollout in (r for g in rollouts for r in g):
        if not options:
            assert rollout.mask is None, "nothing was left out"
            logp = torch.stack([next(rows).log_softmax(-1)[t] for t in rollout.ids])
            torch.testing.assert_close(rollout.logp, logp, rtol=1e-4, atol=1e-5)
            continue
        indptr, indices = rollout.mask
        assert indptr.dtype == indices.dtype == torch.int64
        assert len(indptr) == len(rollout.ids) + 1
        assert indptr[0] == 0
        assert indptr[-1] == len(indices)
        for i, token in enumerate(rollout.ids):
            logits, mine = next(rows), indices[indptr[i] : indptr[i + 1]]
            assert set(mine.tolist()) == kept_ids(logits, sampling)
            assert token in mine
            expected = logits[mine].log_softmax(-1)[mine == token]
            torch.testing.assert_close(rollout.logp[i : i + 1], expected, rtol=1e-4, atol=1e-5)


def kept_ids(logits, sampling):
    """One id after the other, from the most likely one on."""
    order = logits.argsort(descending=True)[: sampling.top_k or None]
    total, kept = 0.0, set()
    for index, p in zip(order.tolist(), logits[order].softmax(-1).tolist(), strict=True):
        if total >= sampling.top_p:
            break
        kept.add(index)
        total += p
    return kept


def test_greedy_log_probs_are_those_of_the_whole_distribution(policy, prompts):
    rollouts = HFEngine(policy, []).generate(prompts, 1, Sampling(9, temperature=0, top_k=2, masks=True))
    groups = [Group(p, [r.ids for r in g]) for p, g in zip(prompts, rollouts, strict=True)]
    with torch.no_grad():
        expected = packed_logp(policy, groups)
    torch.testing.assert_close(torch.cat([r.logp for (r,) in rollouts]), expected, rtol=1e-5, atol=1e-5)
    assert all(r.mask is None for (r,) in rollouts)


def test_logits_that_are_not_numbers_are_told(policy, prompts):
    bias = torch.nn.Parameter(torch.full((policy.head_weight.shape[0],), torch.nan))
    policy.family.head.bias = bias
    try:
        for temperature in (0.0, 1.0):
            with pytest.raises(EngineError, match="not numbers"):
                HFEngine(policy, []).generate(prompts, 2, Sampling(3, temperature=temperature))
    finally:
        policy.family.head.bias = None


# Who is decoded when


def ids_of(rollouts):
    return [[r.ids.tolist() for r in group] for group in rollouts]


@pytest.mark.parametrize("budgets", [{"max_batch": 6}, {"max_batch": 1}, {"prefill_tokens": 1}, {"max_batch": 9}])
def test_samples_do_not_depend_on_the_budgets(policy, prompts, budgets):
    sampling = Sampling(40, seed=11, top_p=0.9)
    eos = [eos_for(policy, prompts)]
    whole = HFEngine(policy, eos).generate(prompts, 3, sampling)
    assert len({len(ids) for group in ids_of(whole) for ids in group}) > 3, "they end at different times"
    assert ids_of(whole) == ids_of(HFEngine(policy, eos, **budgets).generate(prompts, 3, sampling))
    assert ids_of(whole)[:2] == ids_of(HFEngine(policy, eos).generate(prompts[:2], 3, sampling))


def test_a_prompt_that_comes_twice_gets_other_samples(policy, prompts):
    first, second = ids_of(HFEngine(policy, []).generate([prompts[0]] * 2, 2, Sampling(10)))
    assert first != second
    assert first[0] != first[1]


def test_waiting_prompts_take_the_place_of_finished_sequences(policy, prompts, monkeypatch):
    many = [make_prompt(policy.family, 5 + seed, [], seed) for seed in range(12)]
    eos = eos_for(policy, many)
    spy = Spy(policy, monkeypatch)
    rollouts = HFEngine(policy, [eos], max_batch=8).generate(many, 2, Sampling(40, seed=1))
    lengths = [len(r.ids) for g in rollouts for r in g]
    assert 1 < min(lengths) < max(lengths) == 40, "or the test shows nothing"
    in_turn = sum(max(lengths[i : i + 8]) for i in range(0, len(lengths), 8))
    assert len(spy.caches) < in_turn, "steps"
    assert max(rows for _, _, rows, _ in spy.caches) <= 8
    assert max(width for *_, width in spy.caches) <= 40, "columns that nobody looks at are dropped"


def test_finished_sequences_are_not_decoded_on(policy, prompts, monkeypatch):
    eos = eos_for(policy, prompts)
    spy = Spy(policy, monkeypatch)
    rollouts = HFEngine(policy, [eos]).generate(prompts, 8, Sampling(60, seed=2))
    drawn = sum(rows for _, _, rows, _ in spy.caches)
    needed = sum(len(r.ids) for g in rollouts for r in g)
    assert needed < 0.75 * 60 * 32, "or the test shows nothing"
    assert needed <= drawn < 1.34 * needed


@pytest.mark.parametrize("max_batch", [1024, 4])
def test_every_group_is_told_once_when_it_is_complete(policy, prompts, max_batch):
    engine = HFEngine(policy, [eos_for(policy, prompts)], max_batch=max_batch)
    told: dict[int, list] = {}

    def on_group(index, rollouts):
        assert index not in told
        told[index] = rollouts

    rollouts = engine.generate(prompts, 2, Sampling(30, seed=9), on_group)
    assert sorted(told) == list(range(len(prompts)))
    assert all(told[i] is group for i, group in enumerate(rollouts))
    assert len(told[0]) == 2


def test_a_group_is_told_while_others_are_decoded(policy, prompts, monkeypatch):
    spy, when = Spy(policy, monkeypatch), []
    engine = HFEngine(policy, [], max_batch=2)
    engine.generate(prompts, 2, Sampling(5), lambda index, rollouts: when.append((index, len(spy.caches))))
    assert when == [(0, 5), (1, 10), (2, 15), (3, 20)]


def test_finish_reasons_and_version(policy, prompts):
    engine = HFEngine(policy, [])
    whole = engine.generate(prompts[:1], 1, Sampling(12, temperature=0))[0][0]
    assert (whole.finish_reason, whole.finished, whole.version, len(whole.ids)) == ("length", False, 0, 12)
    last = int(whole.ids[-1])
    end = whole.ids.tolist().index(last) + 1
    engine = HFEngine(policy, [last])
    assert engine.update_weights(policy, 7) == Sync()
    exact = engine.generate(prompts[:1], 1, Sampling(end, temperature=0))[0][0]
    assert (exact.finish_reason, exact.finished, exact.version) == ("stop", True, 7), "the end at the limit is an end"


def test_what_an_engine_without_a_process_has_nothing_to_do_for(policy):
    engine = HFEngine(policy, [])
    engine.sleep(2)
    engine.wake_up(["weights"])
    assert engine.memory() == 0
    assert set(engine.counts.values()) == {0}
    engine.close()


def test_new_weights_are_sampled_from(tiny_vl, prompts):
    config = ModelConfig(path=str(tiny_vl), dtype="float32", device="cpu")
    one, other = load_policy(tiny_vl, config), load_policy(tiny_vl, config)
    with torch.no_grad():
        other.head_weight.mul_(-1)
    engine = HFEngine(one, [])
    before = ids_of(engine.generate(prompts, 1, Sampling(8, temperature=0)))
    engine.update_weights(other, 1)
    after = engine.generate(prompts, 1, Sampling(8, temperature=0))
    assert before != ids_of(after) == ids_of(HFEngine(other, []).generate(prompts, 1, Sampling(8, temperature=0)))
    assert {r.version for g in after for r in g} == {1}


# Images


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("budgets", [{}, {"prefill_tokens": 1}, {"max_batch": 1}])
def test_an_image_is_encoded_once(tiny_vl, monkeypatch, frozen, budgets):
    """However many completions its prompt has, and however many prompts show it."""
    policy = load_policy(tiny_vl, ModelConfig(path=str(tiny_vl), dtype="float32", device="cpu"))
    if frozen:
        policy.freeze_vision()
    keys, grids = ["ab", "b", "a", "c"], [(1, 4, 4), (1, 2, 2)]
    shown = [
        make_prompt(policy.family, 6 + i, [grids[key != "a"] for key in names], i, names)
        for i, names in enumerate(keys)
    ]
    patches: list[int] = []
    encode = policy.family.encode_images

    def counted(pixels, of):
        patches.append(len(pixels))
        return encode(pixels, of)

    monkeypatch.setattr(policy.family, "encode_images", counted)
    engine = HFEngine(policy, [], **budgets)
    first = engine.generate(shown, 8, Sampling(6, temperature=0))
    assert sum(patches) == 16 + 4 + 4
    assert policy._again == {}, "nothing is kept from weights that change"
    again = engine.generate(shown, 8, Sampling(6, temperature=0))
    assert sum(patches) == (24 if frozen else 48)
    assert ids_of(first) == ids_of(again)
    alone = [HFEngine(policy, []).generate([p], 1, Sampling(6, temperature=0))[0][0].ids.tolist() for p in shown]
    assert [group[0] for group in ids_of(first)] == alone


def test_positions_go_on_after_an_image(policy, monkeypatch):
    """The tokens after an image stand closer to it than their count says, for all three axes."""
    prompt = make_prompt(policy.family, 6, [(1, 8, 4)], 0)
    seen = []
    run = policy.family.run_text

    def spied(embeddings, positions, *rest):
        seen.append(positions[:, 0])
        return run(embeddings, positions, *rest)

    monkeypatch.setattr(policy.family, "run_text", spied)
    HFEngine(policy, []).generate([prompt], 3, Sampling(4, temperature=0))
    top = 6 - 1 + 4  # the image takes as many positions as its longer side
    assert len(prompt.ids) == 6 + 8
    assert int(seen[0].max()) == top
    for step, positions in enumerate(seen[1:]):
        assert positions.tolist() == [[top + 1 + step] * 3] * 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_half_precision_attends_in_fp32(tiny_vl, dtype):
    """The engine's log-probs are the trainer's, up to the rounding of the dtype."""
    policy = load_policy(tiny_vl, ModelConfig(path=str(tiny_vl), dtype=dtype, device="cpu"))
    some = [make_prompt(policy.family, 9, [(1, 4, 4)], 0), make_prompt(policy.family, 17, [], 1)]
    rollouts = HFEngine(policy, []).generate(some, 4, Sampling(24, seed=1))
    groups = [Group(p, [r.ids for r in g]) for p, g in zip(some, rollouts, strict=True)]
    with torch.no_grad():
        expected = packed_logp(policy, groups)
    gap = (torch.cat([r.logp for g in rollouts for r in g]) - expected).abs()
    assert gap.mean() < (1e-6 if dtype == "float32" else 0.02)
