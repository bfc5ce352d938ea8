"""RESULTS.md: ratios within a run, the fastest baseline first, and nothing that was not measured."""

import pytest

from bench import harness, machine, report
from bench.targets import MISSING, targets


def row(
    variant, median, role="plain", *, device="AMD EPYC", kind="cpu", shape=(2048, 512, 32000), dtype="float32", **more
):
    case = dict(zip(["op", "n", "d", "v", "dtype", "device"], ["linear_policy_loss", *shape, dtype, kind], strict=True))
    return {
        "variant": variant,
        "role": role,
        "status": "ok",
        "reason": "",
        "note": "",
        "device": device,
        "device_kind": kind,
        "case": case,
        "median_s": median,
        "p20_s": median * 0.9,
        "p80_s": median * 1.1,
        "rounds": 5,
        "peak_bytes": 100 << 20,
        "of_floor": 0.5,
        "of_gemm": 0.5,
        "flops": 600,
        "bytes": 10,
        "ceiling_gemm_flops_per_s": 1e12,
        "ceiling_copy_bytes_per_s": 1e10,
        "errors": {"d_weight": 1e-7},
        "errors_allowed": {"d_weight": 2e-7},
        "outputs": ["d_hidden", "d_weight", "loss"],
        "run": "1",
        "time": "2026-01-01T00:00:00",
        "threads": 2,
        "versions": {"torch": "2.13.0"},
        "commit": {"rev": "abc", "dirty": False},
        **more,
    }


CPU_ROWS = [
    row("revisual-fast torch", 0.5, "ours", peak_bytes=20 << 20),
    row("eager", 1.0),
    row("torch.compile", 0.8),
    row("TRL ChunkedLogProbFunction", 4.0, "peer"),
    row("Liger fused linear GRPO", 0.6, "peer"),
    row("quack chunked linear CE", 0.0, "peer", status="unavailable", reason="needs CUDA"),
]


def test_the_fastest_baseline_comes_first_and_a_cpu_gets_ratios_only():
    text = report.table(CPU_ROWS)
    lines = text.splitlines()[2:]
    assert lines[0].startswith("| Liger fused linear GRPO | 1.00x |")
    assert lines[1].startswith("| **revisual-fast torch** | **1.20x** |")
    assert "unavailable: needs CUDA" in lines[-1]
    assert " ms" not in text
    on_gpu = report.table([row("eager", 0.0012, device="NVIDIA H200", kind="cuda")])
    assert "1.200 ms" in on_gpu


def test_the_newest_run_of_a_case_counts_with_all_its_variants():
    newer = row("eager", 0.1, run="2", time="2026-02-01")
    other_case = row("eager", 0.3, dtype="bfloat16")
    latest = report.newest([*CPU_ROWS, other_case, newer])
    assert latest == [other_case, newer], "no variant of an older run stands beside a newer one"
    assert "| eager | 1.00x |" in report.table([newer])
    assert "no baseline" in report.table([row("revisual-fast torch", 0.5, "ours")])


def test_a_commit_is_short_and_says_dirty():
    dirty = row("eager", 1.0, commit={"rev": "0123456789abcdef", "dirty": True})
    assert "commit 0123456789ab dirty;" in report.provenance([dirty])
    assert machine.short({"rev": "unknown", "dirty": None}) == "unknown"


def test_targets_are_reached_missed_or_not_measured():
    found = targets(CPU_ROWS)
    cpu = [target for target in found if target.text.startswith("CPU, `linear") and "float32" in target.text]
    assert [target.verdict for target in cpu] == ["reached", "reached", "reached", "missed"]
    assert cpu[0].measured == (
        "against eager: 2.00x (revisual-fast torch); fastest baseline with the same outputs: "
        "Liger fused linear GRPO, 1.20x"
    )
    assert cpu[1].measured.startswith("against eager: 0.200 (revisual-fast torch); fastest")
    assert cpu[1].measured.endswith("Liger fused linear GRPO, 0.200 of its memory")
    rest = [target for target in found if target not in cpu]
    assert len(rest) == 27
    assert {target.measured for target in rest} == {MISSING}
    text = report.results(CPU_ROWS, {})
    assert text.count("| not measured |") == 27
    assert "Nothing here has been measured on a GPU" in text


def test_only_the_default_reaches_a_target():
    more = [row("revisual-fast torch, bf16 logits", 0.2, "ours", peak_bytes=20 << 20)]
    slow = row("revisual-fast torch", 0.9, "ours", peak_bytes=60 << 20)
    found = targets([slow, *more, *CPU_ROWS[1:]])
    assert [target.verdict for target in found[:2]] == ["missed", "missed"]
    assert "1.11x (revisual-fast torch); bf16 logits: 5.00x;" in found[0].measured
    assert "0.600 (revisual-fast torch); bf16 logits: 0.200;" in found[1].measured


