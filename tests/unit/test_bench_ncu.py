"""The counters: what Nsight Compute writes is read whole, and what it lacks or says is not lost."""

import json
import stat
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from bench import counted, counters, ncu
from bench.counted import Target
from bench.harness import Call, Case, Variant
from bench.ncu import Kernel
from revisual_fast.kernels import plan

FIXED = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size")
FIXED += ("Device", "CC")
UNITS = {
    ncu.TIME: "ns",
    ncu.READ: "byte",
    ncu.WRITTEN: "Mbyte",
    ncu.DRAM: "%",
    ncu.TENSOR: "%",
    ncu.REGISTERS: "register/thread",
    ncu.SHARED[0]: "Kbyte/block",
    ncu.SHARED[1]: "byte/block",
    ncu.STALL.format("long_scoreboard"): "inst",
    ncu.STALL.format("wait"): "inst",
    ncu.STALL.format("selected"): "inst",
}
CLUSTER = "void revisual::cluster_loss_kernel<__nv_bfloat16, __nv_bfloat16, 0>(revisual::Logits<T1>, T2 *, long)"
MARK = "at::cuda::(anonymous namespace)::spin_kernel(long)"
NVJET = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN"
CUTLASS = "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_nn_align8>(T1::Params)"
FILL = "void at::native::vectorized_elementwise_kernel<(int)4, at::native::FillFunctor<float>>(int, T2)"


def table(*kernels: tuple[str, dict[str, str]]) -> str:
    """As ncu writes it: every field quoted, a row of units, its own lines around."""

    def line(fields):
        return ",".join(f'"{field}"' for field in fields)

    lines = ["==PROF== Connected to process 4711 (/usr/bin/python3.12)", line([*FIXED, *UNITS])]
    lines.append(line([*[""] * len(FIXED), *UNITS.values()]))
    for i, (name, values) in enumerate(kernels):
        place = [i, 4711, "python3.12", "127.0.0.1", name, 1, 7, "(512, 1, 1)", "(264, 1, 1)", 0, "9.0"]
        lines.append(line([*place, *(values.get(metric, "0") for metric in UNITS)]))
    return "\n".join([*lines, "==PROF== Disconnected from process 4711"]) + "\n"


ROW = {
    ncu.TIME: "1,234,567",
    ncu.READ: "2,500,000,000",
    ncu.WRITTEN: "2,490.5",
    ncu.DRAM: "91.25",
    ncu.REGISTERS: "61",
    ncu.SHARED[0]: "114.688",
    ncu.SHARED[1]: "2048",
    ncu.STALL.format("long_scoreboard"): "3.00",
    ncu.STALL.format("wait"): "1.00",
    ncu.STALL.format("selected"): "1.00",
}


def test_a_table_is_read_in_base_units():
    (kernel,) = ncu.parse(table((CLUSTER, ROW)))
    assert kernel.short == "cluster_loss_kernel"
    assert (kernel.block, kernel.grid) == ("(512, 1, 1)", "(264, 1, 1)")
    assert kernel.values[ncu.TIME] == pytest.approx(1.234567e-3)
    assert kernel.bytes == pytest.approx(2.5e9 + 2.4905e9)
    assert kernel.values[ncu.SHARED[0]] == pytest.approx(114688)
    assert kernel.values[ncu.DRAM] == 91.25
    assert kernel.stalls() == [("long_scoreboard", 0.6), ("wait", 0.2)], "shares of all; who issued is not stalled"


def test_what_was_not_counted_is_absent_and_the_rest_is_there():
    values = ROW | {ncu.DRAM: "n/a", ncu.READ: "(!) n/a", ncu.TENSOR: "nan"}
    (kernel,) = ncu.parse(table((CLUSTER, values)))
    assert not {ncu.DRAM, ncu.READ, ncu.TENSOR, ncu.L2_HITS} & set(kernel.values)
    assert kernel.values[ncu.REGISTERS] == 61
    assert kernel.bytes is None
    row = ncu.table([("op", [("rows", 4_000_000_000, kernel)])]).splitlines()[-1]
    assert row.count("n/a") == 7, row
    assert "| 1.235 ms | n/a | 4.000 GB | n/a |" in row


def test_names_without_types_and_arguments():
    names = {CLUSTER: "cluster_loss_kernel", MARK: "spin_kernel", NVJET: NVJET, FILL: "vectorized_elementwise_kernel"}
    names |= {"loss_kernel": "loss_kernel", "<unnamed>::scale(float *)": "scale"}
    names |= {CUTLASS: "Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_nn_align8>"}
    assert {name: Kernel(name, "", "").short for name in names} == names


def test_no_table_says_what_ncu_said():
    with pytest.raises(ValueError, match=r"ERR_NVGPUCTRPERM.*SYS_ADMIN.*NVreg_RestrictProfilingToAdminUsers=0"):
        ncu.parse("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n")
    with pytest.raises(ValueError, match="--page raw"):
        ncu.parse('"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n"0","k","x","","1"\n')


