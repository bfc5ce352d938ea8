"""Where this package goes into verl, and how it comes out again."""

from __future__ import annotations

from typing import Any

from revisual_fast.integrations import seams

__all__ = ["patch", "unpatch"]

FSDP = "verl.workers.engine.fsdp.transformer_impl"
SEAMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("verl.trainer.ppo.core_algos:POLICY_LOSS_REGISTRY", ()),
    ("verl.trainer.ppo.core_algos:agg_loss", ("loss_mat", "loss_mask", "loss_agg_mode")),
    (
        "verl.trainer.ppo.core_algos:compute_policy_loss_vanilla",
        ("old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights"),
    ),
    ("verl.utils.kernel.linear_cross_entropy:linear_cross_entropy", ()),
    (
        "verl.utils.kernel.linear_cross_entropy:LinearCrossEntropy.forward",
        ("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"),
    ),
    ("verl.utils.tensordict_utils:get_non_tensor_data", ("data", "key", "default")),
    ("verl.utils.tensordict_utils:assign_non_tensor", ("tensor_dict",)),
    ("verl.utils.device:get_device_id", ()),
    ("verl.workers.engine.base:EngineRegistry._engines", ()),
    (f"{FSDP}:FSDPEngine._build_module", ("self",)),
    (f"{FSDP}:FSDPEngine.forward_backward_batch", ("self", "data", "loss_function", "forward_only")),
    (f"{FSDP}:FSDPEngineWithLMHead.forward_step", ("self", "micro_batch", "loss_function", "forward_only")),
    (f"{FSDP}:FSDPEngineWithLMHead.prepare_model_inputs", ("self", "micro_batch")),
    (
        f"{FSDP}:FSDPEngineWithLMHead.prepare_model_outputs",
        ("self", "output", "output_args", "micro_batch", "logits_processor_func"),
    ),
)
"""Places of verl that are called, overridden or replaced."""
BACKENDS, DEVICES = ("fsdp", "fsdp2"), ("cuda", "cpu")


def patch() -> None:
    """Put policy losses, head and engine in place; again is harmless. Importing the package has done it already.

    Raises SeamError, which names the place, before anything is replaced, where verl is not what this was written for;
    ImportError where it is not installed.
    """
    seams.check_version("verl")
    found = {place: seams.seam(place, parameters) for place, parameters in SEAMS}
    registries = {name: _registry(found["verl.workers.engine.base:EngineRegistry._engines"], name) for name in BACKENDS}

    from verl.utils.kernel import linear_cross_entropy as kernel

    from revisual_fast.integrations.verl import engine, head, loss, policy

    policy.remember_attention()
    for name, policy_loss in loss.POLICY_LOSSES.items():
        seams.replace("verl", loss.POLICY_LOSS_REGISTRY, name, policy_loss)
    seams.replace("verl", kernel, "linear_cross_entropy", head.linear_cross_entropy)
    for registry in registries.values():
        for device in DEVICES:
            seams.replace("verl", registry, device, engine.SharedPromptEngine)


def _registry(engines: dict[str, Any], backend: str) -> dict[Any, Any]:
    """device -> engine of ``backend``. Raises SeamError where verl has no such engine."""
    registry = engines.get("language_model", {}).get(backend)
    if not isinstance(registry, dict) or "cuda" not in registry:
        raise seams.SeamError(
            f"verl.workers.engine.base:EngineRegistry._engines has no language_model, {backend}, cuda: "
            f"this integration was tested with verl {seams.SUPPORTED['verl'].tested}"
        )
    return registry


def unpatch() -> None:
    """Take everything out again, registered objectives as well; engines that exist stay as they are."""
    seams.unpatch("verl")
