"""verl's FSDP engine with shared-prompt packing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from revisual_fast.integrations.seams import warn_once
from revisual_fast.integrations.verl.head import needed_rows
from revisual_fast.integrations.verl.policy import EnginePolicy
from revisual_fast.integrations.verl.rows import (
    CannotPack,
    Layout,
    check_positions,
    check_request,
    equal_runs,
    grouped,
)
from revisual_fast.packing import PackedBatch

__all__ = ["SharedPromptEngine"]


class _Packed:
    """A micro-batch on its way through the model."""

    def __init__(self, batch: PackedBatch, places: Tensor, temperature: float | Tensor):
        self.batch = batch
        self.places = places  # [N] int64: where the log-prob of each target stands in verl's jagged layout
        self.temperature = temperature  # a number, or [N]


class SharedPromptEngine(FSDPEngineWithLMHead):
    """Rows of a micro-batch with equal prompt and images are one group: their prompt is computed once, with its images,
    and only response rows meet the head. Log-probs and entropies come back in verl's layout, nan in the rows that are
    nobody's business: a prompt's, but for its last, and each row's last.

    What cannot be packed runs through verl's own code, with one warning for each reason.
    """

    policy: EnginePolicy | None = None

    def _build_module(self) -> Any:
        module = super()._build_module()
        self._said: set[str] = set()
        self._never = self._why_never()
        if self._never is None:
            try:
                self.policy = EnginePolicy(module)
            except ValueError as error:
                self._never = str(error)
        return module

    def _why_never(self) -> str | None:
        reasons = {
            "sequence parallelism (ulysses_sequence_parallel_size > 1)": self.use_ulysses_sp,
            "quantization-aware training": self._qat_enabled,
            "pad_to_length asks for padded rows": self.pad_to_length,
            "enable_activation_offload has not been tested with it": self.model_config.enable_activation_offload,
        }
        return next((reason for reason, there in reasons.items() if there), None)

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            packed = self._pack(micro_batch)
        except CannotPack as reason:
            warn_once(f"revisual_fast: verl's own code runs, not packed rows: {reason}", self._said)
            return super().prepare_model_inputs(micro_batch)
        policy = self.policy
        assert policy is not None

        def work() -> tuple[Tensor, Tensor]:
            return policy.logprob(packed.batch, packed.temperature)

        return {"revisual_fast_work": work}, {"revisual_fast": packed}

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        packed = output_args.get("revisual_fast")
        if packed is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        ids, (logp, entropy) = micro_batch["input_ids"], output
        found = {"log_probs": logp}
        if tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False):
            found["entropy"] = entropy
        nobodys = torch.full((ids.values().shape[0],), torch.nan, dtype=logp.dtype, device=logp.device)
        jagged = {name: nobodys.index_copy(0, packed.places, values) for name, values in found.items()}
        return {name: torch.nested.nested_tensor_from_jagged(x, ids.offsets()) for name, x in jagged.items()}

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        with needed_rows(self._needed(micro_batch)):  # for verl's own code, where it uses the fused head
            return super().forward_step(micro_batch, loss_function=loss_function, forward_only=forward_only)

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        """As verl's, but with dynamic batch sizes a group's rows stay in one micro-batch where all of them fit."""
        size = self._group_size(data)
        if size > 1:
            tu.assign_non_tensor(data, force_group_size=size)
        return super().forward_backward_batch(data, loss_function=loss_function, forward_only=forward_only)

    def _pack(self, micro_batch: Any) -> _Packed:
        """Raises CannotPack."""
        if self._never is not None or self.policy is None:
            raise CannotPack(self._never or "the model was not built by this engine")
        policy = self.policy.on(get_device_id())
        if reason := policy.why_not():
            raise CannotPack(reason)
        check_request(micro_batch, tu.get_non_tensor_data)
        layout = Layout.of(micro_batch)
        found = grouped(micro_batch, layout)
        check_positions(micro_batch, layout, found, policy.family)
        rows = [row for members in found.rows for row in members]
        batch, places = policy.pack(found.groups), layout.places(rows)
        temperature = micro_batch["temperature"]
        if isinstance(temperature, Tensor):
            own = temperature.float().clamp(min=1e-8).to(policy.device)
            temperature = own[torch.tensor(rows, device=policy.device)][batch.sequence_ids]
        else:
            temperature = float(temperature)
        return _Packed(batch, places.to(policy.device, non_blocking=True), temperature)

    def _needed(self, micro_batch: Any) -> Tensor | None:
        """[rows] bool for the fused head; None where all count, or where it does not get the rows of the batch."""

        def setting(name: str, default: bool) -> bool:
            return tu.get_non_tensor_data(data=micro_batch, key=name, default=default)

        if not setting("use_fused_kernels", False) or not setting("use_remove_padding", True):
            return None
        if self.use_ulysses_sp or self.pad_to_length:
            return None
        try:
            layout = Layout.of(micro_batch)
        except CannotPack:
            return None
        needed = torch.zeros(sum(layout.lengths), dtype=torch.bool)
        needed[layout.places(range(len(layout.prompts)))] = True
        return needed.to(get_device_id(), non_blocking=True)

    def _group_size(self, data: Any) -> int:
        """How many consecutive rows share a prompt, if it is one number in all processes and all groups fit; else 1."""
        if self.policy is None or not tu.get_non_tensor_data(data=data, key="use_dynamic_bsz", default=True):
            return 1
        if tu.get_non_tensor_data(data=data, key="force_group_size", default=1) > 1:
            return 1
        size = 1
        try:
            layout = Layout.of(data)
            ids = layout.rows_of(data["input_ids"].values().cpu())
            size = equal_runs([row[:own] for row, own in zip(ids, layout.prompts, strict=True)])
            tokens = torch.tensor(layout.lengths).view(-1, size).sum(1)
            if tokens.max() > tu.get_non_tensor_data(data=data, key="max_token_len_per_gpu", default=0):
                size = 1
        except CannotPack:
            pass
        least_and_most = torch.tensor([size, -size], device=get_device_name())
        torch.distributed.all_reduce(
            least_and_most, op=torch.distributed.ReduceOp.MIN, group=self.get_data_parallel_group()
        )
        least, most = least_and_most.tolist()
        return size if least == -most else 1
