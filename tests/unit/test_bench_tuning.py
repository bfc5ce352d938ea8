"""The experiments: a candidate's setting is in force while it is called and at no other time, and what is predicted of
it is counted right."""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import checks, machine, search
from bench.attention import groups
from bench.harness import Call, Case, Problem, Variant
from bench.search import EXPERIMENTS
from bench.tuning import attention, linear, products, rows
from bench.tuning.experiment import Piece, seconds, under
from revisual_fast import policy_loss_from_logits
from revisual_fast.kernels import launch, plan
from revisual_fast.kernels import linear as head

ANSWER = torch.arange(1, 9, dtype=torch.float64)
CASE = Case("linear_policy_loss", 16, 8, 40)


# settings that are in force


def test_a_setting_is_in_force_in_the_call_alone():
    state, seen = {"value": 0}, []

    @contextmanager
    def setting():
        state["value"] = 7
        try:
            yield
        finally:
            state["value"] = 0

    def setup():
        seen.append(("setup", state["value"]))

        def run():
            seen.append(("run", state["value"]))
            if len(seen) > 2:
                raise RuntimeError("late")
            return {}

        return Call(run, lambda: seen.append(("reset", state["value"])))

    call = under(setup, setting)()
    assert state["value"] == 0
    call.run()
    assert state["value"] == 0
    call.reset()
    with pytest.raises(RuntimeError, match="late"):
        call.run()
    assert state["value"] == 0
    assert seen == [("setup", 7), ("run", 7), ("reset", 0), ("run", 7)]


def fake_problem(name, run):
    eager = Variant("eager", "plain", lambda: Call(lambda: {"y": ANSWER}))
    mine = Variant(name, "ours", lambda: Call(run))
    return Problem(CASE, [eager, mine], lambda: {"y": ANSWER}, 600, 30, {})


def test_a_candidates_launch_is_the_one_that_the_triton_kernel_gets(monkeypatch):
    """The real op in Triton's interpreter, with an eye on what its kernel is launched with."""
    rows_triton = pytest.importorskip("revisual_fast.kernels.rows_triton")
    logits, targets = torch.randn(2, 3000), torch.tensor([1, 2])
    x = rows.own.make_inputs(replace(CASE, op="policy_loss_from_logits", d=0, n=8))
    tokens, seen, kernel = replace(x.tokens, advantages=x.advantages[:2], old_logp=x.old_logp[:2]), [], None

    class Spy:
        def __getitem__(self, grid):
            def launched(*arguments, **settings):
                seen.append((settings["BLOCK"], settings["num_warps"]))
                return kernel[grid](*arguments, **settings)

            return launched

    kernel, spy = rows_triton.loss_kernel, Spy()
    monkeypatch.setattr(rows_triton, "loss_kernel", spy)

    def run():
        leaf = logits.clone().requires_grad_()
        return {"logp": policy_loss_from_logits(leaf, targets, tokens, rows.own.OBJECTIVE, backend="triton").logp}

    monkeypatch.setattr(rows, "problem_of", lambda case: fake_problem("revisual-fast triton", run))
    trial = rows.TRITON_LOSS.trial("cpu")
    trial.candidate({"block": 1024, "warps": 4}).setup().run()
    trial.candidate({"block": 2048, "warps": 16}).setup().run()
    run()
    present = launch.row_launch(3000)
    assert seen == [(1024, 4), (2048, 16), (present.block, present.warps)]


def test_a_candidates_blocks_are_those_that_the_cuda_kernel_gets(monkeypatch):
    module = SimpleNamespace(BLOCKS_PER_MULTIPROCESSOR=2)
    monkeypatch.setitem(sys.modules, "revisual_fast.kernels.rows_cuda", module)
    seen = []
    run = lambda: seen.append(module.BLOCKS_PER_MULTIPROCESSOR) or {}  # noqa: E731
    monkeypatch.setattr(rows, "problem_of", lambda case: fake_problem("revisual-fast cuda", run))
    trial = rows.CUDA_BLOCKS.trial("cpu")
    assert rows.CUDA_BLOCKS.start("cuda") == {"blocks": 2}
    for blocks in (1, 0, 2):
        trial.candidate({"blocks": blocks}).setup().run()
    assert (seen, module.BLOCKS_PER_MULTIPROCESSOR) == ([1, 0, 2], 2)


