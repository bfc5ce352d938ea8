"""A request and its completions as ``/inference/v1/generate`` has them."""

from __future__ import annotations

from typing import Any

from revisual_fast.rollout.engine import Sampling
from revisual_fast.rollout.messages import EngineSettings, Failed, Finished, Request
from revisual_fast.rollout.vllm.completions import end_problem, length_problem, sampling_params
from revisual_fast.rollout.vllm.inputs import features_json

__all__ = ["answer_event", "generate_body"]


def generate_body(
    request: Request, n: int, sampling: Sampling, settings: EngineSettings, vocab: int
) -> dict[str, Any] | Failed:
    """What is sent for ``n`` completions, or why there cannot be any."""
    if problem := length_problem(request, sampling.max_tokens, settings):
        return Failed(request.index, problem)
    try:
        features = None if request.pixel_values is None else features_json(request)  # which needs vllm here
    except ValueError as error:
        return Failed(request.index, str(error))
    params = {"seed": request.seed, **sampling_params(n, sampling, settings, vocab)}
    return {"token_ids": request.ids, "sampling_params": params, "features": features}


def answer_event(index: int, answer: dict[str, Any], n: int, masks: bool) -> Finished | Failed:
    """The event for the server's answer; a single greedy completion stands for all ``n``."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    choices *= n // len(choices)
    reasons = [choice["finish_reason"] for choice in choices]
    if problem := end_problem(reasons):
        return Failed(index, problem)
    return Finished(
        index,
        ids=[choice["token_ids"] for choice in choices],
        logp=[[token["logprob"] for token in choice["logprobs"]["content"]] for choice in choices],
        finish_reason=reasons,
        masks=[choice["sampling_mask"] for choice in choices] if masks else None,
    )
