"""Accuracy of a policy on a dataset: greedy decoding, the dataset's own verifier."""

from __future__ import annotations

import time
from typing import Any

from revisual_fast.config import Config, RewardConfig
from revisual_fast.data.processor import Processor
from revisual_fast.data.records import BadRecords, Record, load_dataset
from revisual_fast.policy.load import load_policy
from revisual_fast.rewards import Completion, Rewards
from revisual_fast.rollout.engine import Engine, Sampling
from revisual_fast.rollout.hf import HFEngine

__all__ = ["evaluate", "evaluate_model"]


def evaluate(
    records: list[Record], config: Config, engine: Engine, processor: Processor, bad_records: BadRecords
) -> dict[str, Any]:
    """Answer every usable record once, greedily.

    Returns ``accuracy`` (share of right answers, 0..1), ``n`` (records answered), ``length_mean`` (response tokens),
    ``truncated`` (share that hit the limit) and ``seconds``. Raises ValueError if no record is usable.
    """
    start = time.perf_counter()
    limit = config.evaluation.max_response_tokens
    chosen = records[: config.evaluation.max_samples]
    encoded = [processor.encode_or_report(r, bad_records, config.data[r.dataset].on_bad_record) for r in chosen]
    examples = [e for e in encoded if e is not None]
    if not examples:
        raise ValueError("evaluation: no usable record")
    rollouts = engine.generate([e.prompt for e in examples], 1, Sampling(max_tokens=limit, temperature=0))
    completions = [
        Completion(processor.decode(r.ids), len(r.ids), r.finished, e.record)
        for e, (r,) in zip(examples, rollouts, strict=True)
    ]
    table = Rewards({"accuracy": RewardConfig()}, max_response_tokens=limit)(completions)
    return {
        "accuracy": float(table.accuracy.double().mean()),
        "n": len(completions),
        "length_mean": sum(c.tokens for c in completions) / len(completions),
        "truncated": sum(not c.finished for c in completions) / len(completions),
        "seconds": time.perf_counter() - start,
    }


def evaluate_model(config: Config, path: str) -> dict[str, dict[str, Any]]:
    """:func:`evaluate` the model at ``path`` on every dataset of ``config.evaluation.heldout``; name -> result."""
    if not config.evaluation.heldout:
        raise ValueError("evaluation.heldout is empty: name the datasets to evaluate on")
    policy = load_policy(path, config.model)
    processor = Processor(path, config.chat, min_pixels=config.model.min_pixels, max_pixels=config.model.max_pixels)
    engine = HFEngine(policy, processor.eos_token_id, max_batch=config.rollout.max_batch)
    bad = BadRecords()
    results = {}
    for name, dataset in config.evaluation.heldout.items():
        records = load_dataset(dataset, config.data[dataset], bad)
        results[name] = evaluate(records, config, engine, processor, bad)
    return results
