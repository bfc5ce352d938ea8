"""What is benchmarked: the reference is the objective, inputs favour nobody, and every variant computes the same."""

import sys
from types import SimpleNamespace

import pytest
import torch

from bench import checks, ours, packing, peers
from bench.harness import Case
from bench.inputs import (
    OBJECTIVE,
    SEQUENCE_OBJECTIVE,
    clip_loss,
    distinct_kept,
    make_inputs,
    reference,
    sequence_clip_loss,
    statistics_reference,
)
from bench.plain import WIDE
from bench.problems import OPS
from tests.numerics import naive_logprob, naive_policy_loss

CASE = Case("linear_policy_loss", 16, 8, 40)


def test_fp32_logits_are_held_against_fp32_logits():
    """From bf16 hidden states: the customary bound would let bf16 logits pass for fp32 ones."""
    case = Case("linear_policy_loss", 64, 32, 200, "bfloat16")
    variants = {v.name: v for v in OPS["linear_policy_loss"](case).variants}
    assert variants["revisual-fast torch"].yardsticks == ("eager", WIDE)
    assert variants["revisual-fast torch, bf16 logits"].yardsticks == ("eager", "eager")
    assert variants[WIDE].yardsticks == ("eager", WIDE)
    x = make_inputs(case)
    answer = reference(x, clip_loss(x))
    names = ("eager", WIDE, "revisual-fast torch")
    errors = {name: checks.errors_of(variants[name].setup().run(), answer) for name in names}
    assert errors[WIDE]["logp"] < errors["eager"]["logp"] / 100
    allowed = checks.allowed_errors(list(errors[WIDE]), errors["eager"], errors[WIDE])
    assert all(errors["revisual-fast torch"][name] <= allowed[name] for name in allowed)
    assert all(errors[WIDE][name] <= 2 * errors["eager"][name] for name in ("d_hidden", "d_weight"))


@pytest.mark.parametrize(
    ("op", "level"),
    [
        ("linear_policy_loss", "token"),
        ("policy_loss_from_logits", "token"),
        ("policy_loss_from_logits_gspo", "sequence"),
    ],
)
def test_the_reference_is_the_objective(op, level):
    """Against the naive loss of the tests, token by token, and autograd."""
    x = make_inputs(Case(op, 16, 8 if op.startswith("linear") else 0, 40, "float64"))
    loss_of = clip_loss(x) if level == "token" else sequence_clip_loss(x)
    found = reference(x, loss_of)
    if x.logits is None:
        hidden, weight = x.head
    else:
        hidden, weight = x.logits, torch.eye(40, dtype=torch.float64)
    logp, entropy = naive_logprob(hidden, weight, x.targets)
    loss = naive_policy_loss(logp, entropy, *objective_of(x, level))
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["entropy"], entropy.detach())
    name = "d_hidden" if x.logits is None else "d_logits"
    torch.testing.assert_close(found[name], torch.autograd.grad(loss, [hidden])[0], rtol=1e-6, atol=1e-12)
    statistics = statistics_reference(x)
    assert set(statistics) == {"logp", "entropy"}
    assert all(torch.equal(value, found[name]) for name, value in statistics.items())


def objective_of(x, level):
    return (x.tokens, OBJECTIVE) if level == "token" else (x.sequences, SEQUENCE_OBJECTIVE)


def test_no_sequence_is_clipped_and_its_ratio_is_not_its_tokens():
    x = make_inputs(Case("policy_loss_from_logits_gspo", 4096, 0, 40))
    c = {level: reference(x, loss_of(x))["c"] for level, loss_of in (("t", clip_loss), ("s", sequence_clip_loss))}
    assert (c["s"] != 0).all()
    assert not torch.allclose(c["s"], c["t"], rtol=0.01)


def test_no_row_is_near_a_bound_and_few_are_clipped():
    x = make_inputs(Case("linear_policy_loss", 4096, 8, 40))
    logp = reference(x, clip_loss(x))["logp"]
    ratio = (logp - x.old_logp).exp()
    distance = torch.minimum((ratio - 0.8).abs(), (ratio - 1.2).abs())
    assert distance.min() > 0.05
    clipped = ((ratio > 1.2) & (x.advantages > 0)) | ((ratio < 0.8) & (x.advantages < 0))
    assert 0 < clipped.float().mean() < 0.03, "no variant gains from skipping rows"


def test_the_kept_set_has_every_id_once_and_the_target():
    x = make_inputs(Case("sampling_mask_replay", 64, 8, 200))
    assert (x.kept == x.targets[:, None]).any(1).all()
    assert all(len(row.unique()) == len(row) for row in x.kept)
    assert distinct_kept(x) == len(set(x.kept.flatten().tolist())) < x.kept.numel()


def named(op, *sizes):
    return {v.name: v for v in OPS[op](Case(op, *sizes)).variants}


def test_the_cuda_backend_stands_in_the_list_where_it_is_built(monkeypatch):
    shapes = {"linear_policy_loss": (16, 8, 40), "mrope": (16, 8, 0)}
    for state in ("not built: run `make cuda`", "built, but cannot be loaded", "yes"):
        monkeypatch.setattr(ours, "available_backends", lambda op, state=state: {"cuda": state, "torch": "yes"})
        problem = None if state == "yes" else state
        monkeypatch.setattr(ours, "backend_problem", lambda name, device, said=problem: said)
        for op, sizes in shapes.items():
            found = named(op, *sizes).get("revisual-fast cuda")
            if state.startswith("not built"):
                assert found is None
            else:
                assert (found.setup is None, found.reason) == ((False, "") if state == "yes" else (True, state))
    assert "revisual-fast cuda" not in named("group_advantages", 16, 0, 0), "has no CUDA kernel"


