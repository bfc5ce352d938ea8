"""The weights that go to an engine: which, under what names, with what values; and the fingerprints that prove it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from revisual_fast.config import LoraConfig
from revisual_fast.policy.load import _with_lora, export_model
from revisual_fast.policy.model import Policy
from revisual_fast.rollout import weights
from revisual_fast.rollout.weights import Fingerprint, WeightMeta, WeightSource, compare, fingerprint
from tests.models import TEXT, VISION, tiny

EVERY = (*TEXT, *VISION)
FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""What vLLM keeps as one weight, if it stands in one module."""


def adapted(name: str, **options: Any) -> Policy:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    policy = Policy(_with_lora(tiny(name), LoraConfig(rank=2, **options), None))
    with torch.no_grad():
        for n, p in policy.model.named_parameters():
            if ".lora_" in n:
                p.normal_(0, 0.1)  # as if they had been trained
    return policy


# ---- what is sent


@pytest.mark.parametrize("name", EVERY)
def test_all_weights_as_they_are(name: str) -> None:
    policy = Policy(tiny(name))
    source = WeightSource(policy)
    sent = dict(source.tensors())
    own = dict(policy.base.named_parameters())
    assert list(sent) == list(own), "in the model's order"
    for n, weight in sent.items():
        assert not weight.requires_grad
        assert weight.data_ptr() == own[n].data_ptr(), "nothing is copied"
    assert source.entries() == [WeightMeta(n, torch.float32, tuple(w.shape)) for n, w in sent.items()]
    assert sum(e.bytes for e in source.entries()) == 4 * sum(p.numel() for p in own.values())


def test_some_weights_come_in_the_models_order() -> None:
    source = WeightSource(Policy(tiny("llama")))
    names = {"lm_head.weight", "model.embed_tokens.weight"}
    assert [n for n, _ in source.tensors(names)] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert [e.name for e in source.entries(names)] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert list(source.tensors(frozenset())) == []
    with pytest.raises(AssertionError, match="no weights of this model"):
        source.entries({"lm_head.bias"})


def test_the_values_are_those_of_now() -> None:
    policy = Policy(tiny("llama"))
    source = WeightSource(policy)
    with torch.no_grad():
        policy.head_weight.add_(1)
    assert torch.equal(dict(source.tensors())["lm_head.weight"], policy.head_weight)


def test_tied_weights_come_once_as_the_input_embedding(tmp_path: Any) -> None:
    model = tiny("qwen2")
    model.tie_weights()
    names = [e.name for e in WeightSource(Policy(model)).entries()]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5_vl"])
def test_adapters_are_merged_and_not_sent(name: str, tmp_path: Any) -> None:
    policy = adapted(name)
    plain = dict(tiny(name).named_parameters())
    sent = dict(WeightSource(policy).tensors())
    assert list(sent) == list(plain)
    assert {e.name: e.shape for e in WeightSource(policy).entries()} == {n: tuple(p.shape) for n, p in plain.items()}
    export_model(policy, tmp_path)
    exported = dict(policy.family.loader.from_pretrained(tmp_path, dtype=torch.float32).named_parameters())
    for n, weight in sent.items():
        assert torch.equal(weight, exported[n]), n
        assert torch.equal(weight, plain[n]) != n.endswith("_proj.weight") or ".visual." in n, n


@torch.no_grad()
def test_a_merged_weight_does_what_base_and_adapter_do() -> None:
    policy = adapted("llama")
    layer: Any = policy.family.text.layers[1].mlp.up_proj
    merged = dict(WeightSource(policy).tensors())["model.layers.1.mlp.up_proj.weight"]
    x = torch.randn(5, merged.shape[1])
    torch.testing.assert_close(x @ merged.T, layer(x), rtol=1e-5, atol=1e-5)
    assert (layer.base_layer(x) - layer(x)).abs().max() > 0.01


def test_an_adapter_on_a_tied_weight_is_refused() -> None:
    pytest.importorskip("peft")
    model = tiny("qwen2")
    model.tie_weights()
    model = _with_lora(model, LoraConfig(rank=2, target_modules=r".*embed_tokens"), None)
    with pytest.raises(ValueError, match="leave this module out"):
        WeightSource(Policy(model))


# ---- what can have changed


@pytest.mark.parametrize("name", VISION)
def test_a_frozen_tower_is_not_sent_again(name: str) -> None:
    policy = Policy(tiny(name))
    source = WeightSource(policy)
    everything = {e.name for e in source.entries()}
    assert source.changed() == everything
    policy.freeze_vision()
    assert source.changed() == {n for n in everything if not n.startswith("model.visual.")}
    assert any(n.startswith("model.visual.") for n in everything)


def test_nothing_changes_in_a_frozen_model() -> None:
    policy = Policy(tiny("llama"))
    policy.model.requires_grad_(False)
    assert WeightSource(policy).changed() == frozenset()


