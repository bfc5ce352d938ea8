"""Log-probs and entropies of any causal language model of transformers, without its logits.

``model = accelerate_scoring(model)``, then ``model(**inputs, labels=labels, score=True)``. Without ``score`` the model
is what it was. The model's own forward pass runs up to its head; in the head's place stands one that keeps what it is
given and returns one made-up row ``[1, 1, V]``. What the model then does to that row says what it does to its logits:
a scale and a softcap go into the fused op, anything else is a ValueError.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from revisual_fast.integrations.grouping import scatter
from revisual_fast.integrations.head import INSTEAD, TRANSFORMS, Seen, base_of, gathered, head_of, transform_of
from revisual_fast.integrations.seams import SeamError, placed
from revisual_fast.ops import gather_rows, linear_logprob

__all__ = ["IGNORE", "ScoringOutput", "accelerate_scoring", "score_tokens", "unaccelerate_scoring"]

IGNORE = -100
"""The label of a token that does not count."""
PASSED_ON = ("aux_loss", "past_key_values", "hidden_states", "attentions")


@dataclass
class ScoringOutput(ModelOutput):
    """What a call with ``score=True`` returns. The first three are differentiable."""

    loss: Tensor | None = None  # scalar: mean of -logp over the tokens that count, or their sum over num_items_in_batch
    logp: Tensor | None = None  # [B, T] of each label, given all before it; 0 where it does not count. fp32 or fp64
    entropy: Tensor | None = None  # [B, T] nats, of the distribution the label was drawn from; 0 likewise
    aux_loss: Tensor | None = None  # these four as the model returns them; aux_loss is not part of loss
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None


def accelerate_scoring(model: Any, *, backend: str = "auto", logits_dtype: str = "float32") -> Any:
    """Teach ``model`` the keyword ``score=True``; returns the same model. Twice is as good as once.

    ``model`` is a PreTrainedModel with a language-model head, text or vision-language, or a peft wrapper around one.
    With ``score=True`` its call takes ``labels [B, T]`` int64 (-100: does not count; label t is predicted from the
    tokens before t), ``temperature`` (1.0) and ``num_items_in_batch`` besides the model's own arguments, and returns a
    :class:`ScoringOutput`. ``backend`` and ``logits_dtype`` as in :func:`revisual_fast.linear_logprob`. Raises
    ValueError for a model that has no plain linear head; what it does to its logits is looked at in the first call.
    """
    base = base_of(model)
    head_of(base)
    TRANSFORMS.pop(base, None)
    own = vars(base)
    own["_scoring_options"] = (backend, logits_dtype)
    if "_forward_before_scoring" not in own:
        own["_forward_before_scoring"] = own.get("forward")  # bound methods, so that a deep copy gets its own
        own["forward"] = types.MethodType(_scoring_forward(base), base)
    return model


def unaccelerate_scoring(model: Any) -> Any:
    """Take the keyword away again; harmless where there is none. Returns the same model.

    Raises SeamError where somebody else has replaced the model's ``forward`` since.
    """
    base = base_of(model)
    own = vars(base)
    if "_forward_before_scoring" not in own:
        return model
    if not hasattr(getattr(own.get("forward"), "__func__", None), "_scores"):
        raise SeamError(f"{type(base).__name__}.forward was replaced by somebody else after accelerate_scoring did")
    previous = own.pop("_forward_before_scoring")
    del own["forward"], own["_scoring_options"]
    if previous is not None:
        own["forward"] = previous
    TRANSFORMS.pop(base, None)
    return model


def _scoring_forward(base: Any) -> Callable[..., Any]:
    """The method; it holds no model, so that it can be bound to a copy as well."""

    def forward(self: Any, *args: Any, score: bool = False, **kwargs: Any) -> Any:
        before = vars(self)["_forward_before_scoring"]
        run = types.MethodType(type(self).forward, self) if before is None else before
        if not score:
            return run(*args, **kwargs)
        labels = kwargs.pop("labels", None)
        if labels is None or labels.ndim != 2:
            raise ValueError("score=True needs labels=[B, T] int64, -100 where a token does not count")
        temperature, items = kwargs.pop("temperature", 1.0), kwargs.pop("num_items_in_batch", None)
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        out = _score(self, run, targets, args, kwargs, (temperature, *vars(self)["_scoring_options"]))
        logp, entropy = (nn.functional.pad(out[name][:, :-1], (1, 0)) for name in ("logp", "entropy"))
        items = (labels[:, 1:] != IGNORE).sum().clamp(min=1) if items is None else items
        loss = -logp.sum() / (items.to(logp.device) if isinstance(items, Tensor) else items)
        return ScoringOutput(**{**out, "loss": loss, "logp": logp, "entropy": entropy})

    forward._scores = True  # type: ignore[attr-defined]
    return _with_signature(forward, base.forward)


def _with_signature(method: Any, of: Any) -> Any:
    """Trainers and generation look at a model's signature to know what they may pass."""
    signature, own = inspect.signature(of), inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
    return method


