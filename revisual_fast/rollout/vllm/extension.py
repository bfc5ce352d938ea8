"""What every worker of a vLLM engine gets: how to see its weights, and what they need to be seen.

Named as ``worker_extension_cls``; its methods are called by ``collective_rpc``, in a process of ours and in a server.
Importing this module prepares the worker: it comes before the model is built.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from revisual_fast.rollout.vllm.transfer import register
from revisual_fast.rollout.weights import Fingerprint, fingerprint

__all__ = ["WorkerExtension", "parameter_names"]


class WorkerExtension:
    """Methods of a worker. None may have the name of one of vLLM's own."""

    def revisual_fingerprints(self) -> dict[str, Fingerprint]:
        """Of every parameter of this worker's share of the model."""
        return {name: (fingerprint(p), p.numel()) for name, p in self._revisual_model().named_parameters()}

    def revisual_names(self, names: Sequence[str]) -> dict[str, str]:
        """Checkpoint names -> the parameters that hold those weights; what the model does not have is left out."""
        return parameter_names(self._revisual_model(), names)

    def revisual_problems(self) -> list[str]:
        """What in this engine's settings makes its answers other than the trainer takes them to be."""
        worker: Any = self
        config = worker.vllm_config.model_config
        problems = []
        if getattr(config.multimodal_config, "mm_device_do_normalize", False):
            problems.append("it normalises images that come normalised: say --no-mm-device-do-normalize")
        if config.logprobs_mode != "processed_logprobs":
            problems.append("its log-probs are not those of sampling: say --logprobs-mode processed_logprobs")
        return problems

    def revisual_memory(self) -> int:
        """Bytes: on CUDA, what its device has less of than before the model came; on a CPU, of this process."""
        if torch.cuda.is_available():
            worker: Any = self
            return worker.init_snapshot.free_memory - torch.cuda.mem_get_info()[0]
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _revisual_model(self) -> nn.Module:
        worker: Any = self
        return worker.model_runner.get_model()


def parameter_names(model: Any, names: Sequence[str]) -> dict[str, str]:
    """As :meth:`WorkerExtension.revisual_names`, of a model of vLLM's."""
    parameters = {name for name, _ in model.named_parameters()}
    fused = [
        getattr(module, "packed_modules_mapping", {}) for module in model.modules()
    ]  # some models, or parts of them
    packed = {part: whole for mapping in fused for whole, parts in mapping.items() for part in parts}
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    found = {}
    for name in names:
        mapped = mapper.apply_list([name]) if mapper else [name]
        place = next((p for m in mapped for p in (m, _packed(m, packed)) if p in parameters), None)
        if place is not None:
            found[name] = place
    return found


def _packed(name: str, packed: Mapping[str, str]) -> str:
    """The same name, its module replaced by the one it is fused into: q_proj -> qkv_proj."""
    module, _, tensor = name.rpartition(".")
    parent, _, own = module.rpartition(".")
    return f"{parent}.{packed.get(own, own)}.{tensor}"


def _plain_linear(layer: Any, remove_weight: bool) -> None:
    """Instead of a packed copy, which would be neither readable nor, where weights are tied, follow an update."""
    layer.cpu_linear = F.linear


def _expected(record: logging.LogRecord) -> bool:
    """Not the warning for a layer that an update leaves as it is: most updates are partial, and rotations have none."""
    return record.msg != "%s: Failed to load weights"


def _prepare() -> None:
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    register()
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(_expected)
    if current_platform.is_cpu():
        utils.dispatch_cpu_unquantized_gemm = _plain_linear


_prepare()