def test_counters_that_ncu_does_not_know_are_found_in_its_words():
    asked = ["a__b.sum", "a__b_c.sum", "launch__d", "e__f.ratio"]
    said = (
        "==ERROR== Failed to find metric regex:^a__b\\.(sum|min|max|avg|pct|ratio|max_rate)$\n"
        "==ERROR== Failed to find metric launch__d\n==WARNING== e__f.ratio was slow\n"
    )
    assert ncu.unknown_metrics(said, asked) == ["a__b.sum", "launch__d"]


def test_the_command_leaves_clocks_alone_and_counts_where_it_is_told():
    command = ncu.profile_command("ncu", ["x.sum", "y.pct"], "out/r", ["python", "-m", "it"])
    options = dict(zip(command[1::2], command[2::2], strict=False))
    assert options["--clock-control"] == "none"
    assert options["--profile-from-start"] == "off"
    assert options["--metrics"] == "x.sum,y.pct"
    assert command[-3:] == ["python", "-m", "it"]
    assert len(set(ncu.METRICS)) == len(ncu.METRICS)


# a run, with a program that speaks as ncu does


FAKE = """#!{python}
import sys
words, tables = sys.argv[1:], {tables!r}
if "--import" in words:
    sys.exit(print(open(tables).read()))
metrics = words[words.index("--metrics") + 1]
with open({seen!r}, "a") as file:
    file.write(metrics + "\\n")
if {refuses!r} in metrics:
    sys.exit("==ERROR== Failed to find metric regex:^{refuses}\\\\.(sum|ratio)$")
if {broken!r}:
    sys.exit("==ERROR== " + {broken!r})
open(words[words.index("--export") + 1] + ".ncu-rep", "w").write("report")
open(words[words.index("--said") + 1], "w").write(open({said!r}).read())
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """``fake(kernels, targets, refuses, broken)`` -> path of the program."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def make(kernels, targets, refuses="nothing", broken=""):
        said = tmp_path / "said.json"
        head = {
            "device": "NVIDIA H200",
            "started": "2026-01-02T00:00:00",
            "versions": {"torch": "2.13", "cuda": "none"},
        }
        head |= {"commit": {"rev": "0123456789abcdef", "dirty": False}}
        said.write_text(json.dumps(head | {"targets": [asdict(target) for target in targets]}))
        (tmp_path / "tables.csv").write_text(table(*kernels))
        names = {"tables": str(tmp_path / "tables.csv"), "seen": str(tmp_path / "seen"), "said": str(said)}
        program = tmp_path / "ncu"
        program.write_text(FAKE.format(python=sys.executable, refuses=refuses, broken=broken, **names))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return str(program)

    return make


LOGITS = Target(
    Case("policy_loss_from_logits", 8192, 0, 151936, "bfloat16", "cuda"), "ours", "bfloat16", "counted", 2e-3
)
CHUNK = Target(Case("linear_policy_loss", 2048, 3584, 152064, "bfloat16", "cuda"), "ours", "float32", "counted", 1e-2)
GEMM = {ncu.TIME: "3,000,000", ncu.TENSOR: "80", ncu.READ: "1,000,000,000", ncu.WRITTEN: "1,000"}
SMALL = {ncu.TIME: "1,000"}
KERNELS = [
    ("warm_up", GEMM),
    (MARK, SMALL),
    (CLUSTER, ROW),
    (FILL, SMALL),
    (MARK, SMALL),
    (NVJET, GEMM),
    ("loss_kernel", ROW),
    (FILL, SMALL),
    (CUTLASS, GEMM),
    ("something_new", GEMM),
    (FILL, SMALL),
]


