"""``swift rlhf --rlhf_type grpo`` on a small model, stock against patched: what is logged, and every gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from revisual_fast.integrations.seams import _SAID, SeamError, patched, unpatch
from tests.processes import run_code

CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "kl": {"beta": 0.1, "loss_type": "bnpo"},
    "entropy": {"loss_type": "dapo", "num_iterations": 2, "log_entropy": True, "top_entropy_quantile": 0.7},
    "lora": {"tuner_type": "lora", "target_modules": ["q_proj", "v_proj"], "beta": 0.1},
    "gspo, accumulated": {"importance_sampling_level": "sequence", "gradient_accumulation_steps": 2},
    "without padding": {"padding_free": True, "attn_impl": "sdpa", "loss_type": "cispo", "epsilon_high": 2.0},
    "without padding, entropy": {"padding_free": True, "attn_impl": "sdpa", "log_entropy": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.dropin.swift.runs import make_model

    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("swift.trainers.mixin.check_local_model_is_latest", lambda *_, **__: None)  # asks a server
    _SAID.clear()
    yield
    unpatch("swift")


@pytest.mark.parametrize("case", CASES)
def test_two_updates(case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from revisual_fast.integrations import swift as ours
    from tests.dropin.swift.runs import same, train

    wanted = train(folder, tmp_path / "stock", **CASES[case])
    scored: list[int] = []

    def score_tokens(*args: Any, **inputs: Any) -> Any:
        out = ours_score(*args, **inputs)
        assert out.get("logits") is None
        scored.append(int((args[1] != -100).sum()))
        return out

    ours_score = ours.score_tokens
    monkeypatch.setattr(ours, "score_tokens", score_tokens)
    ours.patch_swift()
    same(train(folder, tmp_path / "ours", **CASES[case]), wanted)
    assert 0 < max(scored) <= 4 * 12  # the tokens of the completions, and no others


def test_their_code_where_it_has_to_be() -> None:
    from swift.rlhf_trainers.grpo_trainer import GRPOTrainer

    from revisual_fast.integrations.swift import patch_swift
    from tests.scoring import build

    patch_swift()
    model = build("llama")
    trainer = SimpleNamespace(
        template=SimpleNamespace(sequence_parallel_size=2, padding_free=False),
        accelerator=SimpleNamespace(unwrap_model=lambda module: module),
        temperature=1.0,
        model_kwarg_keys=["logits_to_keep"],
        _get_logps_via_sp=lambda *_, **__: ("sp", None),
    )
    trainer._get_logps_via_local_forward = lambda *a, **k: GRPOTrainer._get_logps_via_local_forward(trainer, *a, **k)
    ids = torch.tensor([[3, 5, 6, 7, 9]])
    batch = SimpleNamespace(logits_to_keep=3, seq_lengths=None, completion_mask=torch.ones(1, 3, dtype=torch.bool))
    single = GRPOTrainer._get_per_token_logps_and_entropies_single
    with pytest.warns(RuntimeWarning, match="sequence_parallel_size > 1"):
        assert single(trainer, model, {"input_ids": ids}, batch) == ("sp", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single(trainer, model, {"input_ids": ids}, batch)  # said once
    trainer.template.sequence_parallel_size = 1
    fused, _ = single(trainer, model, {"input_ids": ids}, batch)
    model.lm_head.weight.ds_id = 1
    with pytest.warns(RuntimeWarning, match="zero3"):
        theirs, _ = single(trainer, model, {"input_ids": ids}, batch)
    torch.testing.assert_close(fused, theirs)


def test_patching(monkeypatch: pytest.MonkeyPatch) -> None:
    from swift.rlhf_trainers.grpo_trainer import GRPOTrainer

    from revisual_fast.integrations.swift import SINGLE, patch_swift

    stock = getattr(GRPOTrainer, SINGLE)
    patch_swift()
    patch_swift()
    assert getattr(GRPOTrainer, SINGLE) is not stock
    assert patched("swift")
    unpatch("swift")
    unpatch("swift")
    assert getattr(GRPOTrainer, SINGLE) is stock
    monkeypatch.setattr(GRPOTrainer, SINGLE, lambda self, model, inputs: None)
    with pytest.raises(SeamError, match=rf"GRPOTrainer.{SINGLE} takes \(self, model, inputs\)"):
        patch_swift()
    assert not patched("swift")
    monkeypatch.delattr(GRPOTrainer, SINGLE)
    with pytest.raises(SeamError, match=f"{SINGLE} is not there"):
        patch_swift()


def test_importing_patches_nothing() -> None:
    code = (
        "from swift.rlhf_trainers.grpo_trainer import GRPOTrainer as T\n"
        "name = '_get_per_token_logps_and_entropies_single'; before = getattr(T, name)\n"
        "import revisual_fast.integrations.swift\n"
        "assert getattr(T, name) is before"
    )
    run_code(code)
