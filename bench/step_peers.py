"""A training step without packing: transformers' padded forward, TRL's trainer, and the reference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.checks import Outputs
from bench.harness import Call, Case, Variant
from bench.inputs import CLIP
from bench.peers import why_not
from bench.step_inputs import WIDER, StepInputs, accumulated, as_transformers, build, gradients

PADDED = "transformers, padded"
TRL = "TRL GRPOTrainer"
FLASH = "flash_attention_2"


def clipped(logp: Tensor, advantages: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """logp ``[B, C]``, advantages ``[B]`` -> scalar: ``inputs.OBJECTIVE`` on-policy, ``tokens`` being the mean's."""
    ratio, a = (logp - logp.detach()).exp(), advantages[:, None]
    return -(torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a) * mask).sum() / tokens


def padded_loss(x: StepInputs, members: slice = slice(None)) -> Callable[[], Tensor]:
    """transformers' forward over one row a completion; logits and an eager loss on the completions' rows alone."""
    rows, mask = x.rows(members), x.mask(members)
    inputs, targets = rows[:, :-1], rows[:, x.step.prompt :]  # the last token predicts nothing
    real = torch.ones_like(inputs)
    real[:, x.step.prompt :] = mask[:, :-1]
    images, tokens = x.images(inputs), sum(x.step.lengths)

    def loss() -> Tensor:
        out = x.model(input_ids=inputs, attention_mask=real, logits_to_keep=targets.shape[1], use_cache=False, **images)
        wide = torch.promote_types(out.logits.dtype, torch.float32)
        logp = out.logits.to(wide).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return clipped(logp, x.advantages[members], mask, tokens)

    return loss


def reference(case: Case, x: StepInputs) -> Outputs:
    """Every gradient, from a wider dtype and one completion after the other: nothing is padded or shared."""
    model = build(x.model.config, WIDER[case.dtype], case.device, x.step.checkpointing)
    model.load_state_dict(x.model.state_dict())
    wide = StepInputs(x.step, model, x.group, x.advantages.to(WIDER[case.dtype]))
    with as_transformers(model), _products_in_tf32(x.step.tf32):
        found = accumulated(model, [padded_loss(wide, members) for members in x.parts(1)])
    return {name: value.float() for name, value in found.items()}


@contextmanager
def _products_in_tf32(on: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def transformers_padded(case: Case, x: StepInputs) -> list[Variant]:
    """With sdpa, its default, and with flash-attn where that is installed."""
    from transformers.utils import is_flash_attn_2_available

    size = x.step.padded_rows or x.step.group

    def variant(name: str, attention: str) -> Variant:
        def setup() -> Call:
            losses = [padded_loss(x, members) for members in x.parts(size)]

            def run() -> Outputs:
                with as_transformers(x.model, attention) as model:
                    return accumulated(model, losses)

            return Call(run)

        note = f"eager loss on the completions, {attention}" + (f", {size} at a time" if x.step.padded_rows else "")
        return Variant(name, "plain", setup, note=note, yardstick=PADDED)

    out = [variant(PADDED, "sdpa")]
    if case.device == "cuda" and is_flash_attn_2_available():
        out.append(variant(f"{PADDED}, flash-attn", FLASH))
    return out


def trl_trainer(case: Case, x: StepInputs) -> Variant:
    """``compute_loss`` of a trainer of its own: its defaults, but for gradient checkpointing, which it has on by
    default and which is here as in all variants, and no mixed precision: the weights have the case's dtype."""

    def setup() -> Call:
        trainer, inputs = make_trainer(x), trl_inputs(x)

        def run() -> Outputs:
            with as_transformers(x.model) as model:
                return gradients(model, trainer.compute_loss(model, inputs))

        return Call(run)

    reason = why_not(case, "trl")
    note = "its head is untuned for CPUs" if case.device == "cpu" else ""
    return Variant(TRL, "peer", None if reason else setup, reason, note, yardstick=PADDED)


def make_trainer(x: StepInputs, cls: Any = None) -> Any:
    """A ``trl.GRPOTrainer``, or a ``cls`` derived from it, around the model, ready for ``compute_loss``."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"output_dir": folder, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
        settings |= {"use_cpu": x.device.type == "cpu", "bf16": False, "fp16": False}
        settings |= {"gradient_checkpointing": x.step.checkpointing, "max_completion_length": x.step.response}
        settings |= {"per_device_train_batch_size": x.step.group, "num_generations": x.step.group}
        settings |= {"beta": 0.0, "epsilon": CLIP, "loss_type": "dapo", "temperature": 1.0}
        trainer = (cls or GRPOTrainer)(
            model=x.model,
            reward_funcs=_no_reward,
            args=GRPOConfig(**settings),
            train_dataset=Dataset.from_list([{"prompt": "-"}] * x.step.group),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
        )
    trainer.current_gradient_accumulation_steps = 1  # what its training loop sets
    return trainer


def _no_reward(completions: list[Any], **_: Any) -> list[float | None]:
    return [0.0] * len(completions)


def trl_inputs(x: StepInputs) -> dict[str, Any]:
    """What its ``_generate_and_score_completions`` hands to ``compute_loss``."""
    rows, mask, images = x.rows(), x.mask().long(), {}  # type: Tensor, Tensor, dict[str, Any]
    if x.group.prompt.pixel_values is not None:
        images = x.images(rows) | {"num_images": [1] * len(rows)}
    prompt = rows[:, : x.step.prompt]
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": rows[:, x.step.prompt :],
        "completion_mask": mask,
        "advantages": x.advantages,
        "num_items_in_batch": mask.sum(),
        **images,
    }