def test_a_candidates_chunks_are_those_that_the_head_is_cut_into(monkeypatch):
    sizes, real = [], head.Head.logits

    def counted(self, rows, out=None):
        sizes.append(rows.stop - rows.start)
        return real(self, rows, out)

    monkeypatch.setattr(head.Head, "logits", counted)
    before = dict(plan.CHUNK_BYTES)
    trial = linear.CHUNK_BYTES.trial("cpu")
    trial.candidate({"chunk_mib": 2, "logits": "float32"}).setup().run()
    case, small = trial.problem.case, (2 << 20) // (4 * 8000)
    assert sum(sizes) == case.n
    assert max(sizes) <= small < case.n
    assert before == plan.CHUNK_BYTES
    pieces = trial.work({"chunk_mib": 2, "logits": "float32"})
    assert len(pieces) == 4 * len(sizes), "the prediction is of the same chunks"
    assert sum(piece.flops for piece in pieces) == trial.problem.flops


def test_a_candidates_tile_is_that_of_one_attention_kernel():
    module = pytest.importorskip("revisual_fast.kernels.shared_attention_launch")
    before = {which: module._constants(which, 128, 128, 2) for which in module.Launches._fields}
    for which in module.Launches._fields:
        with attention.tile(which, queries=16, keys=64, warps=2, stages=5):
            inside = {name: module._constants(name, 128, 128, 2) for name in before}
            assert module.launches(64, 2) == module.HALF_LAUNCHES[0][1], "other heads keep theirs"
        changed = inside.pop(which)
        assert (changed["BLOCK_M"], changed["BLOCK_N"]) == (16, 64)
        assert (changed["num_warps"], changed["num_stages"]) == (2, 5)
        assert inside == {name: before[name] for name in inside}
    assert before == {which: module._constants(which, 128, 128, 2) for which in before}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_search_starts_where_the_library_stands(monkeypatch, device):
    monkeypatch.setitem(sys.modules, "revisual_fast.kernels.rows_cuda", SimpleNamespace(BLOCKS_PER_MULTIPROCESSOR=2))
    pytest.importorskip("triton")
    for name, experiment in EXPERIMENTS.items():
        start = experiment.start(device)
        axes = experiment.axes(device)
        assert {axis.name for axis in axes} <= set(start), name
        assert all(set(axis.values) - {start[axis.name]} for axis in axes), f"{name}: nothing to try"
        assert all(axis.hypothesis.endswith(".") for axis in axes)
    found = launch.row_launch(151936)
    assert EXPERIMENTS["triton-loss"].start("cuda") == {"block": found.block, "warps": found.warps}
    assert EXPERIMENTS["chunk-bytes"].start("cuda")["chunk_mib"] << 20 == plan.CHUNK_BYTES["cuda"]
    assert sum(experiment.seconds for experiment in EXPERIMENTS.values()) < search.BUDGET["cuda"]


def test_the_rows_kernel_runs_on_a_stream_beside_the_product(monkeypatch):
    """The order of the waits, with streams that only remember; both ways give the outputs of the reference."""
    order = []

    class Stream:
        def __init__(self, name="beside"):
            self.name = name

        def wait_stream(self, other):
            order.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def entered(stream):
        order.append(f"on {stream.name}")
        yield
        order.append(f"off {stream.name}")

    monkeypatch.setattr(rows, "SMALL", (64, 128, 800))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("here"))
    monkeypatch.setattr(products, "matmul", lambda *of: order.append("product") or head.matmul(*of))
    trial = products.OVERLAP.trial("cpu")
    answer, (eager,) = trial.problem.reference(), trial.problem.variants
    allowed = checks.errors_of(eager.setup().run(), answer)
    for streams, wanted in ((1, ["product"]), (2, ["beside waits for here", "on beside", "off beside", "product"])):
        order.clear()
        errors = checks.errors_of(trial.candidate({"streams": streams}).setup().run(), answer)
        assert set(errors) == {"logp", "d_logits", "logits"}
        assert all(errors[name] <= checks.MARGIN * max(allowed[name], 1e-7) for name in errors)
        assert order == wanted + (["here waits for beside"] if streams == 2 else [])
    apart, together = (seconds(trial.work({"streams": n}), {"gemm": 1e9, "copy": 1e9}) for n in (1, 2))
    assert together < apart


# what is counted before


