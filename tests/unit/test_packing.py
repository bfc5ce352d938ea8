"""Packed rows against transformers' own padded forward: values, gradients, and who can see whom."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from revisual_fast.config import ModelConfig
from revisual_fast.packing import Group, pack_groups, split_groups
from revisual_fast.policy.attention import SdpaPlan
from revisual_fast.policy.load import load_policy
from revisual_fast.policy.model import Policy

TEXT_IDS = (20, 60)  # ids of ordinary words in the tiny model's vocabulary


@dataclass
class FakePrompt:
    ids: torch.Tensor
    pixel_values: torch.Tensor | None
    grids: torch.Tensor
    image_keys: tuple[str, ...]


@pytest.fixture(scope="module")
def policy(tiny_vl: Path) -> Policy:
    return load_policy(tiny_vl, ModelConfig(path=str(tiny_vl), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def plain(tiny_vl: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(tiny_vl, dtype=torch.float32)


def make_prompt(family, text: int, grids: list[tuple[int, int, int]], seed: int, keys: str = "") -> FakePrompt:
    """``text`` random tokens with the images of ``grids`` between them."""
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(*TEXT_IDS, (text,), generator=rng)
    parts, pixels, names = [words[:1]], [], []
    for i, (t, h, w) in enumerate(grids):
        name = keys[i] if keys else f"{seed}/{i}"
        names.append(name)
        source = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        pixels.append(torch.randn(t * h * w, 3 * 2 * 14 * 14, generator=source))
        parts += [torch.full((t * h * w // 4,), family.image_token_id), words[1 + i : 2 + i]]
    parts.append(words[1 + len(grids) :])
    return FakePrompt(
        torch.cat(parts),
        torch.cat(pixels) if pixels else None,
        torch.tensor(grids, dtype=torch.long).reshape(-1, 3),
        tuple(names),
    )


def make_groups(family, shapes, seed: int = 0) -> list[Group]:
    """``shapes``: per group (text tokens, image grids, completion lengths)."""
    rng = torch.Generator().manual_seed(seed)
    return [
        Group(
            make_prompt(family, text, grids, seed + i),
            [torch.randint(*TEXT_IDS, (length,), generator=rng) for length in lengths],
        )
        for i, (text, grids, lengths) in enumerate(shapes)
    ]


def packed_logp(policy: Policy, groups: list[Group], layout="shared") -> torch.Tensor:
    batch = policy.pack(groups, layout)
    logp = policy.logits(policy.hidden(batch)).log_softmax(-1)
    return logp.gather(1, batch.targets[:, None])[:, 0]


def plain_logp(model, family, groups: list[Group]) -> torch.Tensor:
    """Every completion by itself through transformers' forward, in the packed order."""
    out = []
    for group in groups:
        for completion in group.completions:
            ids = torch.cat([group.prompt.ids, completion])[None]
            images = {}
            if group.prompt.pixel_values is not None:
                images = {"pixel_values": group.prompt.pixel_values, "image_grid_thw": group.prompt.grids}
            types = (ids == family.image_token_id).int()
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **images).logits
            rows = logits[0, len(group.prompt.ids) - 1 : -1].log_softmax(-1)
            out.append(rows.gather(1, completion[:, None])[:, 0])
    return torch.cat(out)


SHAPES = {
    "text": [(6, [], [3, 5, 1]), (4, [], [2, 2])],
    "one image": [(7, [(1, 4, 6)], [4, 9, 2])],
    "two images of different sizes": [(9, [(1, 2, 2), (1, 4, 4)], [5, 1, 7])],
    "mixed": [(5, [(1, 2, 4)], [3, 6]), (8, [], [4]), (6, [(1, 2, 2)], [1])],
    "one completion each": [(5, [], [6]), (9, [(1, 2, 2)], [3])],
}


