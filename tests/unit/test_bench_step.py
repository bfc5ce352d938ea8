"""The benchmark of a training step, at toy sizes: all compute the same gradients, and who does not gets no time."""

from dataclasses import replace

import pytest
import torch

from bench import harness, plot, problems, report, step, step_inputs, step_trl
from bench.report_step import TRL_FAST, TRL_HEAD, TRL_STEP, share_points, shares
from bench.step_inputs import MODELS, Step, build, make_step, step_errors
from bench.step_peers import PADDED, TRL
from bench.targets import STEP_GPU, STEP_TARGETS, TRL_LABEL, targets

STEPS = {
    "image": Step(40, 9, 4, (1, 8, 12), model="tiny"),
    "lengths": Step(40, 9, 4, (1, 8, 12), shortest=3, model="tiny"),
    "text": Step(12, 9, 4, model="tiny"),
    "checkpointing": Step(12, 9, 4, model="tiny", checkpointing=True),
}


def tiny_config():
    return step_inputs._config(
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "mrope_section": [2, 3, 3]},
        {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "fullatt_block_indexes": [1]},
    )


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", tiny_config)
    monkeypatch.setitem(MODELS, step_inputs.SMALL, tiny_config)


def problem_of(name, monkeypatch, dtype="float32"):
    case = STEPS[name].case(dtype, "cpu")
    monkeypatch.setitem(step.STEPS, case.label, STEPS[name])
    monkeypatch.setattr(step, "ALL_LAYOUTS", {case.label})
    return step.grpo_step(case)


def rows_of(problem, rounds=1):
    return harness.measure(problem, harness.stamp("cpu", "cpu"), rounds)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in STEPS), ("image", "bfloat16")])