def test_work_is_done_piece_by_piece():
    rates = {"gemm": 100.0, "copy": 10.0}
    assert seconds([Piece(200, 5), Piece(bytes=30), Piece(bytes=10, share=0.5)], rates) == 2 + 3 + 2
    assert seconds([Piece(200, 30)], rates) == 3, "at one time"
    assert seconds([Piece(200, 30)], {"copy": 10.0}) == 3


def test_tiles_of_attention_are_counted_whole():
    """Against a mask of all pairs, cut into tiles."""
    segments = groups(512)
    n, m, k = 512, 32, 16
    seen = torch.zeros(n, n, dtype=torch.bool)
    for start, length, prefix, n_prefix in zip(*segments.fields, strict=True):
        seen[start : start + length, prefix : prefix + n_prefix] = True
        seen[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
    by_tile = [
        (start + first, min(first + m, length), start, prefix, n_prefix)
        for start, length, prefix, n_prefix in zip(*segments.fields, strict=True)
        for first in range(0, length, m)
    ]
    wanted = 0
    for _, end, start, prefix, n_prefix in by_tile:
        columns = [*range(prefix, prefix + n_prefix), *range(start, start + end)]
        wanted += sum(m * k for at in range(0, len(columns), k))
    assert attention.by_query_tiles(segments, m, k) == wanted
    keys = 0
    for start, length, *_ in zip(*segments.fields, strict=True):
        for first in range(0, length, k):
            readers = seen[:, start + first].sum().item()
            keys += -(-readers // m) * m * k
    assert attention.by_key_tiles(segments, m, k) == keys
    assert attention.by_query_tiles(segments, 1, 1) == attention.by_key_tiles(segments, 1, 1) == int(seen.sum())


def test_short_tiles_and_second_readings_cost_what_is_said():
    problem = replace(
        fake_problem("mine", dict), case=Case("policy_loss_from_logits", 8, 0, 1000, "bfloat16"), bytes=32000
    )
    (twice,) = rows._tile_pieces(problem, 4096, 8)
    assert twice == Piece(bytes=48000, share=1.0), "6 bytes a logit"
    assert rows._tile_pieces(problem, 1024, 8)[0].share == pytest.approx(8 * 2048 / (26 << 10))
    once = replace(problem, case=replace(problem.case, op="logits_statistics"), bytes=16000)
    assert rows._tile_pieces(once, 4096, 8) == [Piece(bytes=16000, share=1.0)]
    assert rows._cluster_pieces(problem, 2) == [Piece(bytes=32000)]
    assert rows._cluster_pieces(problem, 0) == [Piece(bytes=48000)]
    assert rows._too_many({"block": 8192, "warps": 2}).startswith("128 elements")
    assert rows._too_many({"block": 8192, "warps": 4}) == ""


# the real experiments, small


def test_what_runs_on_a_cpu_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "SMALL", (64, 128, 800))
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 1 << 20)
    names = [name for name, of in EXPERIMENTS.items() if not of.why_not("cpu")]
    assert names == ["chunk-bytes", "chunk-bytes-bf16", "logits-dtype", "gemm-layouts", "attention-backends"]
    arguments = [f"--experiment={name}" for name in names]
    assert search.main([*arguments, "--rounds", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["status"] for row in found} == {"ok"}, capsys.readouterr().out
    assert {row["experiment"] for row in found} == set(names)


def test_tiles_that_spill_are_not_tried():
    """As compiled (LOG.md): dK and dV with one of the two larger tiles take eight warps, with both they spill."""
    tile = {"queries": 32, "keys": 64, "warps": 4, "stages": 2}
    tried = [
        {},
        {"stages": 3},
        {"warps": 8},
        {"warps": 8, "keys": 128},
        {"warps": 8, "keys": 128, "stages": 3},
        {"warps": 8, "queries": 64},
    ]
    spills = [{"keys": 128}, {"queries": 64}, {"warps": 8, "keys": 128, "queries": 64}]
    spills += [{"warps": 8, "queries": 64, "stages": 3}]
    assert not any(attention._spills("key", tile | other) for other in tried)
    assert all(attention._spills("key", tile | other) for other in spills)
    wide = {"queries": 128, "keys": 128, "warps": 8, "stages": 3}
    assert not attention._spills("forward", wide)
    assert "shared memory" in attention._spills("forward", wide | {"stages": 4})