def score_tokens(
    model: Any,
    targets: Tensor,  # [B, T] int64: what the hidden state at t predicts; -100: nothing
    *args: Any,
    base: Any = None,
    temperature: float = 1.0,
    backend: str = "auto",
    logits_dtype: str = "float32",
    **inputs: Any,
) -> ScoringOutput:
    """One call ``model(*args, **inputs)`` that scores ``targets``, for a trainer: nothing stays changed or shifts.

    ``base`` is the transformers model (or peft wrapper) inside ``model`` where that is a wrapper such as DDP; scores
    are made inside its forward pass. Returns ``logp`` and ``entropy [B, T]``, without ``loss``. Where ``targets`` lies
    the rows that count are looked for: on a CUDA device that waits for it. Raises ValueError for a model that cannot be
    scored; the message says why.
    """
    base, options = base_of(model if base is None else base), (temperature, backend, logits_dtype)
    run = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> ScoringOutput:
        kwargs.pop("labels", None)
        return _score(self, run, targets, args, kwargs, options)

    with placed(base, "forward", types.MethodType(_with_signature(forward, run), base)):
        return model(*args, **inputs)


def _score(
    base: Any, run: Callable[..., Any], targets: Tensor, args: Any, kwargs: Any, options: tuple[float, str, str]
) -> ScoringOutput:
    """The model's forward pass up to its head, then log-probs and entropies of ``targets``."""
    head, (temperature, backend, logits_dtype) = head_of(base), options
    seen = Seen(head)
    if "use_cache" in inspect.signature(run).parameters:
        kwargs.setdefault("use_cache", False)
    with placed(head, "forward", seen):
        try:
            out = run(*args, **{**kwargs, "return_dict": True})
        except Exception as error:
            if not seen.hidden:
                raise
            raise ValueError(
                f"{type(base).__name__} needs the logits themselves after its head ({type(error).__name__}: {error}): "
                f"{INSTEAD}"
            ) from error
    transform = transform_of(base, seen, out)
    (hidden,) = seen.hidden
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"the head of {type(base).__name__} got {list(hidden.shape[:-1])} hidden states for labels of "
            f"{list(targets.shape)}: leave out logits_to_keep, labels of -100 cost nothing"
        )
    weight, bias = gathered(head)
    rows = (targets != IGNORE).flatten().nonzero()[:, 0]
    on_device = rows.to(weight.device, non_blocking=True)
    wanted = targets.to(weight.device, non_blocking=True).flatten()[on_device]
    found = linear_logprob(
        _rows(hidden, rows, seen.autocast).to(weight.device),
        weight,
        wanted,
        bias=bias,
        temperature=temperature / transform.scale,
        softcap=transform.softcap,
        logits_dtype=logits_dtype,
        backend=backend,
    )
    logp, entropy = (scatter(values, on_device, targets.shape) for values in found)
    return ScoringOutput(logp=logp, entropy=entropy, **{name: getattr(out, name, None) for name in PASSED_ON})


def _rows(hidden: Tensor, rows: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``[N, D]``, in the dtype in which the model would have multiplied."""
    picked = gather_rows(hidden.flatten(0, -2), rows.to(hidden.device, non_blocking=True))
    return picked if dtype is None else picked.to(dtype)
