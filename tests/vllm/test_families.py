"""Other families than the tiny model's, on vLLM: names of weights, fields of images, rotations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from revisual_fast.rollout.engine import Sampling
from tests.vllm.engines import Engines, build_family, trainer_logp


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "qwen2"])
def test_completions_have_the_trainers_log_probs(
    model_type: str, engines: Engines, tiny_vl: Path, tmp_path: Path
) -> None:
    vllm = engines.get(model_type, build_family(model_type, tmp_path / "model", tiny_vl))
    groups = vllm.generate(Sampling(16, seed=1), 2)
    got = torch.cat([r.logp for group in groups for r in group])
    torch.testing.assert_close(got, trainer_logp(vllm.policy, vllm.prompts, groups, 1.0), rtol=1e-4, atol=1e-4)
    vllm.engine.close()
