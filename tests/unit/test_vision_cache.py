"""Image features that are kept: when the vision tower runs, and that it is never the wrong ones."""

import pytest
import torch

from revisual_fast.config import LoraConfig, ModelConfig
from revisual_fast.packing import Group
from revisual_fast.policy.load import load_policy
from revisual_fast.policy.vision_cache import VisionCache, tower_version
from tests.groups import make_prompt, packed_logp

GRIDS = [(1, 2, 2), (1, 4, 4)]


@pytest.fixture
def policy(tiny_vl):
    return load_policy(tiny_vl, ModelConfig(path=str(tiny_vl), dtype="float32", device="cpu"))


@pytest.fixture
def group(policy):
    return Group(make_prompt(policy.family, 6, GRIDS, 1), [torch.tensor([30, 31, 32]), torch.tensor([33])])


def runs(policy):
    """Images that the tower has been given, call by call."""
    calls = []
    encode = policy.family.encode_images

    def counted(pixels, grids):
        calls.append(len(grids))
        return encode(pixels, grids)

    policy.family.encode_images = counted
    return calls


def test_a_frozen_tower_runs_once_for_all_passes(policy, group):
    policy.freeze_vision()
    calls = runs(policy)
    first = packed_logp(policy, [group])
    first.sum().backward()
    with torch.no_grad():
        again = packed_logp(policy, [group])
    assert calls == [1, 1], "one call for each image"
    assert torch.equal(first, again)


def test_only_the_images_that_are_not_known_are_encoded(policy, group):
    policy.freeze_vision()
    calls = runs(policy)
    other = Group(make_prompt(policy.family, 6, [*GRIDS, (1, 2, 4)], 1), [torch.tensor([30])])
    packed_logp(policy, [group])
    known = packed_logp(policy, [other])
    assert calls == [1, 1, 1]
    policy.images.clear()
    assert torch.equal(packed_logp(policy, [other]), known), "what was known before changes no bit"


def test_a_trained_tower_runs_for_every_pass(policy, group):
    """Fused optimizers change its weights unseen, so nothing of it may be kept."""
    calls = runs(policy)
    with torch.no_grad():
        before = packed_logp(policy, [group])
    packed_logp(policy, [group]).sum().backward()
    assert all(p.grad is not None for p in policy.family.visual.parameters())
    torch.optim.AdamW(policy.family.visual.parameters(), lr=1e-2, fused=True).step()
    with torch.no_grad():
        assert not torch.equal(before, packed_logp(policy, [group]))
    assert calls == [2, 2, 2]
    assert policy.images.bytes == 0


def test_a_tower_that_was_trained_in_between_is_another_one(policy, group):
    policy.freeze_vision()
    before = packed_logp(policy, [group])
    policy.model.requires_grad_(True)
    packed_logp(policy, [group]).sum().backward()
    torch.optim.AdamW(policy.family.visual.parameters(), lr=1e-2, fused=True).step()
    policy.freeze_vision()
    assert not torch.allclose(before, packed_logp(policy, [group]))


def test_features_are_kept_without_dropout(tiny_vl, group):
    lora = LoraConfig(target_modules=r".*visual.*qkv", dropout=0.5)
    policy = load_policy(tiny_vl, ModelConfig(path=str(tiny_vl), dtype="float32", device="cpu", lora=lora))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    policy.freeze_vision()
    trained = packed_logp(policy, [group])
    policy.images.clear()
    policy.model.eval()
    assert torch.equal(trained, packed_logp(policy, [group]))


@torch.no_grad()
def test_loaded_weights_make_old_features_unknown(policy):
    tower = policy.family.visual
    version = tower_version(tower)
    assert tower_version(tower) == version
    tower.load_state_dict(tower.state_dict())
    assert tower_version(tower) != version


@torch.no_grad()
def test_an_adapter_in_the_tower_that_is_switched_off_is_another_tower(tiny_vl, group):
    lora = LoraConfig(target_modules=r".*visual.*qkv")
    policy = load_policy(tiny_vl, ModelConfig(path=str(tiny_vl), dtype="float32", device="cpu", lora=lora))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.add_(0.1)
    policy.model.eval().requires_grad_(False)
    adapted = packed_logp(policy, [group])
    with policy.without_adapter():
        plain = packed_logp(policy, [group])
    assert not torch.allclose(adapted, plain)
    assert not policy.vision_trained, "peft would have made it trainable again"
    assert torch.equal(packed_logp(policy, [group]), adapted)


def test_the_least_recently_used_go_first_and_the_bytes_stay_within_the_capacity():
    tower, made = torch.nn.Linear(2, 2), []

    def encode_of(keys):
        def encode(i):
            made.append(keys[i])
            return torch.full((4, 2), float(ord(keys[i])))  # 32 bytes

        return encode

    cache = VisionCache(64)
    for keys in ("ab", "a", "c", "a", "b"):
        features = cache.features(tower, keys, encode_of(keys))
        assert features[:, 0].tolist() == [float(ord(key)) for key in keys for _ in range(4)]
        assert cache.bytes <= 64
    assert made == ["a", "b", "c", "b"], "c pushed b out, for a was used after it"
    assert (cache.hits, cache.misses) == (2, 4)


def test_nothing_is_kept_without_room():
    tower = torch.nn.Linear(2, 2)
    cache = VisionCache(0)
    for _ in range(2):
        cache.features(tower, "a", lambda i: torch.ones(1, 2))
    assert (cache.hits, cache.misses, cache.bytes) == (0, 2, 0)
    with pytest.raises(ValueError, match="0 bytes or more"):
        VisionCache(-1)
