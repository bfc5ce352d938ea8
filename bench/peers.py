"""The peers as variants: each from its own package, with its own defaults, on the same inputs and the same objective.

One that is not installed, or does not run on this device, stays in the list with the reason. A peer that only makes
log-probs gets the objective on top in torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from torch import Tensor, no_grad

from bench.checks import Outputs
from bench.counts import head_flops
from bench.harness import Call, Case, Variant
from bench.inputs import CLIP, SEQUENCES, Inputs, LossOf
from bench.plain import detached, gradients

TRL_VOCAB_CHUNK = 32768  # what TRL's trainers pass
TRL = "TRL ChunkedLogProbFunction"
LIGER_GRPO = "Liger fused linear GRPO"
LIGER_ROWS, LIGER_SEQUENCES = "Liger Triton GRPO", "Liger Triton GSPO"
QUACK_CE = "quack cross_entropy_fwd"
TRL_UTILS, LIGER_OPS, QUACK_OPS = "trl.trainer.utils", "liger_kernel.ops.grpo_loss", "quack.cross_entropy"
UNTUNED = "untuned for CPUs"
RECOMPUTES = 4  # products of the head's size: logits twice, dX, dW
Logprob = Callable[[], tuple[Tensor, Tensor | None]]


def why_not(case: Case, module: str, *, cuda: bool = False, dtypes: Sequence[str] = ()) -> str:
    """Empty if the peer can run, else the reason."""
    if cuda and case.device != "cuda":
        return "needs CUDA"
    if dtypes and case.dtype not in dtypes:
        return f"takes {' and '.join(dtypes)} only"
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _peer(
    case: Case,
    name: str,
    reason: str,
    setup: Callable[[], Call],
    note: str = "",
    products: int = 4,
    slow_start: bool = False,
) -> Variant:
    flops = head_flops(case.n, case.d, case.v, products) if case.d else None
    return Variant(name, "peer", None if reason else setup, reason, note, flops=flops, slow_start=slow_start)


def _from_logprob(x: Inputs, loss_of: LossOf, logprob: Logprob) -> Callable[[], Call]:
    def run() -> Outputs:
        logp, entropy = logprob()
        loss = loss_of(logp)
        return gradients(x, loss) | detached(loss=loss, logp=logp, entropy=entropy)

    return lambda: Call(run)


def trl_chunked(case: Case, x: Inputs, loss_of: LossOf) -> list[Variant]:
    """With and without its entropy."""
    module = "trl.kernels.chunked_logprob"

    def variant(name: str, outputs: tuple[str, ...]) -> Variant:
        def logprob() -> tuple[Tensor, Tensor | None]:
            function = import_module(module).ChunkedLogProbFunction
            found = function.apply(*x.head, None, x.targets, 1.0, TRL_VOCAB_CHUNK, None, 1.0, outputs)
            return found[0], found[1]

        note = UNTUNED if case.device == "cpu" else ""
        return _peer(case, name, why_not(case, module), _from_logprob(x, loss_of, logprob), note, RECOMPUTES)

    return [variant(TRL, ("entropy",)), variant(f"{TRL}, no entropy", ())]


def liger_scaled_ce(case: Case, x: Inputs, loss_of: LossOf) -> list[Variant]:
    """With and without its entropy."""
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    hopper = case.device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    reason = why_not(case, module)
    if hopper and not reason:
        reason = why_not(case, "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90", dtypes=["bfloat16"])

    def variant(name: str, entropy: bool) -> Variant:
        def logprob() -> tuple[Tensor, Tensor | None]:
            function = import_module(module).LigerFusedLinearScaledCrossEntropyFunction
            found = function.apply(*x.head, x.targets, 1.0, -100, 1, entropy)
            return (-found[0], found[1]) if entropy else (-found, None)

        note = "SM90 kernel" if hopper else "its fallback in torch"
        return _peer(case, name, reason, _from_logprob(x, loss_of, logprob), note, RECOMPUTES, slow_start=hopper)

    name = "Liger fused linear scaled CE"
    return [variant(name, True), variant(f"{name}, no entropy", False)]


def cut_cross_entropy(case: Case, x: Inputs, loss_of: LossOf) -> list[Variant]:
    """With its default gradient filter, which drops blocks of small gradients, and without."""
    module = "cut_cross_entropy"
    reason = why_not(case, module, cuda=True, dtypes=["bfloat16"])

    def variant(name: str, **options: Any) -> Variant:
        def logprob() -> tuple[Tensor, Tensor | None]:
            linear_cross_entropy = import_module(module).linear_cross_entropy
            return -linear_cross_entropy(*x.head, x.targets, reduction="none", **options), None

        note = "" if reason else f"{version(module)}, CCE_AUTOTUNE={os.environ.get('CCE_AUTOTUNE', '0')}"
        return _peer(case, name, reason, _from_logprob(x, loss_of, logprob), note, RECOMPUTES, slow_start=True)

    return [variant("cut-cross-entropy"), variant("cut-cross-entropy, no filter", filter_eps=None)]


def liger_linear_grpo(case: Case, x: Inputs) -> list[Variant]:
    """One sequence a chunk, its default, and all in one; on CUDA that also with TF32 for its products in fp32."""
    module = "liger_kernel.chunked_loss"
    reason = why_not(case, module)

    def variant(name: str, note: str = "", tf32: bool = False, **options: Any) -> Variant:
        setup = _liger_linear_grpo(case, x, tf32, options)
        return _peer(case, name, reason, setup, note, products=RECOMPUTES, slow_start=True)

    out = [variant(LIGER_GRPO)]
    all_in_one: dict[str, Any] = {"chunk_size": SEQUENCES}
    if not reason and "chunk_size" in signature(import_module(module).LigerFusedLinearGRPOLoss).parameters:
        out.append(variant(f"{LIGER_GRPO}, one chunk", f"chunk_size={SEQUENCES}, all sequences", **all_in_one))
        if case.device == "cuda":
            name = f"{LIGER_GRPO}, one chunk, TF32"
            out.append(variant(name, "TF32 for its products in fp32", True, **all_in_one))
    return out


def _liger_linear_grpo(case: Case, x: Inputs, tf32: bool, more: dict[str, Any]) -> Callable[[], Call]:
    def setup() -> Call:
        options = {"beta": 0.0, "use_ref_model": False, "loss_type": "bnpo", "compiled": True} | more
        kind = import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
        function = kind(epsilon_low=CLIP, epsilon_high=CLIP, **options)
        shape = (SEQUENCES, case.n // SEQUENCES)
        mask = torch.ones(shape, device=case.device)
        advantages = x.advantages.view(shape)[:, 0].contiguous()
        old = x.old_logp.view(shape)

        def run() -> Outputs:
            hidden, weight = x.head
            hidden, targets = hidden.view(*shape, -1), x.targets.view(shape)
            with allow_tf32(tf32):
                loss, _ = function(hidden, weight, targets, mask, advantages, old_per_token_logps=old)
                return gradients(x, loss) | detached(loss=loss)

        return Call(run)

    return setup


@contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """For this call only: the other variants and the yardstick keep what was set."""
    if not allowed:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def liger_triton_grpo(case: Case, x: Inputs, level: str = "token") -> Variant:
    """Its logits have one more position a sequence, which it ignores; in place, as is its default. ``level``: of the
    ratio, token or sequence."""
    module = "liger_kernel.transformers.grpo_loss"
    batch, length = SEQUENCES, case.n // SEQUENCES

    def setup() -> Call:
        assert x.logits is not None
        given = x.logits.detach().view(batch, length, -1)
        own = given.new_zeros(batch, length + 1, case.v).requires_grad_()
        targets, old = x.targets.view(batch, length), x.old_logp.view(batch, length)
        advantages = x.advantages.view(batch, length)[:, 0].contiguous()
        options = {"temperature": 1.0, "beta": 0.0, "eps_low": CLIP, "eps_high": CLIP, "loss_type": "bnpo"}
        options["importance_sampling_level"] = level

        def run() -> Outputs:
            loss_of = import_module(module).triton_grpo_loss
            loss, _ = loss_of(own, old, None, targets, advantages, reduce=True, **options)
            (d_logits,) = torch.autograd.grad(loss, [own])
            return detached(loss=loss, d_logits=d_logits[:, :-1])

        return Call(run, lambda: own.detach()[:, :-1].copy_(given))

    name, note = (LIGER_ROWS, "") if level == "token" else (LIGER_SEQUENCES, f"importance_sampling_level={level!r}")
    return _peer(case, name, why_not(case, module, cuda=True), setup, note)


def logits_statistics(case: Case, x: Inputs) -> list[Variant]:
    """TRL's log-prob and entropy; Liger's and quack's log-probs alone."""
    assert x.logits is not None
    logits, length = x.logits.detach(), case.n // SEQUENCES

    def variant(name: str, module: str, setup: Callable[[], Callable[[], Outputs]], **more: Any) -> Variant:
        slow_start = name == QUACK_CE
        return _peer(case, name, why_not(case, module, **more), lambda: Call(no_grad()(setup())), slow_start=slow_start)

    def trl() -> Callable[[], Outputs]:
        function = import_module(TRL_UTILS).selective_log_softmax_and_entropy
        return lambda: dict(zip(("logp", "entropy"), function(logits, x.targets), strict=True))

    def liger() -> Callable[[], Outputs]:
        function = import_module(LIGER_OPS).fused_selective_log_softmax
        own = logits.new_zeros(SEQUENCES, length + 1, case.v)  # it ignores the last position of a sequence
        own[:, :-1] = logits.view(SEQUENCES, length, -1)
        return lambda: {"logp": function(own, x.targets.view(SEQUENCES, length), 1.0)}

    def quack() -> Callable[[], Outputs]:
        function = import_module(QUACK_OPS).cross_entropy_fwd
        return lambda: {"logp": -function(logits, x.targets)}

    return [
        variant("TRL selective_log_softmax_and_entropy", TRL_UTILS, trl),
        variant("Liger fused_selective_log_softmax", LIGER_OPS, liger, cuda=True),
        variant(QUACK_CE, QUACK_OPS, quack, cuda=True),
    ]


