"""What a run does once, before its first stage: checks, data, and the lines that say what it is.

Whatever is wrong with a later stage comes to light here, in a ValueError that names the setting.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from revisual_fast import __version__
from revisual_fast.config import Config, GRPOConfig, RunConfig
from revisual_fast.data.processor import Processor
from revisual_fast.data.records import BadRecords, Record, load_dataset
from revisual_fast.distributed import world
from revisual_fast.doctor import device_name
from revisual_fast.ops import OPS, resolve_backend
from revisual_fast.policy.attention import pick_attention
from revisual_fast.policy.liger import use_liger
from revisual_fast.policy.load import check_model, pick_device, quiet_transformers
from revisual_fast.rollout.build import check_rollout
from revisual_fast.stages.grpo import build_rewards
from revisual_fast.stages.updates import build_objective

__all__ = ["check_resumed", "check_settings", "check_stages", "header", "load_records", "prepare_torch"]


def prepare_torch(run: RunConfig) -> None:
    """What holds for the whole process."""
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    torch.set_flush_denormal(True)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    quiet_transformers()


def check_settings(config: Config) -> tuple[str, str]:
    """What depends on the device and on what is installed. Returns the header's lines about attention and layers."""
    for name, stage in _rl(config).items():
        build_objective(stage)
        build_rewards(name, stage)
    model, device = config.model, pick_device(config.model.device)
    attention, why = pick_attention(model.attention, device, getattr(torch, model.dtype))
    liger, reason = use_liger(model.liger_kernels, device)
    check_rollout(config, device)
    return f"attention: {attention} ({why})", f"liger kernels: {'on' if liger else 'off'} ({reason})"


def check_stages(config: Config, processor: Processor) -> None:
    """Raises ValueError for a model that is not supported, or that a stage cannot train as it says."""
    check_model(config.start_model)
    for name in config.curriculum:
        if config.stages[name].freeze_vision and processor.image_token_id is None:
            raise ValueError(f"stages.{name}.freeze_vision: this model has no vision tower; set it to false")


def load_records(config: Config, bad_records: BadRecords) -> dict[str, list[Record]]:
    """Every dataset that the curriculum or an evaluation uses."""
    used = [d for name in config.curriculum for d in config.stages[name].data]
    used += [*config.evaluation.heldout.values(), *config.evaluation.validation.values()]
    return {name: load_dataset(name, config.data[name], bad_records) for name in dict.fromkeys(used)}


def check_resumed(config: Config, saved: dict[str, Any], changes: list[str]) -> None:
    """Raises ValueError where ``changes`` (lines about settings) would change what is done already; ``saved``: the
    state in a checkpoint."""
    done, midway = saved["run"]["stage"], saved["stage"] is not None
    before, now = saved["curriculum"][: done + midway], config.curriculum[: done + midway]
    if before != now:
        raise ValueError(f"--resume: the run has gone through {before}, but curriculum begins with {now}")
    for name in config.curriculum[:done]:
        keys = [f"stages.{name}.{key}" for key in ("steps", "epochs", "max_minutes")]
        lengths = [f": {key}:" for key in (*keys, "train.max_steps")]
        for change in changes:
            if any(key in change for key in lengths):
                raise ValueError(f"--resume: stage {name} is finished, so this has no effect on it: {change}")


def header(config: Config, records: dict[str, list[Record]], bad_records: BadRecords, engines: list[str]) -> list[str]:
    """The lines at a run's beginning; ``engines``: those about attention, rollouts and layers."""
    device, ranks = device_name(config.model.device), world()
    lines = [f"revisual-fast {__version__} · {device} · run {Path(config.run.dir)} · seed {config.run.seed}"]
    lines += [f"data {name}: {len(found)} records" for name, found in records.items()]
    lines += [f"bad records ({reason}): {count}" for reason, count in bad_records.counts.items()]
    if ranks.size > 1:
        lines.append(f"ranks: {ranks.size}, each with a whole model and its share of the optimizer's state")
    lines.append(f"curriculum: {' -> '.join(config.curriculum)}")
    lines.append(f"backends: {', '.join(f'{op} {resolve_backend(op)}' for op in OPS)}")
    lines += engines
    rl = _rl(config)
    if (limit := config.run.max_minutes) is not None:
        lines.append(f"at most {limit:g} minutes, then the run is saved and stops")
    for name in config.curriculum:
        if (limit := config.stages[name].max_minutes) is not None:
            lines.append(f"{name}: at most {limit:g} minutes")
        if (stage := rl.get(name)) is not None:
            lines += [f"{name}: {line}" for line in build_rewards(name, stage).header()]
            if stage.pad.mode in ("paper", "sample") and stage.pad.rho == 1:
                lines.append(f"{name}: pad.rho is 1, so the draw of pad mode {stage.pad.mode} keeps everything")
    return lines


def _rl(config: Config) -> dict[str, GRPOConfig]:
    stages = {name: config.stages[name] for name in config.curriculum}
    return {name: stage for name, stage in stages.items() if isinstance(stage, GRPOConfig)}
