"""TRL's ``GRPOTrainer`` with packed passes and the fused loss.

TRL gets log-probs and entropies from one method and makes loss and metrics of them in another. Here the first is a
packed pass. The second runs twice the work with half of it for nothing, so the loss comes from the fused loss, with
its gradient, and TRL's own method is given the log-probs that exist by then, for its metrics.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from revisual_fast.integrations.grouping import scatter
from revisual_fast.integrations.seams import SeamError, on_unpatch, seam, warn_once
from revisual_fast.integrations.trl.objective import check_objective_against, objective_of, token_values
from revisual_fast.integrations.trl.regroup import regrouped
from revisual_fast.integrations.trl.scorer import Scored, Scorer, scorer_problem
from revisual_fast.losses import Objective, PolicyObjective, TokenBatch

__all__ = ["FastGRPOTrainer"]

TRAINER = "trl.trainer.grpo_trainer:GRPOTrainer"
SCORES = "_get_per_token_logps_and_entropies"
SEAMS = {
    SCORES: (
        *("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
        *("batch_size", "compute_entropy", "compute_aux_loss"),
    ),
    "_compute_loss": ("self", "model", "inputs"),
    "_prepare_inputs": ("self", "generation_batch"),
}
FEATURES = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)
"""What TRL hands to the model's forward, where a batch has it."""
NOTHING, GIVEN_BACK = "no completion has a token", "the models were given back"