def test_a_default_that_is_wrong_is_a_miss():
    broken = row("revisual-fast torch", 0.5, "ours", status="wrong")
    found = targets([broken, *CPU_ROWS[1:]])[1]
    assert (found.verdict, found.measured) == ("missed", "against eager: revisual-fast torch: wrong")


def test_the_fastest_setting_of_a_peer_counts():
    better = row("Liger fused linear GRPO, one chunk", 0.55, "peer")
    measured = targets([*CPU_ROWS, better])[3].measured
    assert measured.startswith("against Liger fused linear GRPO, one chunk: 1.10x")


def test_a_baseline_that_computes_less_is_not_the_one_with_the_same_outputs():
    less = row("eager, no entropy", 0.1, outputs=["d_hidden"])
    assert "fastest baseline with the same outputs: Liger" in targets([*CPU_ROWS, less])[0].measured


def test_targets_on_a_hopper_card():
    shape, here = (8192, 3584, 152064), {"device": "NVIDIA H200", "kind": "cuda", "dtype": "bfloat16"}
    exact = {"ratio_error": 2e-5, "ratio_error_float64": 3e-5}
    rows = [
        row("revisual-fast triton", 1.0, "ours", shape=shape, of_gemm=0.9, **exact, **here),
        row("torch.compile", 1.1, shape=shape, **here),
        row("cut-cross-entropy, no filter", 1.3, "peer", shape=shape, **here),
    ]
    verdicts = {target.text: target.verdict for target in targets(rows) if "D=3584" in target.text}
    assert list(verdicts.values()) == ["reached", "reached", "missed"]
    measured = [target.measured for target in targets(rows) if "identical" in target.text]
    assert measured == ["2.0e-05 (revisual-fast triton); against float64 log-probs: 3.0e-05"]


@pytest.mark.parametrize(
    ("op", "liger", "wanted"),
    [
        (
            "policy_loss_from_logits",
            "Liger Triton GRPO",
            ["1.3x Liger", "90% of the copy", "157 ns", "faster than every peer", "1.5x Liger"],
        ),
        ("policy_loss_from_logits_gspo", "Liger Triton GSPO", ["2x Liger"]),
        ("logits_statistics", "Liger fused_selective_log_softmax", ["90% of the copy"]),
    ],
)
def test_targets_of_logits_on_a_hopper_card(op, liger, wanted):
    here = {"device": "NVIDIA H200", "kind": "cuda", "dtype": "bfloat16", "shape": (8192, 0, 151936)}

    def found(median, share):
        rows = [
            row("revisual-fast cuda", median, "ours", of_copy=share, **here),
            row("revisual-fast cuda, read twice", 0.0024, "ours", of_copy=0.6, **here),
            row("revisual-fast triton", 0.0048, "ours", of_copy=0.3, **here),
            row("eager", 0.007, of_copy=0.1, **here),
            row(liger, 0.0024, "peer", of_copy=0.2, outputs=["d_logits"], **here),
        ]
        for each in rows:
            each["case"]["op"] = op
        return [target for target in targets(rows) if target.measured != MISSING]

    good, bad = found(0.0012, 0.91), found(0.0017, 0.89)
    assert [what in target.text for what, target in zip(wanted, good, strict=True)] == [True] * len(wanted)
    assert [target.verdict for target in good] == ["reached"] * len(wanted)
    assert [target.verdict for target in bad] == [
        "reached" if "1.3x" in what or "every" in what else "missed" for what in wanted
    ]
    shares = [target.measured for target in good if "copy" in target.text]
    says = "91.0% (revisual-fast cuda); read twice: 60.0%; fastest baseline with the same outputs: eager, 10.0%"
    assert shares == [says] * len(shares)


def test_what_was_left_out_stands_below_the_table():
    left = row("torch.compile", 0.0, status="left out", reason="the time of --budget was used up before it")
    assert report.table([row("eager", 1.0), left]).splitlines()[-1].startswith("| torch.compile | left out: the time")


def test_report_and_picture_are_written(tmp_path):
    harness.append(CPU_ROWS, tmp_path / "results")
    written = report.write(tmp_path / "results", tmp_path)
    assert written[0].name == "RESULTS.md"
    picture = f"docs/roofline-{machine.slug(CPU_ROWS[0]['device'])}.png"
    assert (tmp_path / picture).stat().st_size > 10_000
    assert f"]({picture})" in written[0].read_text()


def test_results_without_a_measurement(tmp_path):
    (path,) = report.write(tmp_path, tmp_path)
    assert path.read_text().count("| not measured |") == 31
