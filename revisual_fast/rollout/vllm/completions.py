"""What vLLM is asked of completions, and which ends of theirs count: alike in a process of ours and over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from revisual_fast.rollout.engine import Sampling
from revisual_fast.rollout.messages import EngineSettings, Request

__all__ = ["end_problem", "length_problem", "sampling_params"]


def sampling_params(n: int, sampling: Sampling, settings: EngineSettings, vocab: int) -> dict[str, Any]:
    """Of vLLM's ``SamplingParams`` those of ``n`` completions, but for the seed; ``vocab`` is the rows of the head.

    With temperature 0 it is one completion, which stands for all: vLLM would compute the same ``n`` times.
    """
    greedy = sampling.temperature == 0
    params: dict[str, Any] = {
        "n": 1 if greedy else n,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "stop_token_ids": list(settings.eos_token_ids),
        "ignore_eos": True,  # vLLM's own idea of it may be another
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }
    if not greedy:
        params |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
    if settings.masks:  # then vLLM wants a temperature and a bound on the mask of every request; top_p leaves few
        params |= {"temperature": 1.0, "top_k": 1} if greedy else {"top_k": sampling.top_k or vocab}
    return params


def length_problem(request: Request, max_tokens: int, settings: EngineSettings) -> str:
    """Why a response of ``max_tokens`` to the request has no place in the engine; empty if it has."""
    length, most = len(request.ids), settings.max_model_len
    if length + max_tokens <= most:
        return ""
    return f"a prompt of {length} and a response of {max_tokens} tokens are more than the engine's {most}"


def end_problem(reasons: Sequence[Any]) -> str:
    """Why completions that ended for these reasons are none; empty if they are."""
    other = set(reasons) - {"stop", "length"}
    return f"vLLM ended it with {', '.join(sorted(map(str, other)))}" if other else ""
