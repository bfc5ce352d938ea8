"""Putting it into verl and taking it out."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("verl", reason="needs verl: make test-dropin")
from verl.trainer.ppo import core_algos
from verl.utils import device
from verl.utils.kernel import linear_cross_entropy as kernel
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

import revisual_fast.integrations.verl as integration
from revisual_fast.integrations import SeamError, seams
from revisual_fast.integrations.verl.engine import SharedPromptEngine
from revisual_fast.integrations.verl.head import linear_cross_entropy
from revisual_fast.integrations.verl.loss import POLICY_LOSSES
from tests.processes import run_code

OURS = {
    "losses": sorted(POLICY_LOSSES),
    "head": linear_cross_entropy,
    "engines": {(b, d): SharedPromptEngine for b in ("fsdp", "fsdp2") for d in ("cuda", "cpu")},
}


def there() -> dict[str, Any]:
    """What of this package is in verl."""
    engines = {
        (backend, at): registered
        for backend, registry in EngineRegistry._engines["language_model"].items()
        for at, registered in registry.items()
        if registered.__module__.startswith("revisual_fast")
    }
    losses = sorted(n for n, x in core_algos.POLICY_LOSS_REGISTRY.items() if type(x).__module__.startswith("revisual"))
    return {"losses": losses, "head": kernel.linear_cross_entropy, "engines": engines}


def test_in_and_out_and_in_again():
    assert there() == OURS
    integration.patch()
    assert there() == OURS
    integration.unpatch()
    assert there() == {"losses": [], "head": kernel.LinearCrossEntropy.apply, "engines": {}}
    registry = EngineRegistry._engines["language_model"]["fsdp2"]
    assert registry["cuda"] is transformer_impl.FSDPEngineWithLMHead
    assert "cpu" not in registry
    integration.unpatch()
    integration.patch()
    assert there() == OURS
    assert registry["npu"] is transformer_impl.FSDPEngineWithLMHead


@pytest.mark.parametrize(
    ("owner", "name", "moved", "match"),
    [
        (core_algos, "agg_loss", None, "core_algos:agg_loss is not there"),
        (core_algos, "agg_loss", lambda losses, mask: None, "core_algos:agg_loss takes"),
        (transformer_impl.FSDPEngineWithLMHead, "prepare_model_inputs", None, "prepare_model_inputs is not there"),
        (transformer_impl.FSDPEngine, "_build_module", None, "_build_module is not there"),
        (kernel.LinearCrossEntropy, "forward", lambda ctx, hidden, labels: None, r"LinearCrossEntropy\.forward takes"),
        (device, "get_device_id", None, "get_device_id is not there"),
        (EngineRegistry, "_engines", {"language_model": {}}, "has no language_model, fsdp, cuda"),
    ],
)
def test_a_seam_that_has_moved_is_named_and_nothing_is_replaced(monkeypatch, owner, name, moved, match):
    integration.unpatch()
    if moved is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, moved)
    with pytest.raises(SeamError, match=match):
        integration.patch()
    assert not seams.patched("verl")
    monkeypatch.undo()
    integration.patch()
    assert there() == OURS


def test_another_version_is_refused(monkeypatch):
    integration.unpatch()
    monkeypatch.setattr(seams.metadata, "version", lambda name: "0.12.0")
    with pytest.raises(SeamError, match=r"is for verl >=0\.9\.1,<0\.10; 0\.12\.0 is installed"):
        integration.patch()
    monkeypatch.undo()
    integration.patch()


EXTERNAL_LIB = """
import sys
import revisual_fast, revisual_fast.integrations
assert "verl" not in sys.modules
from revisual_fast.integrations import seams
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as losses
from verl.utils.kernel import linear_cross_entropy as kernel
from verl.workers.config import HFModelConfig
from verl.workers.engine import EngineRegistry
engine = lambda: EngineRegistry._engines["language_model"]["fsdp2"]["cuda"].__name__
stock = kernel.linear_cross_entropy
assert not any(name.startswith("revisual_fast") for name in losses) and engine() == "FSDPEngineWithLMHead"
assert not seams.patched("verl") and "revisual_fast.integrations.verl" not in sys.modules
try:
    HFModelConfig(path="/nowhere", external_lib="revisual_fast.integrations.verl")
except Exception as error:
    print(type(error).__name__, error)
assert "revisual_fast" in losses and engine() == "SharedPromptEngine"
assert kernel.linear_cross_entropy is not stock
"""
EVERY_PROCESS = """
import verl
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as losses
assert "revisual_fast" in losses
"""


@pytest.mark.parametrize(
    ("code", "variables"),
    [(EXTERNAL_LIB, {}), (EVERY_PROCESS, {"VERL_USE_EXTERNAL_MODULES": "revisual_fast.integrations.verl"})],
    ids=["external_lib", "VERL_USE_EXTERNAL_MODULES"],
)
def test_verl_imports_it_where_it_is_asked_to(code, variables):
    """And nothing else does: importing this package alone changes nothing."""
    run_code(code, **variables)