def liger_linear_ce(case: Case, x: Inputs) -> list[Variant]:
    """With its default, dW added up in the weight's dtype, and with dW added up in fp32."""
    module = "liger_kernel.transformers.fused_linear_cross_entropy"
    reason = why_not(case, module, cuda=True)

    def variant(name: str, **options: Any) -> Variant:
        def setup() -> Call:
            function = import_module(module).LigerFusedLinearCrossEntropyLoss(**options)

            def run() -> Outputs:
                hidden, weight = x.head
                loss = function(weight, hidden, x.targets)
                return gradients(x, loss) | detached(loss=loss)

            return Call(run)

        return _peer(case, name, reason, setup, products=3)

    name = "Liger fused linear CE"
    return [variant(name), variant(f"{name}, fp32 dW", accum_dtype=torch.float32)]


def quack_linear_ce(case: Case, x: Inputs) -> Variant:
    """Mean or sum over the rows only: it has no place for another objective."""
    module = "quack.linear_cross_entropy"

    def setup() -> Call:
        def run() -> Outputs:
            loss = import_module(module).chunked_linear_cross_entropy(*x.head, x.targets, reduction="mean")
            return gradients(x, loss) | detached(loss=loss)

        return Call(run)

    reason = why_not(case, module, cuda=True, dtypes=["bfloat16"])
    return _peer(case, "quack chunked linear CE", reason, setup, products=3, slow_start=True)