@pytest.mark.parametrize("layout", ["shared", "varlen"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_logp_and_every_gradient_equal_the_plain_forward(policy, plain, shapes, layout):
    groups = make_groups(policy.family, shapes)
    weights = torch.randn(
        sum(len(c) for g in groups for c in g.completions), generator=torch.Generator().manual_seed(1)
    )
    ours, theirs = packed_logp(policy, groups, layout), plain_logp(plain, policy.family, groups)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    policy.model.zero_grad()
    plain.zero_grad()
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    got = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        error = (got[name] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error < 1e-5 or (got[name] - grad).abs().max() < 1e-5, f"{name}: relative error {error:.2e}"


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=5)
grids = st.lists(st.sampled_from([(1, 2, 2), (1, 2, 4), (1, 4, 4)]), max_size=2)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(st.tuples(st.integers(4, 12), grids, lengths), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_random_group_shapes_give_the_plain_log_probs(policy, plain, shapes, seed):
    groups = make_groups(policy.family, shapes, seed)
    with torch.no_grad():
        for layout in ("shared", "varlen"):
            ours = packed_logp(policy, groups, layout)
            torch.testing.assert_close(ours, plain_logp(plain, policy.family, groups), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_changed_token_changes_no_other_sequence(policy):
    groups = make_groups(policy.family, [(7, [(1, 2, 2)], [4, 9, 5]), (5, [], [6, 3])])
    before = packed_logp(policy, groups)
    changed = groups[0].completions[1].clone()
    changed[3] += 1
    after = packed_logp(
        policy, [Group(groups[0].prompt, [groups[0].completions[0], changed, groups[0].completions[2]]), groups[1]]
    )
    differs = (before != after).nonzero().flatten().tolist()
    assert differs, "the change must be visible somewhere"
    assert set(differs) <= set(range(4 + 3, 4 + 9)), "only the changed sequence, from the changed token on"


def test_the_shared_layout_holds_the_prompt_once_and_never_the_last_token(policy):
    (group,) = make_groups(policy.family, [(7, [(1, 4, 4)], [4, 9, 1])])
    shared, varlen = policy.pack([group]), policy.pack([group], "varlen")
    prompt = len(group.prompt.ids)
    assert len(shared.ids) == prompt + 3 + 8 == group.tokens("shared")
    assert len(varlen.ids) == 3 * prompt + 3 + 8 == group.tokens("varlen")
    assert shared.rows[[0, 4, 13]].tolist() == [prompt - 1] * 3, "the last prompt row predicts every first token"
    assert shared.cu_seqlens.tolist() == [0, 4, 13, 14]


def test_equal_images_are_encoded_once(policy):
    one = make_prompt(policy.family, 6, [(1, 2, 2), (1, 2, 4)], 1, keys="ab")
    two = make_prompt(policy.family, 6, [(1, 2, 4), (1, 2, 2)], 2, keys="bc")
    batch = policy.pack([Group(one, []), Group(two, [])])
    assert batch.grids.tolist() == [[1, 2, 2], [1, 2, 4], [1, 2, 2]]
    assert batch.image_index.tolist() == [0, 1, 2, 1, 2, 3]


def test_positions_are_those_of_transformers(policy, plain):
    prompt = make_prompt(policy.family, 9, [(1, 4, 6), (1, 2, 2)], 3)
    ids = prompt.ids[None]
    types = (ids == policy.family.image_token_id).int()
    expected, _ = plain.model.get_rope_index(ids, types, image_grid_thw=prompt.grids)
    assert torch.equal(policy.family.positions(prompt.ids, prompt.grids), expected[:, 0])


def test_image_tokens_without_an_image_are_refused(policy):
    broken = FakePrompt(torch.tensor([25, policy.family.image_token_id]), None, torch.empty(0, 3, dtype=torch.long), ())
    with pytest.raises(ValueError, match="1 image tokens, but its images give 0"):
        policy.pack([Group(broken, [])])


def test_an_empty_completion_is_refused(policy):
    (group,) = make_groups(policy.family, [(5, [], [2])])
    with pytest.raises(ValueError, match="at least one token"):
        policy.pack([Group(group.prompt, [torch.empty(0, dtype=torch.long)])])


@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1, max_size=6)), min_size=1, max_size=8
    ),
    budget=st.integers(20, 120),
)
def test_micro_batches_hold_every_completion_once_within_the_budget(shapes, budget):
    none = torch.empty(0, 3, dtype=torch.long)
    groups = [
        Group(
            FakePrompt(torch.zeros(p, dtype=torch.long), None, none, ()), [torch.zeros(c, dtype=torch.long) for c in cs]
        )
        for p, cs in shapes
    ]
    batches = split_groups(groups, budget)
    seen = [(g, i) for batch in batches for g, part in batch for i in part]
    assert seen == [(g, i) for g, group in enumerate(groups) for i in range(len(group.completions))]
    for batch in batches:
        parts = [Group(groups[g].prompt, [groups[g].completions[i] for i in part]) for g, part in batch]
        size = sum(part.tokens("shared") for part in parts)
        assert size <= budget or (len(parts) == 1 and len(parts[0].completions) == 1)
        whole = [len(part) == len(groups[g].completions) for g, part in batch]
        assert all(w or groups[g].tokens("shared") > budget for w, (g, _) in zip(whole, batch, strict=True))


def test_buckets_of_the_sdpa_backend_waste_little(policy):
    groups = make_groups(policy.family, [(5, [], [2, 3, 60, 61, 62, 7]), (40, [], [1, 2, 3])])
    batch = pack_groups(groups, positions=policy.family.positions, image_token_id=policy.family.image_token_id)
    plan = SdpaPlan(batch.segments, torch.device("cpu"))
    area = sum(b.query_index.numel() * b.key_index.shape[1] for b in plan.buckets)
    used = sum(n * (n + p) for n, p in zip(batch.segments.length, batch.segments.prefix_length, strict=True))
    assert used / area >= 0.75
