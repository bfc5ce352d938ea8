"""verl's v1 trainer deals whole prompts to the ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="needs verl: make test-dropin")
pytest.importorskip("transfer_queue", reason="verl's v1 trainer needs TransferQueue: make test-dropin")
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.seqlen_balancing import calculate_workload

import revisual_fast.integrations.verl as integration
from revisual_fast.integrations import SeamError
from revisual_fast.integrations.verl import trainer
from tests.processes import run_code

HALVES = (slice(0, 12), slice(12, 24))


@pytest.fixture
def v1() -> Any:
    """A trainer of which only the balancing is there: 3 responses to a prompt, 2 ranks."""
    trainer.patch()
    kind = type("Trainer", (PPOTrainer,), dict.fromkeys(PPOTrainer.__abstractmethods__, lambda self: None))
    made = object.__new__(kind)
    made.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [0, 1]})
    actor = SimpleNamespace(actor=SimpleNamespace(ppo_mini_batch_size=2), rollout=SimpleNamespace(n=3))
    made.config = SimpleNamespace(actor_rollout_ref=actor, trainer=SimpleNamespace(critic_warmup=0))
    made.use_critic, made.global_steps, made.tokenizer = False, 1, SimpleNamespace(eos_token_id=1)
    return made


def batch_of(prompts: int, sizes: tuple[int, ...] = (3,)) -> tuple[KVBatchMeta, dict[str, int]]:
    rng = torch.Generator().manual_seed(0)
    rows = [(p, s) for p in range(prompts) for s in range(sizes[p % len(sizes)])]
    keys = [f"prompt{p}_{s}_0" for p, s in rows]
    lengths = dict(zip(keys, torch.randint(20, 900, (len(keys),), generator=rng).tolist(), strict=True))
    shuffled = [keys[i] for i in torch.randperm(len(keys), generator=rng).tolist()]
    return KVBatchMeta(keys=shuffled, tags=[{"seq_len": lengths[key]} for key in shuffled]), lengths


def test_a_prompts_rows_go_to_one_rank_one_after_the_other(v1):
    batch, lengths = batch_of(8)
    before, metrics = set(batch.keys), {}
    dealt = v1._balance_batch(batch, metrics=metrics)
    assert set(dealt.keys) == before
    assert [tag["seq_len"] for tag in dealt.tags] == [lengths[key] for key in dealt.keys]
    uids = [key.split("_")[0] for key in dealt.keys]
    assert all(len(set(uids[i : i + 3])) == 1 for i in range(0, 24, 3))
    work = [sum(calculate_workload(torch.tensor([lengths[k] for k in dealt.keys[s]])).tolist()) for s in HALVES]
    assert max(work) < 1.1 * min(work)
    tokens = [sum(lengths[k] for k in dealt.keys[s]) for s in HALVES]
    assert metrics["global_seqlen/balanced_max"] == max(tokens)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (batch_of(4, (3, 2, 4)), "prompts have from 2 to 4 rows"),
        (batch_of(2, (6,)), None),
        (batch_of(1, (6,)), "1 prompts cannot be dealt evenly to 2 ranks"),
    ],
)
def test_what_cannot_be_dealt_is_dealt_as_verl_does(v1, batch, reason):
    expected, _ = batch[0], integration.unpatch()
    expected = KVBatchMeta(keys=list(batch[0].keys), tags=batch[0].tags)
    v1._balance_batch(expected, metrics={})
    integration.patch()
    trainer.patch()
    if reason is None:
        assert v1._balance_batch(batch[0], metrics={}).keys != expected.keys
        return
    with pytest.warns(RuntimeWarning, match=reason):
        assert v1._balance_batch(batch[0], metrics={}).keys == expected.keys


def test_in_and_out(monkeypatch):
    trainer.patch()
    assert PPOTrainer._balance_batch is trainer._balance_batch
    trainer.patch()
    integration.unpatch()
    assert PPOTrainer._balance_batch.__module__ == "verl.trainer.ppo.v1.trainer_base"
    monkeypatch.setattr(PPOTrainer, "_balance_batch", lambda self, batch: batch)
    with pytest.raises(SeamError, match=r"PPOTrainer\._balance_batch takes"):
        trainer.patch()
    monkeypatch.undo()
    integration.patch()


def test_verl_imports_it_where_the_environment_says_so():
    code = (
        "import verl\nfrom verl.trainer.ppo.v1.trainer_base import PPOTrainer as t\nprint(t._balance_batch.__module__)"
    )
    module = "revisual_fast.integrations.verl.trainer"
    assert run_code(code, VERL_USE_EXTERNAL_MODULES=module).strip().endswith(module)