@pytest.mark.parametrize("name", EVERY)
def test_fused_weights_are_sent_as_a_whole(name: str) -> None:
    """Whatever single weight is trained, all that an engine fuses with it comes along."""
    policy = Policy(tiny(name))
    policy.model.requires_grad_(False)
    source = WeightSource(policy)
    parameters = dict(policy.base.named_parameters())
    for trained, parameter in parameters.items():
        parameter.requires_grad_(True)
        changed = source.changed()
        parameter.requires_grad_(False)
        assert trained in changed
        module, projection, *_ = (*trained.rsplit(".", 2), "")
        for fused in FUSED:
            if projection in fused:
                assert {n for n in parameters if n.startswith(f"{module}.") and n.split(".")[-2] in fused} <= changed
        towers = {n.startswith("model.visual.") for n in changed}
        assert towers == {trained.startswith("model.visual.")}, "but not the other tower"
        assert trained == "lm_head.weight" or "lm_head.weight" not in changed
    assert any("q_proj" in n for n in parameters)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llama"])
def test_adapted_modules_have_changed(name: str) -> None:
    policy = adapted(name)
    changed = WeightSource(policy).changed()
    expected = {n for n in dict(tiny(name).named_parameters()) if ".layers." in n and "layernorm" not in n}
    assert changed == expected
    for n, p in policy.model.named_parameters():
        p.requires_grad_(".lora_B." in n and ".layers.1.self_attn.q_proj." in n)
    assert WeightSource(policy).changed() == {n for n in expected if ".layers.1.self_attn." in n}


# ---- sharded weights


@pytest.fixture
def one_rank() -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def shard(model: nn.Module, mesh: Any) -> None:
    """Every parameter a DTensor: matrices divided by rows, the others on every rank."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            placement = Shard(0) if p.ndim > 1 else Replicate()
            sharded = distribute_tensor(p.detach(), mesh, [placement])
            setattr(module, name, nn.Parameter(sharded, requires_grad=p.requires_grad))


@pytest.mark.parametrize("lora", [False, True])
def test_shards_are_gathered(lora: bool, one_rank: Any) -> None:
    policy = adapted("llama") if lora else Policy(tiny("llama"))
    source = WeightSource(policy)
    whole = {n: w.clone() for n, w in source.tensors()}
    entries, changed = source.entries(), source.changed()
    shard(policy.model, one_rank)
    source = WeightSource(policy)
    assert source.entries() == entries
    assert source.changed() == changed
    for n, w in source.tensors():
        assert type(w) is Tensor
        torch.testing.assert_close(w, whole[n], rtol=1e-6, atol=1e-6)
    assert lora or source.fingerprints() == {n: (fingerprint(w), w.numel()) for n, w in whole.items()}


def _rank(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    policy = Policy(tiny("llama"))
    whole = {n: w.clone() for n, w in WeightSource(policy).tensors()}
    shard(policy.model, init_device_mesh("cpu", (2,)))
    weight: Any = policy.head_weight
    assert weight.to_local().shape[0] == weight.shape[0] // 2
    source = WeightSource(policy)
    assert {e.name: e.shape for e in source.entries()} == {n: tuple(w.shape) for n, w in whole.items()}
    for n, w in source.tensors():
        assert torch.equal(w, whole[n]), n
    dist.destroy_process_group()


def test_two_ranks_gather_what_they_share() -> None:
    mp.start_processes(_rank, (free_port(),), nprocs=2, start_method="fork")  # spawned, they would import for seconds


# ---- fingerprints

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {4: torch.int32, 2: torch.int16}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mixed(bits: int) -> int:
    """The hash of one element, in Python's integers."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ bits >> shift) * factor % 2**64
    return bits


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_a_fingerprint_is_the_sum_of_hashed_bits(dtype: torch.dtype) -> None:
    x = (10 * randn(3, 7)).to(dtype)
    size = 8 * x.element_size()
    as_int = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[size]
    bits = [b % 2**size for b in x.view(as_int).flatten().tolist()]
    before = x.clone()
    assert fingerprint(x) == sum(map(mixed, bits)) % 2**64
    assert torch.equal(x, before)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**30), st.integers(1, 60), st.sampled_from(DTYPES))
def test_order_and_division_do_not_count(seed: int, n: int, dtype: torch.dtype) -> None:
    x = randn(n, 3, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    assert fingerprint(x[torch.randperm(n, generator=generator)]) == fingerprint(x)
    cut = int(torch.randint(n + 1, (), generator=generator))
    assert (fingerprint(x[:cut]) + fingerprint(x[cut:])) % 2**64 == fingerprint(x)
    padded = torch.cat([x, torch.zeros(5, 3, dtype=dtype)])
    assert fingerprint(padded) == fingerprint(x)
    assert 0 <= fingerprint(x) < 2**64


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(DTYPES))
def test_any_bit_counts(data: st.DataObject, dtype: torch.dtype) -> None:
    x = randn(40, dtype=dtype, seed=data.draw(st.integers(0, 2**30)))
    size = x.element_size()
    i, bit = data.draw(st.integers(0, 39)), data.draw(st.integers(0, 8 * size - 1))
    other = x.clone()
    mask = 1 << bit if bit < 8 * size - 1 else -(1 << bit)
    other.view(BITS[size])[i] ^= mask
    assert fingerprint(other) != fingerprint(x)