class FastGRPOTrainer(GRPOTrainer):
    """``trl.GRPOTrainer`` whose old, reference and policy passes are packed, and whose loss is fused.

    A prompt and its images are computed once for all its completions in a micro-batch, nothing is padded, logits are
    computed for trained tokens only. Loss and gradients are TRL's; the constructor is as well, with two more keywords:
    ``keep_groups`` puts completions of one prompt into the same micro-batch, as far as an optimizer step has them,
    where that does not change the step's loss (TRL deals them at random); ``attention`` is a packed attention backend
    or ``auto``. What cannot be packed is left to TRL with one warning that says why. Raises SeamError for a TRL whose
    methods, or whose loss, are not those known here.
    """

    args: GRPOConfig

    def __init__(self, *args: Any, keep_groups: bool = True, attention: str = "auto", **kwargs: Any):
        for name, parameters in SEAMS.items():
            seam(f"{TRAINER}.{name}", parameters)
        features = list(inspect.signature(seam(f"{TRAINER}.{SCORES}")).parameters)[len(SEAMS[SCORES]) :]
        if unknown := set(features) - set(FEATURES):
            raise SeamError(f"{TRAINER}.{SCORES} takes {sorted(unknown)}, which nothing is known of here")
        self._scorers: dict[int, Scorer] = {}
        self._given: Scored | None = None
        self._said: set[str] = set()
        self._keep_groups, self._attention = keep_groups, attention
        self._fast_problem: str | None = "the trainer is under construction"
        super().__init__(*args, **kwargs)
        self._fast_problem = self._why_not()
        self._objective = objective_of(self)
        if self._fast_problem:
            self._say(self._fast_problem)
            return
        for model in (self.model, self.ref_model):
            if model is not None:
                self._scorer(model)
        on_unpatch("trl", self.release)
        self._checked(self._objective)

    def _checked(self, objective: PolicyObjective | None) -> None:
        if objective is not None:
            check_objective_against(self, objective, self._trl_loss)

    def release(self) -> None:
        """Give the models back; from here on the trainer works as TRL's. :func:`unpatch` calls it."""
        self._fast_problem = GIVEN_BACK
        for scorer in self._scorers.values():
            scorer.policy.release()
        self._scorers.clear()

    def _why_not(self) -> str | None:
        """Why nothing can be packed, or None."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "FSDP and DeepSpeed are not covered"
        parallel = self.accelerator.parallelism_config
        if any(getattr(parallel, f"{kind}_enabled", False) for kind in ("cp", "sp", "tp")):
            return "context, sequence and tensor parallelism are not covered"
        if self.accelerator.mixed_precision == "fp16":
            return "fp16 with loss scaling: the gradient is made before the scale is known (use bf16)"
        if self.args.neftune_noise_alpha:
            return "NEFTune's noise depends on the length of a row"
        if self.aux_loss_enabled:
            return "the load-balancing loss of a mixture of experts is not covered"
        return next((p for m in (self.model, self.ref_model) if m is not None and (p := scorer_problem(m))), None)

    def _say(self, reason: str) -> None:
        if reason not in (NOTHING, GIVEN_BACK):  # nobody is surprised by these
            warn_once(f"FastGRPOTrainer leaves this to TRL: {reason}", self._said, stacklevel=4)

    def _scorer(self, model: Any) -> Scorer:
        """That of a model, or of the model in a wrapper."""
        inner = self.accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        if id(inner) not in self._scorers:
            precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
            head = torch.float32 if self.args.cast_lm_head_to_fp32 else None
            self._scorers[id(inner)] = Scorer(
                inner, self.temperature, attention=self._attention, dtype=precision, head_dtype=head
            )
        return self._scorers[id(inner)]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,  # [B, P + C]
        attention_mask: Tensor,
        logits_to_keep: int,  # C
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **features: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs [B, C], entropies [B, C] if they are asked for, and None. ``batch_size`` padded rows are what a
        packed pass may hold in tokens."""
        if self._given is not None:
            return self._given.logp, self._given.entropy, None
        problem = self._fast_problem
        if problem is None:
            scorer = self._scorer(model)
            try:
                grouped = scorer.group(input_ids, attention_mask, logits_to_keep, features)
            except ValueError as error:
                problem = str(error)
        if problem is None and not grouped.groups:
            problem = NOTHING
        if problem is not None:
            self._say(problem)
            settings = (batch_size, compute_entropy, compute_aux_loss)
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *settings, **features
            )
        with self.accelerator.autocast():
            made = scorer.score(model, grouped, (batch_size or len(input_ids)) * input_ids.shape[1])
        return made.logp, made.entropy if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self._fast_problem is not None or self._given is not None:
            return super()._compute_loss(model, inputs)
        ids, real = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        scorer = self._scorer(model)
        try:
            grouped = scorer.group(ids, real, mask.shape[1], {name: inputs.get(name) for name in FEATURES})
        except ValueError as error:
            self._say(str(error))
            return super()._compute_loss(model, inputs)
        if not mask.any():
            return super()._compute_loss(model, inputs)  # nothing is trained: TRL's loss is 0, with a graph
        if (objective := objective_of(self)) != self._objective:  # somebody has a schedule for a setting
            self._objective = objective
            self._checked(objective)
        values = token_values(self, inputs, mask)
        with self.accelerator.autocast():
            loss, scored = scorer.loss(model, grouped, mask, values, lambda at: self._at(at, inputs, mask))
        if self._objective is not None:
            with torch.no_grad():  # for the metrics
                self._trl_loss(inputs, *self._filled(scored, inputs, mask))
        return loss

    def _at(self, places: Tensor, inputs: dict[str, Any], mask: Tensor) -> Objective:
        """The loss of rows that stand in the ``places`` [N] of a flat ``mask`` [B, C]: ours, or TRL's own code."""
        if self._objective is not None:
            return self._objective

        def trl(logp: Tensor, entropy: Tensor, _: TokenBatch) -> Tensor:
            scored = Scored(*(scatter(x, places, (len(mask), mask.shape[1])) for x in (logp, entropy)))
            return self._trl_loss(inputs, *self._filled(scored, inputs, mask))

        return trl

    def _filled(self, scored: Scored, inputs: dict[str, Any], mask: Tensor) -> tuple[Tensor, Tensor]:
        """With the old log-probs where nothing was scored, so that no ratio there is infinite."""
        old = inputs.get("old_per_token_logps")
        return scored.logp if old is None else torch.where(mask.bool(), scored.logp, old), scored.entropy

    def _trl_loss(self, inputs: dict[str, Any], logp: Tensor, entropy: Tensor) -> Tensor:
        """TRL's own loss of log-probs and entropies [B, C], with its metrics."""
        with self._giving(Scored(logp, entropy)):
            return super()._compute_loss(self.model, inputs)

    @contextmanager
    def _giving(self, scored: Scored) -> Iterator[None]:
        self._given = scored
        try:
            yield
        finally:
            self._given = None

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or not self._may_regroup():
            return inputs
        window = min(self.args.steps_per_generation or 1, self.args.gradient_accumulation_steps)
        self._buffered_inputs = regrouped(self._buffered_inputs, window)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _may_regroup(self) -> bool:
        """Whether an optimizer step's loss is the same however its completions are dealt to micro-batches."""
        means = self.loss_type == "bnpo" or self._entropy_bonus_enabled or self.top_entropy_quantile < 1
        steps, accumulated = self.args.steps_per_generation or 1, self.args.gradient_accumulation_steps
        aligned = steps % accumulated == 0 or accumulated % steps == 0
        return self._keep_groups and self._fast_problem is None and not means and aligned
