"""Accuracy of a policy on a dataset: greedy decoding, the dataset's own verifier."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from revisual_fast.config import Config, RewardConfig
from revisual_fast.data.processor import Example, Processor
from revisual_fast.data.records import BadRecords, Record, load_dataset
from revisual_fast.distributed import world
from revisual_fast.policy.load import load_policy
from revisual_fast.ranges import ranged
from revisual_fast.rewards import Completion, Rewards
from revisual_fast.rollout.build import EngineRoom
from revisual_fast.rollout.engine import Engine, EngineError, NonFiniteLogits, RequestError, Rollout, Sampling

__all__ = ["EngineError", "evaluate", "evaluate_model"]


def evaluate(
    records: list[Record], config: Config, engine: Engine, processor: Processor, bad_records: BadRecords
) -> dict[str, Any]:
    """Answer every usable record once, greedily, each on one rank.

    Returns ``accuracy`` (share of right answers, 0..1), ``n`` (records answered), ``length_mean`` (response tokens),
    ``truncated`` (share that hit the limit) and ``seconds``. Only as many prompts as are decoded together are in memory
    at a time. Raises ValueError if no record is usable, EngineError where the engine or a prompt failed for good.
    """
    start = time.perf_counter()
    limit = config.evaluation.max_response_tokens
    chosen = records[: config.evaluation.max_samples]
    together = max(1, min(config.rollout.max_batch, config.rollout.max_cached_tokens // limit)) * world().size
    completions: list[Completion] = []
    for first in range(0, len(chosen), together):
        some, examples = chosen[first : first + together], []  # type: list[Record], list[Example]

        def work(some: list[Record] = some, examples: list[Example] = examples) -> list[str]:
            encoded = [processor.encode_or_report(r, bad_records, config.data[r.dataset].on_bad_record) for r in some]
            examples.extend(example for example in encoded if example is not None)
            return [example.record.source for example in examples]

        world().same(work, "records")
        completions += _answer(examples, limit, engine, processor)
    if not completions:
        names = ", ".join(sorted({f"data.{r.dataset}" for r in chosen})) or "evaluation"
        raise ValueError(f"{names}: no usable record among the {len(chosen)} to evaluate: {bad_records.counts}")
    table = Rewards({"accuracy": RewardConfig()}, max_response_tokens=limit)(completions)
    return {
        "accuracy": float(table.accuracy.double().mean()),
        "n": len(completions),
        "length_mean": sum(c.tokens for c in completions) / len(completions),
        "truncated": sum(not c.finished for c in completions) / len(completions),
        "seconds": time.perf_counter() - start,
    }


def _answer(examples: list[Example], limit: int, engine: Engine, processor: Processor) -> list[Completion]:
    ranks = world()
    own = ranks.share(examples)

    def work() -> list[list[Rollout]]:
        if not own:
            return []
        try:
            return engine.generate([e.prompt for e in own], 1, Sampling(max_tokens=limit, temperature=0))
        except RequestError as error:
            raise EngineError(f"{own[error.index].record.source}: {error.reason}") from error

    rollouts = ranks.whole(ranks.gather_from(work, NonFiniteLogits, EngineError))
    return [
        Completion(processor.decode(r.ids), len(r.ids), r.finished, e.record)
        for e, (r,) in zip(examples, rollouts, strict=True)
    ]


@ranged("evaluate")
def evaluate_model(config: Config, path: str) -> dict[str, dict[str, Any]]:
    """:func:`evaluate` the model at ``path`` on every dataset of ``config.evaluation.heldout``; name -> result.

    A result has one more key, ``bad_records``: reason -> number of records of this dataset that were left out.
    """
    if not config.evaluation.heldout:
        raise ValueError("evaluation.heldout is empty: name the datasets to evaluate on")
    policy = load_policy(path, config.model)
    processor = Processor(path, config.chat, min_pixels=config.model.min_pixels, max_pixels=config.model.max_pixels)
    records, bad = {}, {}
    for name, dataset in config.evaluation.heldout.items():
        bad[name] = BadRecords()
        records[name] = load_dataset(dataset, config.data[dataset], bad[name])
    every = [record for part in records.values() for record in part]
    results = {}
    with (
        TemporaryDirectory() as folder,
        EngineRoom(config, processor, every, Path(folder) / "vllm.log", model=path) as room,
    ):
        for name in records:
            with room.session(policy).use(policy, 0) as engine:
                result = evaluate(records[name], config, engine, processor, bad[name])
            results[name] = {**result, "bad_records": bad[name].counts}
    return results