def test_all_variants_compute_the_same_gradients(name, dtype, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed")
    rows = {row["variant"]: row for row in rows_of(problem_of(name, monkeypatch, dtype))}
    layouts = ["revisual-fast", "revisual-fast, varlen layout", "revisual-fast, padded layout"]
    assert list(rows) == [*layouts, PADDED, *([] if name == "lengths" else [TRL])]
    assert {name: (row["status"], row["reason"]) for name, row in rows.items()} == dict.fromkeys(rows, ("ok", ""))
    parts = {"d_text", "d_embedding"} | ({"d_vision"} if STEPS[name].grid else set())
    assert all(set(row["outputs"]) == parts for row in rows.values())
    if dtype == "float32":
        assert max(error for row in rows.values() for error in row["errors"].values()) < 1e-5
    assert rows["revisual-fast"]["case"]["n"] == sum(STEPS[name].lengths), "tokens trained"
    assert rows["revisual-fast"]["flops_variant"] < rows["revisual-fast, varlen layout"]["flops_variant"]
    assert rows["revisual-fast, varlen layout"]["flops_variant"] <= rows[PADDED]["flops_variant"]


@pytest.mark.parametrize("parameter", ["model.visual.blocks.0.attn.qkv.bias", "model.language_model.norm.weight"])
def test_a_wrong_gradient_of_one_parameter_gets_no_time(parameter, monkeypatch):
    gradients = step.gradients

    def wrong(model, loss):
        found = gradients(model, loss)
        return found | {parameter: found[parameter] * (1 + 1e-4)}

    monkeypatch.setattr(step, "gradients", wrong)
    rows = {row["variant"]: row for row in rows_of(problem_of("image", monkeypatch))}
    assert rows["revisual-fast"]["status"] == "wrong"
    assert rows[PADDED]["status"] == "ok"
    assert "median_s" not in rows["revisual-fast"]
    part = step_inputs.part_of(parameter)
    assert rows["revisual-fast"]["reason"].startswith(part)
    assert rows["revisual-fast"]["errors"][part] == pytest.approx(1e-4, rel=0.1)


def test_gradients_that_are_missing_or_not_numbers_are_errors():
    answer = {"model.visual.a": torch.ones(2), "lm_head.weight": torch.ones(2)}
    assert step_errors(answer, answer) == {"d_vision": 0.0, "d_embedding": 0.0}
    with pytest.raises(ValueError, match=r"model\.visual\.a"):
        step_errors({"lm_head.weight": torch.ones(2)}, answer)
    assert step_errors(answer | {"lm_head.weight": torch.tensor([1.0, float("nan")])}, answer)["d_embedding"] == float(
        "inf"
    )


def test_the_model_and_the_rollouts_are_what_the_label_says():
    monkey = Step(250, 96, 8, (1, 28, 28), shortest=48)
    assert (monkey.label, monkey.lengths[0], monkey.lengths[-1]) == ("250/48 to 96/8, image of 196 tokens", 48, 96)
    x = make_step(STEPS["lengths"], build(tiny_config(), torch.float32, "cpu"))
    assert (x.group.prompt.ids == step_inputs.IMAGE).sum() == STEPS["lengths"].image_tokens == 24
    assert len(x.group.prompt.ids) == 40
    assert [len(c) for c in x.group.completions] == [3, 5, 7, 9]
    assert x.mask().sum(1).tolist() == [3, 5, 7, 9]
    assert float(x.advantages.mean()) == pytest.approx(0, abs=1e-6)
    small = build(step_inputs.small_config(), torch.bfloat16, "meta")
    assert sum(p.numel() for p in small.parameters()) == 54_587_984


def test_cases_of_the_suites():
    labels = [case.label for case in problems.cases("cpu", ["grpo_step"])]
    assert set(STEP_TARGETS) <= set(labels)
    assert [case.label for case in problems.cases("gpu", ["grpo_step"])] == list(STEP_GPU)
    (case,) = problems.cases("cpu", ["grpo_step"], title="250/512/8")
    assert (case.n, case.dtype) == (8 * 512, "float32")
    assert [case.dtype for case in problems.cases("cpu", ["grpo_step"], dtypes=["bfloat16"])] == ["bfloat16"]
    assert problems.rounds("cpu", case) == problems.rounds("gpu", case) == problems.STEP_ROUNDS
    with pytest.raises(ValueError, match="leave --shape out"):
        problems.cases("cpu", ["grpo_step"], (16, 8, 40))


def test_speed_up_over_the_share_of_the_prompt(monkeypatch, tmp_path):
    monkeypatch.setattr(step, "SHARES", [Step(4, 12, 4, model="tiny"), Step(12, 4, 4, model="tiny")])
    (case,) = problems.cases("cpu", ["grpo_step_share"])
    rows = rows_of(step.grpo_step_share(case), rounds=2)
    assert {row["status"] for row in rows} == {"ok"}, [row["reason"] for row in rows]
    points = share_points(rows)
    assert [point["share"] for point in points] == [0.25, 0.75]
    assert 1 < points[0]["predicted"] < points[1]["predicted"] < 4
    assert all(point["low"] <= point["high"] for point in points)
    assert report.table(rows).count("\n") == 3
    assert "| 12 / 4 | 75% | **" in report.table(rows)
    assert plot.packing_speedup({"one": rows}, tmp_path / "speedup.png")
    assert (tmp_path / "speedup.png").stat().st_size > 5000
    assert not plot.packing_speedup({}, tmp_path / "none.png")
    assert not plot.roofline({"one": rows}, tmp_path / "none.png"), "a step is no op"


def timed(variant, role, median, flops, label, kind="cpu", **more):
    case = {"op": "grpo_step", "n": 768, "d": 512, "v": 8192, "dtype": "float32", "device": kind, "label": label}
    return {
        **{"variant": variant, "role": role, "status": "ok", "reason": "", "note": "", "case": case},
        **{"device": "NVIDIA H200" if kind == "cuda" else "AMD EPYC", "device_kind": kind, "threads": 2},
        **{
            "median_s": median,
            "p20_s": median,
            "p80_s": median,
            "peak_bytes": 1 << 30,
            "of_floor": 0.5,
            "of_gemm": 0.5,
        },
        **{"flops_variant": flops, "ceiling_gemm_flops_per_s": 8e14, "errors": {}, "errors_allowed": {}, "outputs": []},
        **{"run": "1", "time": "2026-01-01", "rounds": 3, "versions": {}, "commit": {"rev": "abc", "dirty": False}},
        **more,
    }


def step_rows(label, ours, kind="cpu"):
    return [
        timed("revisual-fast", "ours", ours, 2e14, label, kind),
        timed("revisual-fast, varlen layout", "ours", 0.1, 5e14, label, kind),
        timed(PADDED, "plain", 3.6, 8e14, label, kind),
        timed(TRL, "peer", 3.5, 8e14, label, kind),
    ]


def test_the_targets_are_set_against_the_faster_baseline():
    labels = list(STEP_TARGETS)
    rows = [*step_rows(labels[0], 1.0), *step_rows(labels[1], 3.0)]
    found = [target for target in targets(rows) if "`grpo_step`" in target.text]
    assert [target.verdict for target in found] == ["reached", "missed", "", "", ""]
    assert found[0].measured == f"against {TRL}: 3.50x (revisual-fast); varlen layout: 35.00x"
    assert {target.measured for target in found[2:]} == {"not measured"}
    rows[3].update(status="failed", reason="no memory")
    assert next(t for t in targets(rows) if labels[0] in t.text).measured == f"{TRL} got no time"


def test_lines_of_a_step():
    text = report.table(step_rows(next(iter(STEP_TARGETS)), 1.0))
    assert "| predicted by FLOPs | of GEMM rate | error / allowed |" in text
    assert "| **revisual-fast** | **3.50x** | 1.00 to 1.00 | 1,024 MiB | 4.00x | 25% | 0.00 |" in text
    assert report.title(step_rows("64/512/8, text", 1.0)[0]["case"]) == "grpo_step, 64/512/8, text, float32"


def test_on_a_gpu_tokens_and_mfu():
    rows = step_rows(STEP_GPU[0], 0.5, "cuda")
    for row in rows:
        row["case"]["dtype"] = "bfloat16"
    assert "| tokens/s | MFU |" in report.table(rows)
    assert "| 1,536 | 40% |" in report.table(rows)
    (found,) = [target for target in targets(rows) if f"`grpo_step`, Qwen2.5-VL-3B, {STEP_GPU[0]}" in target.text]
    assert found.measured == f"against {TRL}: 7.00x (revisual-fast), 50% of the measured GEMM rate, MFU 40%"


def test_a_step_inside_trl(monkeypatch):
    """Stock, with the fused head, and packed: the same gradients; what packing and what the head gives, apart."""
    pytest.importorskip("trl", reason="trl is not installed")
    case = replace(STEPS["image"].case("float32", "cpu"), op=TRL_STEP)
    monkeypatch.setitem(step.STEPS, case.label, STEPS["image"])
    rows = rows_of(step_trl.trl_step(case), rounds=2)
    assert [(row["variant"], row["status"]) for row in rows] == [(name, "ok") for name in (TRL, TRL_HEAD, TRL_FAST)]
    assert max(error for row in rows for error in row["errors"].values()) < 1e-5
    for row, seconds in zip(rows, (8.0, 4.0, 1.0), strict=True):
        row["median_s"] = seconds
        row["case"]["label"] = TRL_LABEL
    assert shares(rows) == {"all": 8.0, "head": 2.0, "packing": 4.0}
    (target,) = [t for t in targets(rows) if "`trl_step`" in t.text and t.measured != "not measured"]
    assert (target.measured, target.verdict) == ("8.00x: packing 4.00x, fused head 2.00x", "reached")
    assert shares(rows[:2]) == {}
    assert "**8.00x**" in report.table(rows)
