"""The benchmarks: nothing wrong gets a time, the rounds are fair, the figures are counted right."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import revisual_fast.cli
from bench import __main__ as command
from bench import checks, counts, harness, machine, problems, step
from bench.harness import Bench, Call, Case, DeviceLost, Problem, Variant
from bench.inputs import make_inputs
from bench.problems import OPS, cases

CASE = Case("linear_policy_loss", 16, 8, 40)
ANSWER = torch.arange(1, 9, dtype=torch.float64)


class FakeClock:
    """Every call takes as many seconds as calls were made before it; remembers who was called."""

    def __init__(self):
        self.calls = []

    def seconds(self, run):
        run()
        self.calls.append(run)
        return float(len(self.calls))

    def peak_bytes(self, run):
        run()
        return 1 << 20


def computing(name, value, role="plain", **fields):
    return Variant(name, role, lambda: Call(lambda: {"y": value}), **fields)


def problem(*variants, flops=600, n_bytes=30):
    ceilings = {"copy": (lambda: None, 100), "gemm": (lambda: None, 1000)}
    eager = computing("eager", ANSWER.float() * (1 + 1e-5))
    return Problem(CASE, [eager, *variants], lambda: {"y": ANSWER}, flops, n_bytes, ceilings)


def rows_of(*variants, rounds=4, warmup=0, deadline=None):
    clock = FakeClock()
    bench = Bench(problem(*variants), clock, rounds, warmup, deadline)
    return {row["variant"]: row for row in bench.run()}, clock


def test_a_wrong_variant_gets_no_time_and_a_failing_one_neither():
    def fail():
        raise RuntimeError("out of memory")

    rows, clock = rows_of(
        computing("good", ANSWER.float() * (1 + 1.9e-5), "ours"),
        computing("bad", ANSWER.float() * (1 + 2.2e-5), "ours"),
        computing("nan", ANSWER * float("nan"), "peer"),
        computing("unlike", ANSWER[:3], "peer"),
        Variant("raises", "peer", lambda: Call(fail)),
        Variant("absent", "peer", reason="needs CUDA"),
    )
    assert {name: row["status"] for name, row in rows.items()} == {
        "eager": "ok",
        "good": "ok",
        "bad": "wrong",
        "nan": "wrong",
        "unlike": "failed",
        "raises": "failed",
        "absent": "unavailable",
    }
    for name in ("bad", "nan", "unlike", "raises", "absent"):
        assert "median_s" not in rows[name]
        assert rows[name]["reason"]
    assert "2.0" in rows["bad"]["reason"], "says what is allowed"
    assert "out of memory" in rows["raises"]["reason"]
    assert len(clock.calls) == 4 * (2 + 2), "two variants and two ceilings in each round"


def test_rounds_are_interleaved_and_rotated():
    assert list(harness.rotated(["a", "b", "c"], 4)) == [list("abc"), list("bca"), list("cab"), list("abc")]
    rows, _ = rows_of(computing("good", ANSWER, "ours"), rounds=2, warmup=1)
    # warm-up takes calls 1 to 4; the rounds start at the second and at the third of the four
    assert rows["eager"]["samples_s"] == [8.0, 11.0]
    assert rows["good"]["samples_s"] == [5.0, 12.0]


def test_timing_is_set_against_the_ceilings_of_the_same_run():
    rows, _ = rows_of(rounds=1)
    eager = rows["eager"]  # second 1; the copy took 2 s for 100 bytes, the products 3 s for 1000 FLOPs
    assert eager["ceiling_copy_bytes_per_s"] == 50
    assert eager["of_copy"] == pytest.approx(30 / 1 / 50)
    assert eager["of_gemm"] == pytest.approx(600 / 1 / (1000 / 3))
    assert eager["of_floor"] == pytest.approx(max(600 / (1000 / 3), 30 / 50) / 1)
    assert eager["peak_bytes"] == 1 << 20


def test_a_variant_that_destroys_its_input_is_reset_before_every_call():
    state = {"x": ANSWER.clone()}

    def run():
        out = {"y": state["x"].clone()}
        state["x"].zero_()
        return out

    own = Variant("own", "ours", lambda: Call(run, lambda: state["x"].copy_(ANSWER)))
    rows, _ = rows_of(own)
    assert rows["own"]["status"] == "ok"


def test_a_yardstick_that_failed_leaves_nothing_to_judge_by():
    def fail():
        raise ZeroDivisionError

    rows, _ = rows_of(
        computing("good", ANSWER, "ours", yardstick="other"), Variant("other", "plain", lambda: Call(fail))
    )
    assert (rows["eager"]["status"], rows["good"]["status"], rows["other"]["status"]) == ("ok", "failed", "failed")
    assert "other did not run" in rows["good"]["reason"]
    with pytest.raises(ValueError, match="nobody"):
        rows_of(computing("good", ANSWER, yardstick="nobody"))
    with pytest.raises(ValueError, match="share a name"):
        rows_of(computing("eager", ANSWER))


@pytest.mark.parametrize("at", [2, 3, 5])  # the gauge's call, the first round, a later one
def test_a_variant_that_fails_late_is_dropped_and_the_others_go_on(at):
    calls = []

    def run():
        calls.append(at)
        if len(calls) == at:
            raise NameError("late")
        return {"y": ANSWER}

    rows, _ = rows_of(Variant("late", "peer", lambda: Call(run)))
    assert (rows["late"]["status"], rows["late"]["reason"]) == ("failed", "NameError: late")
    assert "median_s" not in rows["late"]
    assert rows["eager"]["rounds"] == 4
    assert len(calls) == at


def test_a_long_call_is_checked_and_gauged_at_once():
    calls = []

    def run():
        calls.append("run")
        return {"y": ANSWER}

    long = replace(problem(Variant("mine", "ours", lambda: Call(run))), long_calls=True)
    rows = {row["variant"]: row for row in Bench(long, FakeClock(), 2).run()}
    assert len(calls) == 1 + 2
    assert rows["mine"]["peak_bytes"] == 1 << 20


def test_a_problem_may_have_errors_of_its_own():
    own = replace(problem(computing("mine", ANSWER, "ours")), errors=lambda outputs, reference: {"all": 0.5})
    rows = {row["variant"]: row for row in Bench(own, FakeClock(), 1).run()}
    assert rows["mine"]["errors"] == {"all": 0.5}
    assert rows["mine"]["errors_allowed"] == {"all": 1.0}


def test_only_a_case_with_a_label_has_one_in_its_rows():
    assert set(CASE.fields) == {"op", "n", "d", "v", "dtype", "device"}
    labelled = replace(CASE, label="250/96/8")
    assert labelled.fields["label"] == "250/96/8"
    assert (CASE.title, labelled.title) == (
        "linear_policy_loss  N=16 D=8 V=40 float32",
        "linear_policy_loss  250/96/8 float32",
    )


def test_past_the_deadline_a_few_rounds_are_timed():
    rows, _ = rows_of(rounds=9, warmup=1, deadline=0.0)
    assert rows["eager"]["rounds"] == harness.MIN_ROUNDS


def test_what_compiles_for_long_comes_last_and_is_left_out_past_the_deadline():
    order = []

    def noting(name, **fields):
        def setup():
            order.append(name)
            return Call(lambda: {"y": ANSWER})

        return Variant(name, "peer", setup, **fields)

    absent = Variant("absent", "peer", reason="needs CUDA", slow_start=True)
    variants = [noting("slow", slow_start=True), absent, noting("quick")]
    rows, _ = rows_of(*variants)
    assert order == ["quick", "slow"]
    assert list(rows) == ["eager", "slow", "absent", "quick"]
    rows, _ = rows_of(*variants, deadline=0.0)
    assert {name: row["status"] for name, row in rows.items()} == {
        "eager": "ok",
        "slow": "left out",
        "absent": "unavailable",
        "quick": "ok",
    }
    assert "--budget" in rows["slow"]["reason"]
    assert order == ["quick", "slow", "quick"]


def test_a_broken_device_ends_the_run(monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLost, match=r"raises broke the CUDA context.*illegal memory"):
        rows_of(Variant("raises", "peer", lambda: Call(lost)))


def test_errors_of_packages_that_derive_from_exception_alone(monkeypatch):
    class DSLBaseError(Exception):
        pass

    assert DSLBaseError not in checks.failures()
    monkeypatch.setitem(sys.modules, "cutlass.base_dsl.common", SimpleNamespace(DSLBaseError=DSLBaseError))
    assert DSLBaseError in checks.failures()


def test_too_many_recompilations_are_an_error_not_eager_torch():
    compiled = torch.compile(lambda x: x + 1, dynamic=False, backend="eager")

    def recompile():
        for size in range(2, torch._dynamo.config.recompile_limit + 4):
            compiled(torch.ones(size))

    torch.compiler.reset()
    recompile()  # eager torch without a word
    torch.compiler.reset()
    with checks.recompile_limit_is_an_error(), pytest.raises(checks.failures(), match="limit"):
        recompile()
    torch.compiler.reset()


def test_percentiles():
    samples = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert [counts.percentile(samples, share) for share in (0, 0.2, 0.5, 0.8, 1)] == pytest.approx([1, 1.8, 3, 4.2, 5])
    assert counts.percentile([7.0], 0.8) == 7
    with pytest.raises(ValueError, match="no samples"):
        counts.percentile([], 0.5)


def test_flops_and_bytes():
    n, d, v = 8192, 3584, 152064
    assert counts.head_flops(n, d, v) == 6 * n * d * v
    assert counts.head_flops(n, d, v, 4) == 8 * n * d * v
    assert counts.head_bytes(2, 3, 5, 2) == 2 * (6 + 15) * 2 + 2 * 8 + 2 * 16
    assert counts.logits_bytes(n, v, 2) == 4 * n * v + 24 * n, "4 bytes a bf16 logit"
    assert counts.replay_flops(4, 6, 8) == 6 * 4 * 6 * 8
    assert counts.replay_bytes(4, 6, 10, 8, 7, 4) == 4 * (48 + 42 + 60) + 8 * (32 + 5) + 24 * 4
    assert counts.advantages_bytes(10, 2) == 80 + 24
    assert counts.pad_bytes(10) == 130
    assert counts.gather_bytes(4, 3, 6, 2) == 2 * 6 * (3 + 4 + 4 + 4) + 32
    assert counts.statistics_bytes(n, v, 2) == 2 * n * v + 16 * n, "2 bytes a bf16 logit"
    assert counts.embeddings_bytes(8, 5, 2, 6, 10, 2) == 2 * 6 * (5 + 2 + 8 + 8 + 2 + 10) + 16 * 8
    assert counts.kv_bytes(4, 9, 6, 2) == 2 * (2 * 6 * (4 + 9)) * 2 + 8 * 9
    assert counts.mrope_bytes(4, 6, 2) == 2 * (2 * 2 * 4 * 6 + 8 * 3 * 4)
    assert counts.floor_seconds(100, 10, 10.0, 100.0) == 10
    assert counts.floor_seconds(0, 10, None, 5.0) == 2


def test_the_loss_is_bounded_by_what_an_error_of_logp_can_do():
    answer = {"loss": torch.tensor(0.0), "logp": torch.tensor([3.0, 4.0]), "c": torch.tensor([0.6, 0.8])}
    errors = checks.errors_of({"loss": torch.tensor(0.5)}, answer)
    assert errors == {"loss": pytest.approx(0.1)}
    allowed = checks.allowed_errors(["loss", "d"], {"logp": 0.06, "d": 0.0})
    assert allowed == {"loss": 0.12, "d": checks.ROUNDING}
    allowed = checks.allowed_errors(["loss", "logp", "d"], {"logp": 0.06, "d": 0.1}, {"logp": 0.01, "d": 0.02})
    assert allowed == {"loss": 0.02, "logp": 0.02, "d": 0.2}, "gradients keep their own yardstick"


@pytest.fixture(scope="module")
def small_rows():
    """A real run, tiny: plain torch only, so that nothing has to be compiled or installed."""
    made = OPS["linear_policy_loss"](CASE)
    kept = [v for v in made.variants if v.name in ("eager", "revisual-fast torch", "cut-cross-entropy")]
    made = Problem(CASE, kept, made.reference, made.flops, made.bytes, made.ceilings)
    return harness.measure(made, harness.stamp("cpu", "cpu"), rounds=2)


def test_rows_say_all_there_is_to_know(small_rows, tmp_path):
    row = next(row for row in small_rows if row["variant"] == "revisual-fast torch")
    assert row["status"] == "ok", row["reason"]
    for name in ("device", "versions", "commit", "threads", "case", "errors", "errors_allowed", "bytes", "flops"):
        assert row[name]
    for name in (
        "median_s",
        "p20_s",
        "p80_s",
        "rounds",
        "of_copy",
        "of_gemm",
        "of_floor",
        "run",
        "time",
        "ratio_error",
        "ratio_error_float64",
    ):
        assert name in row
    assert 0 <= row["ratio_error"] < 1e-5
    assert 0 < row["ratio_error_float64"] < 1e-5
    assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
    assert set(row["outputs"]) == {"loss", "logp", "entropy", "d_hidden", "d_weight"}
    assert set(row["commit"]) == {"rev", "dirty"}
    peer = next(row for row in small_rows if row["variant"] == "cut-cross-entropy")
    assert (peer["status"], peer["reason"]) == ("unavailable", "needs CUDA")
    path = harness.append(small_rows, tmp_path)
    harness.append(small_rows, tmp_path)
    assert path == tmp_path / machine.slug(row["device"]) / "linear_policy_loss.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*small_rows, *small_rows]


def test_peak_memory_on_the_cpu():
    clock = machine.CpuClock()
    peak = clock.peak_bytes(lambda: torch.ones(16 << 20))
    if peak is None:
        pytest.skip("this kernel has no /proc/self/clear_refs")
    assert 64 << 20 <= peak < 72 << 20
    assert clock.peak_bytes(lambda: None) < 4 << 20, "what was freed does not count again"


def test_what_a_device_runs_at_is_read(monkeypatch):
    monkeypatch.setattr(machine.torch.cuda, "current_device", lambda: 1)
    answers = iter(["1000, 100.5, 30\n1980, 612.25, 51\n", "1980, [N/A], 51\n"])
    done = lambda *command, **options: SimpleNamespace(stdout=next(answers))  # noqa: E731
    monkeypatch.setattr(machine.subprocess, "run", done)
    assert machine.load() == {"sm_mhz": 1980.0, "power_w": 612.25, "celsius": 51.0}
    assert machine.load() == {}, "what it does not say is not made up"


# The command


def test_cases_of_a_suite():
    assert {case.op for case in (*cases("gpu"), *cases("cpu"))} == set(OPS) - problems.ALONE
    shaped = [op for op in OPS if op not in problems.LABELLED]
    assert all(list(shapes) == shaped for shapes in problems.SHAPES.values())
    last = {(case.op, case.d) for case in cases("gpu")[-6:-4]}
    assert last == {("linear_policy_loss", 2048), ("shared_attention", 2048)}, "second shapes after all first ones"
    assert {case.label for case in cases("gpu")[-4:]} == step.LONG, "and the longest calls last"
    assert all(case.device == "cuda" for case in cases("gpu"))
    asked = {(case.n, case.d, case.v, case.dtype) for case in cases("cpu") if case.op == "linear_policy_loss"}
    assert asked == {(2048, 512, 32000, "float32"), (2048, 512, 32000, "bfloat16")}
    assert cases("cpu", ["policy_loss_from_logits"], (16, 8, 40), ["bfloat16"]) == [
        Case("policy_loss_from_logits", 16, 0, 40, "bfloat16")
    ]
    with pytest.raises(ValueError, match="multiple of 8"):
        make_inputs(Case("linear_policy_loss", 12, 8, 40))
    with pytest.raises(ValueError, match="no multiple"):
        cases("cpu", ["group_advantages"], (12, 8, 40))
    with pytest.raises(ValueError, match="at least 16"):
        cases("cpu", ["sampling_mask_replay"], (16, 8, 15))
    with pytest.raises(ValueError, match="D must be even"):
        cases("cpu", ["mrope"], (16, 7, 40))
    with pytest.raises(ValueError, match=r"no such case of linear_cross_entropy.*--shape"):
        cases("cpu", ["linear_cross_entropy"])


def test_a_case_that_fails_is_a_line_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def fail(case):
        raise MemoryError("no room for the float64 answer")

    monkeypatch.setitem(command.OPS, "linear_logprob", fail)
    arguments = ["--suite", "cpu", "--op", "linear_logprob", "--op", "gather_rows", "--dtype", "float32"]
    arguments += ["--shape", "16,8,40", "--rounds", "5", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    said = capsys.readouterr().out
    assert "the case failed: MemoryError: no room" in said
    assert [path.name for path in tmp_path.glob("*/*")] == ["gather_rows.jsonl"]


def test_a_budget_is_kept(monkeypatch, tmp_path, capsys):
    """Time is kept for cases to come, in fewer rounds; one that it would not be enough for is left out, and named."""
    clock = iter([0.0, 0.0, 41.0, 50.0])  # start, before each of two cases, end
    monkeypatch.setattr(
        command, "_measured", lambda case, head, rounds, deadline, out: deadlines.append(deadline) or True
    )
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(clock))
    deadlines = []
    arguments = ["--suite", "cpu", "--shape", "16,8,40", "--dtype", "float32", "--budget", "60"]
    ops = ["gather_rows", "linear_logprob", "mrope"]
    assert command.main([*arguments, *(f"--op={op}" for op in ops)]) == 0
    assert deadlines == [60.0 - problems.RESERVE["long"] - problems.RESERVE["short"]]
    said = capsys.readouterr().out
    assert "left out: linear_logprob  N=16 D=8 V=40 float32; mrope  N=16 D=8 V=0 float32" in said


def test_past_its_deadline_a_case_says_so(tmp_path, capsys):
    (case,) = cases("cpu", ["gather_rows"], (16, 8, 40), ["float32"])
    assert command._measured(case, harness.stamp("cpu", "cpu"), 5, 0.0, tmp_path)
    assert "--budget: 3 rounds instead of 5" in capsys.readouterr().out


def test_a_lost_device_stops_the_command(monkeypatch, capsys):
    def lose(*arguments):
        raise DeviceLost("peer broke the CUDA context")

    monkeypatch.setattr(command, "measure", lose)
    assert command.main(["--suite", "cpu", "--op", "gather_rows", "--shape", "16,8,40"]) == 1
    assert "1 cases are left" in capsys.readouterr().out


def test_the_command_runs_the_folder_as_a_program(tmp_path, capfd):
    arguments = ["bench", "--suite", "cpu", "--op", "gather_rows", "--shape", "16,8,40", "--rounds", "1"]
    assert revisual_fast.cli.main([*arguments, "--out", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    assert "nothing else may run beside it" in said
    assert list(tmp_path.glob("*/gather_rows.jsonl"))


def test_the_command_without_the_folder_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(revisual_fast.cli, "__file__", str(tmp_path / "site/revisual_fast/cli.py"))
    assert revisual_fast.cli.main(["bench"]) == 1
    assert "clone the repository" in capsys.readouterr().err


def test_bad_usage_of_the_command():
    root = Path(__file__).parents[2]
    arguments = [sys.executable, "-m", "bench", "--rounds", "0"]
    run = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == "revisual-fast bench: --rounds must be at least 1; got 0\n"
    with pytest.raises(ValueError, match="--budget must be at least 0"):
        command.main(["--budget", "-1"])
    with pytest.raises(SystemExit) as stopped:
        command.main(["--shape", "1,2"])
    assert stopped.value.code == 2
