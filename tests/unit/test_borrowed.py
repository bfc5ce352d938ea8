"""A borrowed model: packed passes inside, and outside of them the model that its owner knows."""

import copy

import pytest
import torch

from revisual_fast.policy.borrowed import BorrowedPolicy
from revisual_fast.policy.model import Policy
from tests.groups import make_groups
from tests.models import TEXT, VISION, loss_of, tiny, worst_difference

SHAPES = [(9, [(1, 4, 6), (1, 2, 2)], [5, 3, 1]), (7, [], [4, 6])]


def gradients(policy: Policy, through=None) -> dict[str, torch.Tensor]:
    groups = make_groups(policy.family, [(t, g if policy.family.visual is not None else [], n) for t, g, n in SHAPES])
    batch = policy.pack(groups)

    def work() -> torch.Tensor:
        logp = policy.logits(policy.hidden(batch)).log_softmax(-1)
        return loss_of(logp.gather(1, batch.targets[:, None])[:, 0])

    policy.model.zero_grad(set_to_none=True)
    (work() if through is None else policy.run(through, work)).backward()
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def own_forward(model, family: str):
    """A padded forward as its owner calls it."""
    ids = torch.arange(20, 32).view(2, 6)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.fixture(params=[*TEXT, *VISION])
def family(request) -> str:
    return request.param


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_a_policys(family, checkpointing):
    models = [tiny(family).train() for _ in range(2)]
    for model in models if checkpointing else ():
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = gradients(Policy(models[0]))
    borrowed = BorrowedPolicy(models[1])
    found = gradients(borrowed, through=models[1])
    assert worst_difference(found, wanted)[0] == 0


def test_outside_the_model_is_as_it_was(family):
    model, other = tiny(family), tiny(family)
    implementations = {n: m.config._attn_implementation for n, m in model.named_modules() if hasattr(m, "config")}
    policy = BorrowedPolicy(model)
    gradients(policy)
    assert implementations == {
        n: m.config._attn_implementation for n, m in model.named_modules() if hasattr(m, "config")
    }
    assert torch.equal(own_forward(model, family), own_forward(other, family))
    ids = torch.tensor([[20, 21, 22, 23]])
    sampled = [m.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for m in (model, other)]
    assert torch.equal(*sampled)


def test_images_outside(monkeypatch):
    """The tower serves its owner, who knows nothing of windows, also between two packed passes."""
    for family in VISION:
        model, other = tiny(family), tiny(family)
        policy = BorrowedPolicy(model)
        first = gradients(policy)
        (group, *_) = make_groups(policy.family, SHAPES)
        prompt = group.prompt
        inputs = {
            "input_ids": prompt.ids[None],
            "pixel_values": prompt.pixel_values,
            "image_grid_thw": prompt.grids,
            "mm_token_type_ids": (prompt.ids == policy.family.image_token_id).int()[None],
        }
        assert torch.equal(model(**inputs).logits, other(**inputs).logits), family
        assert worst_difference(gradients(policy), first)[0] == 0


def test_released(family):
    model = tiny(family)
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    policy = BorrowedPolicy(model)
    gradients(policy)
    policy.release()
    model.zero_grad(set_to_none=True)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name
    with pytest.raises((TypeError, ValueError)):
        model(revisual_fast_work=lambda: None)


def test_a_copy_of_the_model_runs_its_own_weights(family):
    model = tiny(family)
    BorrowedPolicy(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not own_forward(twin, family).any()
    assert own_forward(model, family).any()


def test_autocast(family):
    """In bf16 by autocast the gradients are as far from fp32's as those of the weights rounded to bf16, or nearer."""
    model = tiny(family)
    exact = gradients(BorrowedPolicy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gradients(BorrowedPolicy(tiny(family), dtype=torch.bfloat16))
    half = {n: g.float() for n, g in gradients(BorrowedPolicy(tiny(family).to(torch.bfloat16))).items()}
    flat = [torch.cat([g[n].flatten() for n in exact]) for g in (exact, mixed, half)]
    assert 0 < (flat[1] - flat[0]).norm() <= 1.5 * (flat[2] - flat[0]).norm()