def test_the_cuda_backend_is_also_timed_with_other_blocks(monkeypatch):
    monkeypatch.setattr(ours, "available_backends", lambda op: {"cuda": "yes", "torch": "yes"})
    rows_cuda = SimpleNamespace(BLOCKS_PER_MULTIPROCESSOR=2)
    monkeypatch.setitem(sys.modules, "revisual_fast.kernels.rows_cuda", rows_cuda)
    seen = []

    def op(logits, *arguments, **options):
        seen.append((options["backend"], rows_cuda.BLOCKS_PER_MULTIPROCESSOR))
        return SimpleNamespace(loss=logits.sum(), logp=logits[:, 0], entropy=logits[:, 0])

    monkeypatch.setattr(ours, "policy_loss_from_logits", op)
    variants = named("policy_loss_from_logits", 16, 0, 40)
    for name in ("revisual-fast cuda, read twice", "revisual-fast cuda, one block", "revisual-fast cuda"):
        variants[name].setup().run()
    assert seen == [("cuda", 0), ("cuda", 1), ("cuda", 2)]
    assert not any("torch, read twice" in name for name in variants)


@pytest.mark.parametrize("op", ["policy_loss_from_logits_gspo", "logits_statistics"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_and_plain_torch_on_logits(op, dtype):
    problem = OPS[op](Case(op, 64, 0, 300, dtype))
    answer = problem.reference()
    wanted = ("revisual-fast torch", "revisual-fast torch, in place", "eager", "eager, in chunks")
    errors = {v.name: checks.errors_of(v.setup().run(), answer) for v in problem.variants if v.name in wanted}
    assert len(errors) == 3
    for found in errors.values():
        allowed = checks.allowed_errors(list(found), errors["eager"])
        assert all(found[name] <= allowed[name] for name in found)
    outputs = {"logp", "entropy"} | (set() if op == "logits_statistics" else {"loss", "d_logits"})
    assert set(errors["revisual-fast torch"]) == outputs


@pytest.mark.parametrize(
    ("op", "sizes", "outputs"),
    [
        ("gather_rows", (20, 6, 0), ["rows", "d_hidden"]),
        ("gather_kv", (67, 256, 0), ["keys", "values", "d_key", "d_value"]),
        ("gather_kv", (3, 6, 0), ["keys", "values", "d_key", "d_value"]),
        ("pack_embeddings", (67, 6, 40), ["rows", "d_table", "d_features"]),
        ("mrope", (20, 256, 0), ["q_turned", "k_turned", "d_q", "d_k"]),
        ("mrope", (20, 6, 0), ["q_turned", "k_turned", "d_q", "d_k"]),
    ],
)
def test_packed_rows_against_float64(op, sizes, outputs):
    """In float64 our torch backend is exact, so that an error is one of the reference."""
    problem = OPS[op](Case(op, *sizes, "float64"))
    mine = next(v for v in problem.variants if v.name == "revisual-fast torch")
    errors = checks.errors_of(mine.setup().run(), problem.reference())
    assert set(errors) == set(outputs)
    assert max(errors.values()) < 1e-14
    problem = OPS[op](Case(op, *sizes, "bfloat16"))
    answer = problem.reference()
    plain = [v for v in problem.variants if v.role == "plain" and not v.slow_start]
    errors = {v.name: checks.errors_of(v.setup().run(), answer) for v in plain}
    for found in errors.values():
        allowed = checks.allowed_errors(outputs, errors["eager"])
        assert all(found[name] <= allowed[name] < 0.02 for name in outputs)


def test_transformers_turns_q_and_k_in_the_same_way():
    problem = OPS["mrope"](Case("mrope", 20, 256, 0))
    variants = {v.name: v for v in problem.variants}
    answer = problem.reference()
    theirs, eager = (checks.errors_of(variants[n].setup().run(), answer) for n in ("transformers", "eager"))
    assert all(theirs[name] <= 2 * eager[name] < 1e-4 for name in theirs)


def test_each_completion_comes_behind_its_prompt():
    rows = packing.shared_prompts(4 * 32)  # prompts of 16 rows, completions of 2
    first = rows[: len(rows) // 4].tolist()
    prompt = list(range(16))
    assert first == prompt + [row for i in range(16, 32, 2) for row in [*prompt, i, i + 1]]
    assert torch.equal(rows.unique(), torch.arange(128))
    assert torch.equal(packing.shared_prompts(70).unique(), torch.arange(70)), "whatever is left over is a prompt"


def test_peers_run_in_the_settings_they_recommend():
    pytest.importorskip("liger_kernel")
    x = make_inputs(CASE)
    names = [v.name for v in peers.liger_linear_grpo(CASE, x)]
    assert names == ["Liger fused linear GRPO", "Liger fused linear GRPO, one chunk"]
    on_cuda = Case("linear_policy_loss", 16, 8, 40, "bfloat16", "cuda")
    assert peers.liger_linear_grpo(on_cuda, x)[-1].name.endswith("TF32")
    before = torch.backends.cuda.matmul.allow_tf32
    with peers.allow_tf32(True):
        assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before, "the yardstick keeps what was set"
