"""revisual-fast: a fast GRPO trainer for multimodal language models.

The names below are the public API; they are imported on first use, so that ``import revisual_fast`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revisual_fast.losses import PolicyObjective, TokenBatch, aggregation_weights, whole_sequences
    from revisual_fast.modules import LinearLogprob, LinearPolicyLoss, PolicyLossFromLogits
    from revisual_fast.ops import (
        PolicyLoss,
        available_backends,
        gather_rows,
        linear_logprob,
        linear_policy_loss,
        pad_mask,
        policy_loss_from_logits,
    )

__version__ = "0.1.0"

_HOME = {
    "PolicyObjective": "revisual_fast.losses",
    "TokenBatch": "revisual_fast.losses",
    "LinearLogprob": "revisual_fast.modules",
    "LinearPolicyLoss": "revisual_fast.modules",
    "PolicyLossFromLogits": "revisual_fast.modules",
    "PolicyLoss": "revisual_fast.ops",
    "aggregation_weights": "revisual_fast.losses",
    "available_backends": "revisual_fast.ops",
    "gather_rows": "revisual_fast.ops",
    "linear_logprob": "revisual_fast.ops",
    "linear_policy_loss": "revisual_fast.ops",
    "pad_mask": "revisual_fast.ops",
    "policy_loss_from_logits": "revisual_fast.ops",
    "whole_sequences": "revisual_fast.losses",
}

__all__ = [
    "LinearLogprob",
    "LinearPolicyLoss",
    "PolicyLoss",
    "PolicyLossFromLogits",
    "PolicyObjective",
    "TokenBatch",
    "aggregation_weights",
    "available_backends",
    "gather_rows",
    "linear_logprob",
    "linear_policy_loss",
    "pad_mask",
    "policy_loss_from_logits",
    "whole_sequences",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'revisual_fast' has no attribute {name!r}")
