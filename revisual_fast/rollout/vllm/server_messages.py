"""A request and its completions as ``/inference/v1/generate`` has them."""

from __future__ import annotations

from typing import Any

from revisual_fast.rollout.engine import Sampling
from revisual_fast.rollout.messages import EngineSettings, Failed, Finished, Request
from revisual_fast.rollout.vllm.inputs import features_json

__all__ = ["answer_event", "generate_body"]


def generate_body(
    request: Request, n: int, sampling: Sampling, settings: EngineSettings, vocab: int
) -> dict[str, Any] | Failed:
    """What is sent for ``n`` completions, or why there cannot be any."""
    length = len(request.ids)
    if length + sampling.max_tokens > settings.max_model_len:
        what = f"a prompt of {length} and a response of {sampling.max_tokens} tokens"
        return Failed(request.index, f"{what} are more than the engine's {settings.max_model_len}")
    greedy = sampling.temperature == 0  # which vLLM does once; the others would be the same
    params: dict[str, Any] = {
        **{"n": 1 if greedy else n, "seed": request.seed, "max_tokens": sampling.max_tokens},
        **{"temperature": sampling.temperature, "logprobs": 0, "detokenize": False},
        **{"stop_token_ids": list(settings.eos_token_ids), "ignore_eos": True},
        **({} if greedy else {"top_p": sampling.top_p, "top_k": sampling.top_k}),
    }
    if settings.masks:  # it wants a temperature and a bound on the mask of every request
        params |= {"temperature": 1.0, "top_k": 1} if greedy else {"top_k": sampling.top_k or vocab}
    try:
        features = None if request.pixel_values is None else features_json(request)  # which needs vllm here
    except ValueError as error:
        return Failed(request.index, str(error))
    return {"token_ids": request.ids, "sampling_params": params, "features": features}


def answer_event(index: int, answer: dict[str, Any], n: int, masks: bool) -> Finished | Failed:
    """The event for the server's answer; a single greedy completion stands for all ``n``."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    choices *= n // len(choices)
    reasons = [choice["finish_reason"] for choice in choices]
    if other := set(reasons) - {"stop", "length"}:
        return Failed(index, f"vLLM ended it with {', '.join(sorted(map(str, other)))}")
    return Finished(
        index,
        ids=[choice["token_ids"] for choice in choices],
        logp=[[token["logprob"] for token in choice["logprobs"]["content"]] for choice in choices],
        finish_reason=reasons,
        masks=[choice["sampling_mask"] for choice in choices] if masks else None,
    )