def test_counters_from_the_command_to_the_table(fake, tmp_path, capsys):
    refused = "smsp__average_warps_issue_stalled_gmma_per_issue_active"
    missing = replace(LOGITS, variant="other", status="not there: its backend has not been built")
    program = fake(KERNELS, [LOGITS, missing, CHUNK], refuses=refused)
    arguments = ["--ncu", program, "--out", str(tmp_path / "out")]
    assert counters.main(arguments) == 0
    asked = (tmp_path / "seen").read_text().split()
    assert [refused in words for words in asked] == [True, False], "once more, without the counter it does not have"
    assert set(asked[0].split(",")) - set(asked[1].split(",")) == {f"{refused}.ratio"}
    said = capsys.readouterr().out
    assert f"no {refused}.ratio; again without" in said
    text = (tmp_path / "out" / counters.TABLE).read_text()
    assert text in said
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert {len(row) for row in cells} == {len(ncu.HEAD)}
    assert cells[2][0] == f"**{LOGITS.title}: 2.000 ms**"
    assert [row[0] for row in cells[3:5]] == ["rows", ""]
    assert cells[3][1] == "`cluster_loss_kernel`"
    assert cells[3][4] == "4.979 GB, 1.00x", "4 bytes a logit"
    assert cells[4][1] == "1 smaller"
    assert [row[0] for row in cells[6:10]] == ["logits = X W^T", "rows", "dX = dZ W", "dW += dZ^T X"]
    assert cells[7][4] == f"{6 * 2048 * 152064 / 1e9:.3f} GB, {4.9905e9 / (6 * 2048 * 152064):.2f}x", (
        "fp32 in, bf16 out"
    )
    assert cells[10][1] == "2 smaller"
    assert "- policy_loss_from_logits  N=8192 D=0 V=151936 bfloat16, other: not there" in text
    assert "NVIDIA H200, 2026-01-02, commit 0123456789ab; torch 2.13." in text
    assert "warm_up" not in text, "before the first mark"
    (tmp_path / "out" / counters.TABLE).unlink()
    assert counters.main(["--again", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / counters.TABLE).read_text() == text


def test_products_are_only_named_if_all_are_there(fake):
    kernels = [kernel for kernel in ncu.parse(table(*KERNELS[5:])) if kernel.short != NVJET]
    assert [what for what, *_ in counters.labelled(CHUNK, kernels)] == ["rows", "", "a product", "a product", ""]


def test_a_missing_mark_is_an_error(fake, tmp_path):
    program = fake(KERNELS[:4], [LOGITS, CHUNK])
    with pytest.raises(ValueError, match="2 ops were run, but 1 marks"):
        counters.main(["--ncu", program, "--out", str(tmp_path / "out")])


def test_what_ncu_says_when_it_fails_comes_through(fake, tmp_path):
    program = fake(KERNELS, [LOGITS], broken="Profiling failed because a driver resource was unavailable.")
    with pytest.raises(ValueError, match=r"no report: ==ERROR== Profiling failed.*DCGM"):
        counters.main(["--ncu", program, "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="run without --again"):
        counters.main(["--again", "--out", str(tmp_path / "out")])


def test_without_ncu_or_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="comes with the CUDA toolkit"):
        counters.main(["--ncu", "no-such-program", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="CUDA device"):
        counters.main(["--ncu", sys.executable, "--out", str(tmp_path)])


# what is counted


def test_an_op_is_counted_once_behind_a_mark(monkeypatch):
    order = []
    for name in ("synchronize", "empty_cache", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *of, name=name: order.append(name))
    profiler = SimpleNamespace(start=lambda: order.append("start"), stop=lambda: order.append("stop"))
    monkeypatch.setattr(torch.cuda, "profiler", profiler)
    counted.count(Variant("mine", "ours", lambda: Call(lambda: order.append("run") or {})))
    assert order == ["run", "synchronize", "empty_cache", "start", "_sleep", "run", "synchronize", "stop"]


def test_only_what_passed_its_check_is_counted(monkeypatch):
    rows = {"good": {"status": "ok", "median_s": 0.5}, "bad": {"status": "wrong", "reason": "logp: error 1"}}
    variants = {name: Variant(name, "ours", lambda: Call(dict)) for name in rows}
    monkeypatch.setattr(counted, "checked", lambda case, names: (rows, variants))
    seen = []
    monkeypatch.setattr(counted, "count", lambda variant: seen.append(variant.name))
    wanted = [replace(LOGITS, variant=name, status="", seconds=None) for name in ("good", "bad", "absent")]
    done = counted._counted(LOGITS.case, wanted, float("inf"))
    assert seen == ["good"]
    assert [target.status.split(":")[0] for target in done] == ["counted", "wrong", "not there"]
    assert (done[0].seconds, done[1].seconds) == (0.5, None)
    assert {t.status for t in counted._counted(LOGITS.case, wanted, 0.0)} == {"left out: --budget was used up"}


def test_variants_are_checked_as_in_a_benchmark():
    """On a CPU with the torch backend: a real row, and yardsticks are not counted."""
    case = Case("policy_loss_from_logits", 64, 0, 300, "float32")
    rows, variants = counted.checked(case, ["revisual-fast torch"])
    assert rows["revisual-fast torch"]["status"] == "ok"
    assert rows["eager"]["status"] == "ok"
    assert list(variants) == ["revisual-fast torch"]


def test_what_is_counted_are_variants_of_the_benchmark(monkeypatch):
    """One chunk of the benchmark's rows; every name is one that its op has where the kernels are built."""
    monkeypatch.setattr("bench.ours.available_backends", lambda op: {"cuda": "yes", "triton": "yes", "torch": "yes"})
    targets = counted.targets()
    for op, sizes in (("policy_loss_from_logits", (16, 0, 40)), ("linear_policy_loss", (16, 8, 40))):
        small = Case(op, *sizes, "bfloat16", "cpu")
        names = {variant.name for variant in getattr(counted.own, op)(small).variants}
        assert {target.variant for target in targets if target.case.op == op} <= names
    chunk = next(target.case for target in targets if target.case.d)
    assert (chunk.d, chunk.v) == (3584, 152064)
    most = plan.rows_per_chunk(chunk.v, torch.bfloat16, torch.device("cuda"))
    assert most / 2 < chunk.n <= most < 8192, "a chunk as the library cuts it"
