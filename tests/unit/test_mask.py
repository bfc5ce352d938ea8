"""``TokenBatch.mask``: a row that does not count is as good as not there, whatever it holds."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective, TokenBatch, aggregation_weights, library, linear_policy_loss
from revisual_fast import policy_loss_from_logits as from_logits
from revisual_fast.kernels import plan
from revisual_fast.kernels.reference import TorchChunk, Transform
from revisual_fast.kernels.rows import KernelChunk, RawRows, row_kernels, solve
from revisual_fast.losses import Rows, loss_gradients, whole_sequences
from revisual_fast.objective_metrics import policy_metrics
from tests.devices import ALL_BACKENDS, DEVICE, KERNELS, ON_DEVICE
from tests.numerics import evaluate, flops_of, grads, loss_batch, make, make_tokens, relative_error
from tests.unit.test_objectives import AGGREGATIONS, CORRECTIONS, KL, MASKS, VARIANTS, combinations, excluded

pytestmark = ON_DEVICE

GARBAGE = (float("nan"), float("inf"), -float("inf"), 1e30)
V = 19


def on_device(tokens: TokenBatch) -> TokenBatch:
    values = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
    return TokenBatch(**{name: v if v is None or name == "cu_seqlens" else v.to(DEVICE) for name, v in values.items()})


def some_rows(n: int, whole: slice = slice(0, 0), seed: int = 0) -> Tensor:
    """``[n]`` bool, about two thirds True, and none of the rows ``whole``."""
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.66
    mask[whole] = False
    return mask


def garbled(values: Tensor, mask: Tensor) -> Tensor:
    """``values [N, ...]`` with rubbish in the rows that do not count."""
    rubbish = torch.tensor(list(itertools.islice(itertools.cycle(GARBAGE), len(mask))), dtype=values.dtype)
    values = values.detach().clone()
    values[~mask] = rubbish[~mask].reshape(-1, *[1] * (values.ndim - 1)).to(values.device)
    return values


def both(tokens: TokenBatch, mask: Tensor) -> tuple[TokenBatch, TokenBatch]:
    """The batch with a mask and rubbish where it is False, and the batch of the other rows only."""
    names = [
        f.name for f in fields(tokens) if f.name not in ("cu_seqlens", "mask") and getattr(tokens, f.name) is not None
    ]
    dirty: dict[str, Any] = {"mask": mask}
    clean: dict[str, Any] = {}
    for name in names:
        value = getattr(tokens, name)
        per_row = value.shape == mask.shape
        dirty[name] = garbled(value, mask) if per_row else value
        clean[name] = value[mask] if per_row else value
    if tokens.cu_seqlens is not None:
        clean["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), mask.cumsum(0)])[tokens.cu_seqlens].int()
    return replace(tokens, **dirty), replace(tokens, **clean)


# Objectives on [N] vectors


@pytest.mark.parametrize("on_policy", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())) or "clip")
def test_objectives_equal_those_of_the_other_rows(variant: dict[str, Any], level: str, on_policy: bool) -> None:
    logp, entropy, tokens = loss_batch((4, 0, 1, 2, 5))
    tokens = replace(tokens, old_logp=None) if on_policy else tokens
    mask = some_rows(len(logp), whole=slice(5, 7))  # the fourth sequence has no row that counts
    assert 0 < mask.sum() < len(mask) - 2
    dirty, clean = both(tokens, mask)
    kl = [KL[0], KL[-1]]
    for of in combinations([{**variant, "level": level}], kl, CORRECTIONS, AGGREGATIONS, MASKS):
        if excluded(of):
            continue
        o = PolicyObjective(entropy_coef=0.05, **of)
        loss, c, e = evaluate(o, garbled(logp, mask), garbled(entropy, mask), dirty)
        expected = evaluate(o, logp[mask], entropy[mask], clean)
        torch.testing.assert_close((loss, c[mask], e[mask]), expected, rtol=1e-12, atol=1e-13, msg=str(of))
        assert not c[~mask].any(), of
        assert not e[~mask].any(), of
        zeros = logp.masked_fill(~mask, 0), entropy.masked_fill(~mask, 0)  # as the kernels give them
        seen = []
        for vectors, batch in ((zeros, dirty), ((logp[mask], entropy[mask]), clean)):
            prepared, _ = o.prepare(batch, len(vectors[0]), logp.dtype, logp.device)
            seen.append(policy_metrics(o, *vectors, prepared))
        torch.testing.assert_close(*seen, rtol=1e-12, atol=1e-13, msg=str(of))


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda a: a["aggregation"])
def test_weights_count_rows_that_count(aggregation: dict[str, Any]) -> None:
    cu, mask = torch.tensor([0, 3, 3, 5]), torch.tensor([True, False, True, False, False])
    weights = aggregation_weights(n_rows=5, cu_seqlens=cu, mask=mask, **aggregation)
    share = {"token_mean": 1 / 2, "sequence_mean": 1 / 6, "sequence_sum": 1 / 3, "constant": 1 / 21}
    assert torch.equal(weights, torch.tensor([1.0, 0, 1, 0, 0]) * share[aggregation["aggregation"]])
    every = torch.ones(5, dtype=torch.bool)
    of: dict[str, Any] = {"n_rows": 5, "cu_seqlens": cu, **aggregation}
    assert torch.equal(aggregation_weights(mask=every, **of), aggregation_weights(**of))


def test_an_own_surrogate_may_give_anything_where_a_row_does_not_count() -> None:
    logp, entropy, tokens = loss_batch()
    mask = some_rows(len(logp))
    dirty, clean = both(tokens, mask)

    @whole_sequences
    def surrogate(r: Rows) -> Tensor:
        odd = r.logp / r.entropy  # 0 / 0 where a row does not count
        return r.sequence_mean(odd) * r.advantage + odd

    o = PolicyObjective(surrogate=surrogate)
    loss, c, e = evaluate(o, logp, entropy, dirty)
    expected = evaluate(o, logp[mask], entropy[mask], clean)
    torch.testing.assert_close((loss, c[mask], e[mask]), expected)
    assert expected[0].isfinite()
    assert not c[~mask].any()
    assert not e[~mask].any()


def test_an_own_objective_gets_zeros_and_its_gradient_there_is_dropped() -> None:
    logp, entropy, tokens = loss_batch()
    mask = some_rows(len(logp))
    dirty = both(tokens, mask)[0].expanded(len(logp), logp.dtype, logp.device)

    def own(logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
        assert not logp[~mask].any()
        assert not entropy[~mask].any()
        assert tokens.advantages is not None
        return (logp.exp() + entropy.exp() * (1 - tokens.advantages)).sum()

    loss, c, e = loss_gradients(own, garbled(logp, mask), garbled(entropy, mask), dirty)
    assert loss.isfinite()
    assert e is not None
    assert torch.equal(c != 0, mask)
    assert torch.equal(e != 0, mask)


# The ops


CASES: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"kl_coef": 0.1}),
    ("dapo", {"entropy_coef": 0.1, "rollout_correction": "truncate"}),
    ("gspo", {"kl_coef": 0.1, "kl_bias_correction": True}),
    ("cispo", {"rollout_correction": "mask", "rollout_level": "sequence"}),
    ("sapo", {"off_policy_mask": 0.1}),
    ("gmpo", {}),
    ("dr_grpo", {"constant_length": 5}),
    ("sft", {}),
]


def run(op: str, rows: Tensor, weight: Tensor, targets: Tensor, tokens: Any, o: Any, **options: Any) -> list[Tensor]:
    """Loss, logp, entropy, metrics, and the gradient of the rows (of the weight too where there is one)."""
    if op == "linear":
        rows, weight = rows.detach().requires_grad_(), weight.detach().requires_grad_()
        out = linear_policy_loss(rows, weight, targets, tokens, o, **options)
        of: tuple[Tensor, ...] = (rows, weight)
    else:
        leaf = rows.detach().requires_grad_()
        out, of = from_logits(leaf * 1, targets, tokens, o, inplace=op == "inplace", **options), (leaf,)
    metrics = torch.stack(list(out.metrics.values()))
    return [out.loss.detach(), out.logp, out.entropy, metrics, *grads(out.loss, *of)]


def problem(op: str, dtype: torch.dtype = torch.float32, n: int = 14) -> tuple[Tensor, Tensor, Tensor, TokenBatch]:
    x = make(n=n, dtype=dtype)
    hidden, weight = x["hidden"].detach(), x["weight"].detach()
    rows = hidden if op == "linear" else hidden @ weight.T
    return rows.to(DEVICE), weight.to(DEVICE), x["targets"].to(DEVICE), make_tokens(x)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("op", ["linear", "logits", "inplace"])
@pytest.mark.parametrize("chunk", [None, 5], ids=["one chunk", "chunks"])
@pytest.mark.parametrize(("preset", "of"), CASES, ids=lambda c: c if isinstance(c, str) else "")
def test_ops_equal_those_of_the_other_rows(
    preset: str, of: dict[str, Any], chunk: int | None, op: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:
        monkeypatch.setitem(plan.CHUNK_BYTES, DEVICE, chunk * V * 4)
    rows, weight, targets, tokens = problem(op)
    mask, o = (
        some_rows(14, whole=slice(5, 6)),
        PolicyObjective.preset(preset, **of),
    )  # the third sequence does not count
    dirty, clean = (on_device(batch) for batch in both(tokens, mask))
    mask, temperature = mask.to(DEVICE), torch.linspace(0.8, 1.2, 14, device=DEVICE)
    options: dict[str, Any] = {"softcap": 9.0, "backend": backend}
    absent = torch.where(mask, targets, torch.tensor(-100, device=DEVICE))
    got = run(op, garbled(rows, mask), weight, absent, dirty, o, temperature=temperature, **options)
    wanted = run(op, rows[mask], weight, targets[mask], clean, o, temperature=temperature[mask], **options)
    per_row = (1, 2, 4)  # logp, entropy, gradient of the rows
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if i in per_row:
            assert not a[~mask].any(), i
        torch.testing.assert_close(a[mask] if i in per_row else a, b)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("op", ["linear", "logits", "inplace"])
@pytest.mark.parametrize("preset", ["grpo", "gspo", "dapo"])
def test_a_mask_of_ones_changes_no_bit(preset: str, op: str, backend: str) -> None:
    rows, weight, targets, tokens = problem(op, torch.bfloat16)
    o = PolicyObjective.preset(preset, kl_coef=0.1, entropy_coef=0.1)
    every = replace(tokens, mask=torch.ones(14, dtype=torch.bool))
    runs = [run(op, rows, weight, targets, on_device(batch), o, backend=backend) for batch in (every, tokens)]
    metrics = [values.pop(3) for values in runs]
    torch.testing.assert_close(*metrics)
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("op", ["linear", "logits", "inplace"])
@pytest.mark.parametrize(("preset", "of"), CASES, ids=lambda c: c if isinstance(c, str) else "")
def test_no_row_counts(preset: str, of: dict[str, Any], op: str, backend: str) -> None:
    rows, weight, targets, tokens = problem(op)
    none = torch.zeros(14, dtype=torch.bool)
    dirty, _ = both(tokens, none)
    o = PolicyObjective.preset(preset, **of)
    got = run(op, garbled(rows, none), weight, targets.fill_(-100), on_device(dirty), o, backend=backend)
    for value in got:
        assert not value.any()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("op", ["linear", "logits"])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_nobody_looks_at_the_temperature_of_the_other_rows(backend: str, op: str, bad: float) -> None:
    rows, weight, targets, tokens = problem(op)
    mask = some_rows(14)
    temperature = torch.linspace(0.7, 1.3, 14)
    batch = on_device(replace(tokens, mask=mask))
    wanted = run(op, rows, weight, targets, batch, PolicyObjective(), temperature=temperature, backend=backend)
    spoilt = torch.where(mask, temperature, bad)
    got = run(op, rows, weight, targets, batch, PolicyObjective(), temperature=spoilt, backend=backend)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        run(op, rows, weight, targets, on_device(tokens), PolicyObjective(), temperature=spoilt, backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_single_bad_row_among_many(backend: str) -> None:
    """So few are not worth gathering the others: the row takes part in the products, with zeros."""
    rows, weight, targets, tokens = problem("linear", n=60)
    mask = torch.ones(60, dtype=torch.bool)
    mask[17] = False
    dirty, clean = (on_device(batch) for batch in both(tokens, mask))
    mask, o = mask.to(DEVICE), PolicyObjective.preset("reinforce")
    got = run("linear", garbled(rows, mask), weight, targets, dirty, o, backend=backend)
    wanted = run("linear", rows[mask], weight, targets[mask], clean, o, backend=backend)
    torch.testing.assert_close((got[0], got[3], got[4][mask], got[5]), (wanted[0], wanted[3], wanted[4], wanted[5]))
    assert not got[4][~mask].any()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("op", ["linear", "logits"])
def test_what_an_own_objective_gives_to_other_rows_is_dropped(op: str, backend: str) -> None:
    rows, weight, targets, tokens = problem(op)
    mask = some_rows(14)
    dirty, clean = (on_device(batch) for batch in both(tokens, mask))
    mask = mask.to(DEVICE)

    def own(logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
        assert tokens.advantages is not None
        loss = (1 - tokens.advantages) * logp.exp() - 0.1 * entropy  # neither it nor its gradient is 0 at 0
        return loss.sum() / (len(loss) if tokens.mask is None else tokens.mask.sum())

    got = run(op, garbled(rows, mask), weight, targets, dirty, own, backend=backend)
    wanted = run(op, rows[mask], weight, targets[mask], clean, own, backend=backend)
    torch.testing.assert_close(got[4][mask], wanted[4])
    torch.testing.assert_close(got[5:], wanted[5:])
    assert not got[4][~mask].any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_kernels_write_zeros(dtype: torch.dtype, softcap: float | None, backend: str) -> None:
    """Whatever coefficients they are given; rows longer than a tile, and some of the rows only."""
    n, v = 6, 5000  # rows of whole 16 bytes: wherever one lies, it is added up in the same order
    mask = torch.tensor([True, False, True, False, False, True], device=DEVICE)
    z = torch.randn(n, v, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    targets, temperature = torch.arange(n, device=DEVICE), garbled(torch.full((n,), 0.7, device=DEVICE), mask)
    c, e = garbled(torch.ones(n, device=DEVICE), mask), garbled(torch.full((n,), 0.3, device=DEVICE), mask)

    def chunk(rows: Tensor, transform: Transform, of: Tensor) -> TorchChunk | KernelChunk:
        if backend == "torch":
            return TorchChunk(rows.float(), of, transform)
        return KernelChunk(row_kernels(backend), RawRows(rows.clone(), of, transform), dtype=dtype)

    def masked() -> TorchChunk | KernelChunk:
        return chunk(garbled(z, mask), Transform(temperature, softcap, mask), targets.masked_fill(~mask, -100))

    plain = chunk(z[mask], Transform(temperature[mask], softcap), targets[mask])
    expected = plain.gradient(c[mask], e[mask])
    for index in (None, torch.tensor([0, 1, 4, 5], device=DEVICE)):
        ours = masked()
        live = mask if index is None else mask[index]
        wanted = expected if index is None else expected[[0, 2]]
        dz = ours.gradient(c, e, index)
        assert not ours.logp[~mask].any()
        assert not ours.entropy[~mask].any()
        assert torch.equal(ours.logp[mask], plain.logp)
        assert torch.equal(ours.entropy[mask], plain.entropy)
        assert not dz[~live].any()
        assert relative_error(dz[live], wanted) <= 2**-22


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", KERNELS)
def test_one_kernel_gives_no_coefficients(backend: str) -> None:
    rows, _, targets, tokens = problem("logits")
    batch = on_device(replace(tokens, mask=some_rows(14)))
    assert batch.mask is not None
    _, whole = library.make_plan(PolicyObjective.preset("reinforce", entropy_coef=0.1), batch, rows, skip=True)
    assert whole.inline is not None
    raw = RawRows(garbled(rows, batch.mask), targets, Transform(mask=batch.mask))
    _, loss, c, e = solve(row_kernels(backend), raw, whole, plan.Part(slice(0, 14)), dtype=rows.dtype)
    assert loss.isfinite()
    assert e is not None
    assert torch.equal(c != 0, batch.mask)
    assert torch.equal(e != 0, batch.mask)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts on the host")
def test_rows_that_do_not_count_leave_before_the_gradient_products() -> None:
    x = make()
    tokens = make_tokens(x, mask=some_rows(14))
    assert tokens.mask is not None
    share = tokens.mask.double().mean().item()
    assert flops_of(x, PolicyObjective.preset("reinforce"), tokens) == pytest.approx(2 + 4 * share)


# Around the ops


@pytest.mark.parametrize("objective", ["built-in", "own"])
@pytest.mark.parametrize("op", ["linear", "logits"])
def test_compiles_without_a_graph_break(op: str, objective: str) -> None:
    torch.compiler.reset()
    rows, weight, targets, tokens = problem(op)
    mask = some_rows(14)
    batch = on_device(both(tokens, mask)[0])
    mask = mask.to(DEVICE)
    rows, targets = garbled(rows, mask), targets.masked_fill(~mask, -100)
    o: Any = PolicyObjective.preset("grpo", kl_coef=0.1)
    if objective == "own":
        if op == "logits":
            pytest.skip("takes built-in objectives only")
        o = PolicyObjective(surrogate=lambda r: -r.advantage * r.logp.exp())

    temperature = torch.linspace(0.7, 1.3, 14, device=DEVICE)
    if batch.mask is not None:
        temperature[~batch.mask] = float("nan")

    def step(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        if op == "linear":
            out = linear_policy_loss(rows, weight, targets, batch, o, temperature=temperature, skip_inactive=False)
        else:
            out = from_logits(rows * 1, targets, batch, o, temperature=temperature)
        return 3 * out.loss, out.logp, *out.metrics.values()

    eager_of, compiled_of = ([t.clone().requires_grad_() for t in (rows, weight)] for _ in range(2))
    eager = step(*eager_of)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled_of)
    torch.testing.assert_close(compiled, eager)
    used = 2 if op == "linear" else 1
    wanted, got = grads(eager[0], *eager_of[:used]), grads(compiled[0], *compiled_of[:used])
    torch.testing.assert_close(got, wanted)
    assert not got[0][~mask].any()
    assert all(g.isfinite().all() for g in got)


@pytest.mark.parametrize("op", ["linear_policy_loss", "policy_loss_from_logits", "policy_loss_from_logits_"])
def test_schemas_and_fakes(op: str) -> None:
    rows, weight, targets, tokens = problem("linear" if op == "linear_policy_loss" else "logits")
    batch = on_device(replace(tokens, mask=some_rows(14)))
    of, key = [getattr(batch, name) for name in library.TOKEN_FIELDS], PolicyObjective.preset("grpo").key
    arguments: dict[str, tuple[Any, ...]] = {
        "linear_policy_loss": (
            rows,
            weight,
            None,
            targets,
            None,
            None,
            None,
            None,
            of,
            key,
            "float32",
            [True, True, False],
            True,
            "torch",
        ),
        "policy_loss_from_logits": (rows, targets, None, None, None, None, of, key, True, "torch"),
        "policy_loss_from_logits_": (rows, targets, None, None, None, None, of, key, "torch"),
    }
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.revisual_fast, op), arguments[op], test_utils=tests)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(14), r"tokens.mask must be \[14\] bool, one for each row; got \[14\] torch.float32: mask.bool"),
        (torch.ones(2, 7, dtype=torch.bool), r"tokens.mask must be \[14\] bool.*got \[2, 7\] torch.bool"),
        ([True] * 14, "tokens.mask must be a tensor; got list"),
        (torch.ones(14, dtype=torch.bool, device="meta"), "tokens.mask is on the meta device"),
    ],
    ids=["dtype", "shape", "list", "meta"],
)
def test_masks_that_do_not_fit(mask: Any, message: str) -> None:
    rows, weight, targets, tokens = problem("linear")
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(rows, weight, targets, replace(tokens, mask=mask), PolicyObjective())
    with pytest.raises(ValueError, match=message):
        from_logits(rows @ weight.T, targets, replace(tokens, mask=mask), PolicyObjective())


@pytest.mark.skipif(DEVICE == "cuda", reason="targets are checked on the CPU only")
def test_targets_of_the_other_rows_are_checked() -> None:
    rows, weight, targets, tokens = problem("linear")
    mask = some_rows(14)
    for bad in (-100, V):
        targets[~mask] = bad
        linear_policy_loss(rows, weight, targets, replace(tokens, mask=mask), PolicyObjective())
    targets[mask.nonzero()[0]] = V
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 19\)"):
        linear_policy_loss(rows, weight, targets, replace(tokens, mask=mask), PolicyObjective())


def test_not_together_with_a_sampling_mask() -> None:
    rows, weight, targets, tokens = problem("linear")
    sampling_mask = (torch.arange(15), targets)
    with pytest.raises(ValueError, match=r"tokens\.mask with sampling_mask"):
        linear_policy_loss(
            rows, weight, targets, replace(tokens, mask=some_rows(14)), PolicyObjective(), sampling_mask=sampling_mask
        )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("preset", ["grpo", "gspo", "gmpo"])
def test_nothing_waits_for_the_device(preset: str) -> None:
    rows, weight, targets, tokens = problem("logits")
    batch, o = on_device(replace(tokens, mask=some_rows(14))), PolicyObjective.preset(preset)
    for _ in range(2):  # the first call compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run("logits", rows, weight, targets, batch, o)
        finally:
            torch.cuda.set_sync_debug_mode("default")
