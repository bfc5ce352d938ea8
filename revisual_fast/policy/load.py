"""Loading and saving policies: from disk or a hub id, with LoRA where it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging as hf_logging

from revisual_fast.config import LoraConfig, ModelConfig
from revisual_fast.distributed import world
from revisual_fast.policy.attention import pick_attention
from revisual_fast.policy.families import Family, family_for
from revisual_fast.policy.liger import apply_liger, use_liger
from revisual_fast.policy.merged import plain_weights
from revisual_fast.policy.model import Policy

__all__ = ["check_model", "check_model_path", "export_model", "load_policy", "pick_device", "quiet_transformers"]


def quiet_transformers() -> None:
    """Leave the terminal to the run's own progress display."""
    hf_logging.disable_progress_bar()


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device (among several ranks, the rank's own), or the CPU where there is none. Raises
    ValueError if the device is absent, or one device would be all ranks'."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world().size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(
                f"model.device: {name} for each of {world().size} ranks; say auto, and every rank has its own"
            )
        if torch.cuda.is_available() and torch.cuda.device_count() < world().size:
            raise ValueError(f"model.device: {world().size} ranks, and {torch.cuda.device_count()} CUDA devices")
        name = f"cuda:{world().rank}"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"model.device: {name} was asked for, but torch sees no CUDA device (try `revisual-fast doctor`)"
        )
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"model.device: {name!r} is no device; for example auto, cpu, cuda, cuda:1") from None


def check_model_path(path: str | Path) -> None:
    """Raises ValueError if ``path`` is meant as a directory (it is no ``owner/name``) and is not there."""
    name = str(path)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.is_dir()
    if looks_local and not Path(name).is_dir():
        raise ValueError(f"model.path: there is no directory {name}")


def check_model(path: str | Path) -> type[Family]:
    """The family of the model at ``path``. Raises ValueError where there is none, or it is not supported."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"model.path: no model at {path}: {error}") from None
    family = family_for(config.model_type)
    family.check(config)
    return family


def load_policy(path: str | Path, config: ModelConfig, *, adapter: Path | None = None) -> Policy:
    """The model at ``path`` as a policy; with ``config.lora`` wrapped by peft (its weights those of ``adapter``).

    Raises ValueError where there is no model, the model is not of a supported family, or a kernel that was asked for
    cannot run.
    """
    check_model_path(path)
    device = pick_device(config.device)
    with_liger, _ = use_liger(config.liger_kernels, device)  # refuses before gigabytes are read
    pick_attention(config.attention, device, getattr(torch, config.dtype))  # as well
    family = check_model(path)  # as well
    dtype = getattr(torch, config.dtype)
    model: Any = family.loader.from_pretrained(path, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    if config.lora is not None:
        model = _with_lora(model, config.lora, adapter)
    policy = Policy(model.to(device), attention=config.attention, cache_bytes=config.vision_cache_mib * 2**20)
    if with_liger:
        apply_liger(policy.family)
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


def _with_lora(model: Any, config: LoraConfig, adapter: Path | None) -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("model.lora needs peft: pip install peft") from None
    if adapter is not None:
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # a float works as well
            lora_dropout=config.dropout,
            target_modules=config.target_modules,
        ),
    )


def export_model(policy: Policy, folder: Path) -> None:
    """Write the whole model, adapters merged in, so that transformers' ``from_pretrained`` loads it.

    The policy itself is not touched: merging and unmerging in place would leave rounding behind.
    """
    base = policy.base
    if base is policy.model:
        base.save_pretrained(folder)
        return
    weights = {n.replace(".base_layer.", "."): w for n, w in base.state_dict().items() if ".lora_" not in n}
    weights |= {weight.name: weight.value() for weight in plain_weights(base) if weight.adapter is not None}
    base.save_pretrained(folder, state_dict=weights)