def test_values_of_opposite_changes_do_not_cancel() -> None:
    x = randn(1000)
    other = x.clone()
    other[0], other[1] = x[1] + 1, x[0] - 1
    assert fingerprint(other) != fingerprint(x)
    other = torch.cat([x[:1], x])  # one twice, another missing
    assert fingerprint(other[:-1]) != fingerprint(x)


def test_zeros() -> None:
    assert fingerprint(torch.zeros(100)) == 0
    assert fingerprint(torch.zeros(0, 4)) == 0
    assert fingerprint(torch.tensor(0.0)) == 0
    assert fingerprint(-torch.zeros(1)) != 0
    assert fingerprint(torch.tensor(1.5)) == fingerprint(torch.tensor([1.5]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_chunks_and_parameters(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(12, 10, 6, dtype=dtype)
    views = [x.transpose(0, 2), x[::2, 1:], x[:, :, 3], x.expand(2, 12, 10, 6), x[None, :, ::3]]
    whole = [fingerprint(v.contiguous()) for v in views]
    assert [fingerprint(v) for v in views] == whole
    monkeypatch.setitem(weights.CHUNK, "cpu", 7)
    assert [fingerprint(v) for v in views] == whole
    assert fingerprint(nn.Parameter(x)) == fingerprint(x)


# ---- comparing


def of(*tensors: Tensor) -> Fingerprint:
    joined = torch.cat([t.flatten() for t in tensors])
    return fingerprint(joined), joined.numel()


Q, K, V = randn(8, 4), randn(2, 4, seed=1), randn(2, 4, seed=2)
NORM, HEAD = randn(4, seed=3), randn(5, 4, seed=4)
TRAINER = {"q": of(Q), "k": of(K), "v": of(V), "norm": of(NORM), "head": of(HEAD)}
MAPPING = {"q": "qkv", "k": "qkv", "v": "qkv", "norm": "norm", "head": "head"}
PADDING = torch.zeros(3, 4)


def engine(ways: int = 1, **instead: Fingerprint) -> list[dict[str, Fingerprint]]:
    """The workers of tensor parallelism; keys and values are repeated where there are more workers than heads (2)."""
    head = torch.cat([HEAD, PADDING]).chunk(ways)
    q, k, v = Q.chunk(ways), *([t for t in x.chunk(min(ways, 2)) for _ in range(max(1, ways // 2))] for x in (K, V))
    return [{"qkv": of(q[i], k[i], v[i]), "norm": of(NORM), "head": of(head[i]), **instead} for i in range(ways)]


@pytest.mark.parametrize("ways", [1, 2, 4, 8])
def test_an_engine_with_the_trainers_weights(ways: int) -> None:
    """Fused, padded; in several processes also divided, repeated, and repeated in part."""
    assert compare(TRAINER, engine(ways), MAPPING) == []


@pytest.mark.parametrize("ways", [1, 2, 4, 8])
@pytest.mark.parametrize("name", TRAINER)
def test_another_value_is_found_by_name(ways: int, name: str) -> None:
    wrong = {**TRAINER, name: (TRAINER[name][0] ^ 1, TRAINER[name][1])}
    (line,) = compare(wrong, engine(ways), MAPPING)
    assert name in line.partition(":")[0].split(", ")
    assert "other values" in line
    assert MAPPING[name] in line


def test_one_worker_with_old_weights_is_found() -> None:
    workers = engine(2)
    workers[1]["norm"] = of(NORM + 1)
    (line,) = compare(TRAINER, workers, MAPPING)
    assert line.startswith("norm: other values")


def test_what_is_missing_is_named() -> None:
    (line,) = compare(TRAINER, engine(qkv=(0, 0)), MAPPING)
    assert "the engine holds 0 of 48 elements" in line
    without = [{name: value for name, value in engine()[0].items() if name != "norm"}]
    assert compare(TRAINER, without, MAPPING) == ["norm: missing in the engine (the engine's norm)"]
    unmapped = {name: to for name, to in MAPPING.items() if name != "head"}
    assert compare(TRAINER, engine(), unmapped) == [
        "head: a parameter of the engine that gets no weight",
        "head: the engine has no parameter for it",
    ]


def test_a_parameter_that_gets_no_weight_is_named() -> None:
    (line,) = compare(TRAINER, engine(extra=of(NORM)), MAPPING)
    assert line == "extra: a parameter of the engine that gets no weight"


def test_a_model_that_was_reloaded_has_the_same_fingerprints(tmp_path: Any) -> None:
    policy = Policy(tiny("qwen3"))
    export_model(policy, tmp_path)
    again = Policy(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    found = WeightSource(policy).fingerprints()
    mapping = {name: name for name in found}
    assert compare(found, [WeightSource(again).fingerprints()], mapping) == []
    with torch.no_grad():
        again.head_weight[3, 5] *= 1.001
    assert compare(found, [WeightSource(again).fingerprints()], mapping) == [
        "lm_head.weight: other values in the engine (the engine's lm_head.weight)"
    ]
