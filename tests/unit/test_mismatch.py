"""The distance of trainer and engine, and rollouts on their way through a checkpoint."""

import math

import pytest
import torch

from revisual_fast.rollout.engine import Rollout
from revisual_fast.rollout.saved import from_tensors, to_tensors
from revisual_fast.stages.mismatch import mismatch_metrics


def test_the_distribution_of_the_differences():
    d = torch.linspace(-1, 1, 201)
    metrics = mismatch_metrics([d[:50], d[50:]])
    assert metrics["mismatch/mean"] == pytest.approx(0, abs=1e-7)
    assert (metrics["mismatch/min"], metrics["mismatch/max"]) == (-1, 1)
    assert (metrics["mismatch/p01"], metrics["mismatch/p99"]) == pytest.approx((-0.98, 0.98))
    assert metrics["mismatch/std"] == pytest.approx(float(d.double().std(correction=0)))


def test_nothing_sampled_says_nothing():
    assert mismatch_metrics([]) == {}
    assert mismatch_metrics([torch.empty(0)]) == {}


def test_kl_is_that_of_the_engine_from_the_trainer():
    """Two known distributions over four ids: the estimate of many samples is the sum over the ids."""
    engine = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.double)
    trainer = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.double)
    ids = torch.multinomial(engine, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    metrics = mismatch_metrics([(trainer.log() - engine.log())[ids]])
    exact = float((engine * (engine / trainer).log()).sum())
    assert metrics["mismatch/kl"] == pytest.approx(exact, rel=0.02)
    assert metrics["mismatch/kl"] >= 0
    assert mismatch_metrics([torch.zeros(9)])["mismatch/kl"] == 0


def test_rollouts_survive_a_checkpoint():
    mask = (torch.tensor([0, 2, 2 + 3]), torch.tensor([4, 9, 1, 2, 3]))
    rollouts = [
        Rollout(torch.tensor([4, 3]), torch.tensor([-0.5, -math.pi]), "stop", mask, 3),
        Rollout(torch.tensor([7]), torch.tensor([-2.0]), "length", None, 0),
    ]
    back = from_tensors(to_tensors(rollouts))
    for old, new in zip(rollouts, back, strict=True):
        assert torch.equal(old.ids, new.ids)
        assert torch.equal(old.logp, new.logp)
        assert (old.finish_reason, old.version) == (new.finish_reason, new.version)
        assert (old.mask is None) == (new.mask is None)
        if old.mask is not None and new.mask is not None:
            assert all(torch.equal(a, b) for a, b in zip(old.mask, new.mask, strict=True))
