"""liger-kernel's RMSNorm, SwiGLU and RoPE in every family: when they are used, and what they change.

The kernels run in Triton's interpreter, in fp32 (it has no bf16 arithmetic); tests/gpu has the same on a GPU.
"""

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch

from revisual_fast.config import ModelConfig
from revisual_fast.policy import liger
from revisual_fast.policy.families import Qwen2_5VL
from revisual_fast.policy.liger import apply_liger, use_liger
from revisual_fast.policy.load import load_policy
from revisual_fast.policy.model import Policy
from tests.groups import make_groups, packed_logp
from tests.models import TEXT, VISION, tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = [(7, [(1, 4, 4)], [4, 9, 1]), (5, [], [6, 3])]  # one prompt with an image, one without, packed in one row
needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs liger-kernel and TRITON_INTERPRET=1",
)


@pytest.fixture
def interpreted(monkeypatch):
    """What liger's RMSNorm needs and the interpreter lacks: fp32 scalars as tensors, and libdevice's rsqrt."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))


def make_policy(path, liger=False, dtype="float32", **options):
    return load_policy(path, ModelConfig(path=str(path), dtype=dtype, device="cpu", liger_kernels=liger, **options))


def loss_and_gradients(policy):
    loss = packed_logp(policy, make_groups(policy.family, SHAPES)).mean()
    loss.backward()
    return loss.item(), {n: p.grad.double() for n, p in policy.model.named_parameters() if p.grad is not None}


@needs_interpreter
def test_loss_and_gradients_change_by_less_than_bf16_noise(tiny_vl, interpreted):
    loss, gradients = loss_and_gradients(make_policy(tiny_vl))
    rounded_loss, rounded = loss_and_gradients(make_policy(tiny_vl, dtype="bfloat16"))
    liger_loss, liger = loss_and_gradients(make_policy(tiny_vl, liger=True))
    assert abs(liger_loss - loss) < abs(rounded_loss - loss) / 10
    assert liger.keys() == gradients.keys()
    for name, gradient in gradients.items():
        noise = (rounded[name] - gradient).norm()
        assert (liger[name] - gradient).norm() <= noise / 10, name


@needs_interpreter
@pytest.mark.parametrize("name", TEXT + VISION)
def test_every_family(name, interpreted):
    """As above; a Qwen3 has a norm over every head as well, and towers have norms and MLPs of other kinds."""

    def gradients(model, liger=False):
        policy = Policy(model)
        changed = apply_liger(policy.family) if liger else {}
        groups = make_groups(policy.family, SHAPES if name in VISION else [(7, [], [4, 9, 1]), (5, [], [6, 3])])
        packed_logp(policy, groups).mean().backward()
        return changed, {n: p.grad.double() for n, p in policy.model.named_parameters() if p.grad is not None}

    (_, exact), (_, rounded) = gradients(tiny(name)), gradients(tiny(name).bfloat16())
    changed, found = gradients(tiny(name), liger=True)
    norms = {"llama": 7, "qwen2": 7, "qwen3": 13, "qwen2_vl": 7, "qwen2_5_vl": 14, "qwen3_vl": 13}[name]
    assert changed == {"rms_norm": norms, "swiglu": 6 if name == "qwen2_5_vl" else 3, "rope": 3}
    assert found.keys() == exact.keys()
    for parameter, gradient in exact.items():
        noise = (rounded[parameter] - gradient).norm()
        assert (found[parameter] - gradient).norm() <= noise / 10, parameter


@needs_interpreter
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"lora": {"rank": 2}}])
def test_with_checkpointing_and_with_lora(tiny_vl, interpreted, options):
    if "lora" in options:
        pytest.importorskip("peft")
    torch.manual_seed(0)
    loss, gradients = loss_and_gradients(make_policy(tiny_vl, **options))
    torch.manual_seed(0)
    liger_loss, liger = loss_and_gradients(make_policy(tiny_vl, liger=True, **options))
    assert liger_loss == pytest.approx(loss, abs=1e-5)
    assert liger.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(liger[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
def test_every_module_of_this_model_is_changed_and_no_other_model(tiny_vl):
    policy, other = make_policy(tiny_vl), make_policy(tiny_vl)
    before = packed_logp(other, make_groups(other.family, SHAPES))
    text, vision = len(policy.family.text.layers), len(policy.family.visual.blocks)
    assert apply_liger(policy.family) == {"rms_norm": 2 * text + 2 * vision + 2, "swiglu": text + vision, "rope": text}
    kinds = {"RMSNorm", "MLP", "Attention"}
    own = policy.family.visual.patch_embed, other.family.visual.patch_embed  # which the family itself has changed
    for name, module in policy.model.named_modules():
        if module in own:
            continue
        expected = any(type(module).__name__.endswith(kind) for kind in kinds) and "Vision" not in type(module).__name__
        assert ("forward" in vars(module)) == expected, name
    assert not any("forward" in vars(module) for module in other.model.modules() if module not in own)
    assert torch.equal(packed_logp(other, make_groups(other.family, SHAPES)), before)


def test_rotation_by_a_given_function_is_that_of_transformers(tiny_vl):
    policy = make_policy(tiny_vl)
    groups = make_groups(policy.family, SHAPES)
    before, calls = packed_logp(policy, groups), []

    def rotary(q, k, cos, sin):
        calls.append((tuple(q.shape), tuple(k.shape), tuple(cos.shape)))
        half = q.shape[-1] // 2

        def turn(x):
            return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

        return turn(q), turn(k)

    layers = policy.family.use_rotary(rotary)
    assert torch.equal(packed_logp(policy, groups), before)
    assert len(calls) == layers == len(policy.family.text.layers)
    (_, heads, t, d), (_, kv_heads, _, _), cos = calls[0]
    config = policy.base.config.text_config
    assert (heads, kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert cos == (1, t, d)  # the three axes of M-RoPE are in it


def test_an_attention_that_rotates_otherwise_is_refused():
    class Attention:
        def forward(self, hidden):
            return hidden

    layer = SimpleNamespace(self_attn=Attention())
    family = object.__new__(Qwen2_5VL)
    family.model = SimpleNamespace(model=SimpleNamespace(language_model=SimpleNamespace(layers=[layer])))
    with pytest.raises(ValueError, match=r"set model\.liger_kernels to false"):
        family.use_rotary(lambda q, k, cos, sin: (q, k))


def test_when_they_are_used(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert use_liger("auto", CUDA)[0]
    assert use_liger(True, CUDA)[0]
    assert use_liger(False, CUDA) == (False, "model.liger_kernels is false")
    assert use_liger("auto", CPU) == (False, "they need a CUDA device and this is cpu")
    with pytest.raises(ValueError, match="need a CUDA device and this is cpu: set it to auto"):
        use_liger(True, CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_liger(True, CPU)[0]
    assert not use_liger("auto", CPU)[0]
    monkeypatch.setattr(liger.transformers, "__version__", "5.10.4")
    assert use_liger("auto", CUDA) == (False, "they need transformers 5.17, and 5.10.4 is installed")
    with pytest.raises(ValueError, match="pip install -U transformers"):
        use_liger(True, CUDA)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert use_liger("auto", CUDA) == (False, "liger-kernel is not installed")
    for device in (CPU, CUDA):
        with pytest.raises(ValueError, match="not installed: pip install liger-kernel"):
            use_liger(True, device)


def test_the_setting(tiny_vl, monkeypatch):
    assert ModelConfig(path="x").liger_kernels == "auto"
    for value in ("yes", 1, None):
        with pytest.raises(ValueError, match="liger_kernels"):
            ModelConfig(path="x", liger_kernels=value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"model\.liger_kernels is true, but"):
        make_policy(tiny_vl, liger=True)
