"""The benchmark of a training step, at toy sizes: all compute the same gradients, and who does not gets no time."""

import json
from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench import harness, plot, problems, report, step, step_inputs, step_ours, step_trl
from bench.report_step import TRL_FAST, TRL_HEAD, TRL_STEP, phase_line, share_points, shares
from bench.step_inputs import MODELS, Step, build, make_step, step_errors
from bench.step_peers import PADDED, TRL
from bench.targets import STEP_GPU, STEP_TARGETS, TRL_GPU, TRL_LABEL, targets

STEPS = {
    "image": Step(40, 9, 4, (1, 8, 12), model="tiny", detail=True),
    "lengths": Step(40, 9, 4, (1, 8, 12), shortest=3, model="tiny", padded_rows=3),
    "text": Step(12, 9, 4, model="tiny"),
    "long": Step(40, 20, 4, (1, 8, 12), model="tiny", checkpointing=True, padded_rows=2),
    "checkpointing": Step(12, 9, 4, model="tiny", checkpointing=True, detail=True, tf32=True),
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
    return step.grpo_step(case)


def rows_of(problem, rounds=1):
    return harness.measure(problem, harness.stamp("cpu", "cpu"), rounds)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in STEPS), ("image", "bfloat16")])
def test_all_variants_compute_the_same_gradients(name, dtype, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed")
    rows = {row["variant"]: row for row in rows_of(problem_of(name, monkeypatch, dtype))}
    ours = ["revisual-fast"]
    if name == "long":
        ours += ["revisual-fast, no checkpointing, 2 completions at a time"]
    if STEPS[name].detail:
        ours += ["revisual-fast, no checkpointing"] if STEPS[name].checkpointing else []
        ours += ["revisual-fast, varlen layout", "revisual-fast, padded layout"]
    assert list(rows) == [*ours, PADDED, *([] if name == "lengths" else [TRL])]
    assert {name: (row["status"], row["reason"]) for name, row in rows.items()} == dict.fromkeys(rows, ("ok", ""))
    parts = {"d_text", "d_embedding"} | ({"d_vision"} if STEPS[name].grid else set())
    assert all(set(row["outputs"]) == parts for row in rows.values())
    if dtype == "float32":
        assert max(error for row in rows.values() for error in row["errors"].values()) < 1e-5
    assert rows["revisual-fast"]["case"]["n"] == sum(STEPS[name].lengths), "tokens trained"
    assert rows["revisual-fast"]["flops_variant"] < rows[PADDED]["flops_variant"]
    if STEPS[name].detail:
        varlen = rows["revisual-fast, varlen layout"]["flops_variant"]
        assert rows["revisual-fast"]["flops_variant"] < varlen <= rows[PADDED]["flops_variant"]
    phases = rows["revisual-fast"]["phases_s"]
    assert set(phases) == {"pack", "forward", "loss", "backward"} | ({"vision"} if STEPS[name].grid else set())
    assert all(seconds > 0 for seconds in phases.values())


def test_checkpointing_is_as_the_variant_says(monkeypatch):
    """During the call; afterwards as the step has it, for the others."""
    problem = problem_of("checkpointing", monkeypatch)
    seen = {}
    accumulated = step_ours.accumulated
    for variant in problem.variants:
        if variant.role != "ours":
            continue

        def watched(model, losses, name=variant.name):
            seen[name] = model.is_gradient_checkpointing
            return accumulated(model, losses)

        monkeypatch.setattr(step_ours, "accumulated", watched)
        variant.setup().run()
    assert {name for name, on in seen.items() if not on} == {"revisual-fast, no checkpointing"}
    assert len(seen) == 4


@pytest.mark.parametrize("parameter", ["model.visual.blocks.0.attn.qkv.bias", "model.language_model.norm.weight"])
def test_a_wrong_gradient_of_one_parameter_gets_no_time(parameter, monkeypatch):
    accumulated = step_ours.accumulated

    def wrong(model, losses):
        found = accumulated(model, losses)
        return found | {parameter: found[parameter] * (1 + 1e-4)}

    monkeypatch.setattr(step_ours, "accumulated", wrong)
    rows = {row["variant"]: row for row in rows_of(problem_of("image", monkeypatch))}
    assert rows["revisual-fast"]["status"] == "wrong"
    assert rows[PADDED]["status"] == "ok"
    assert "median_s" not in rows["revisual-fast"]
    part = step_inputs.part_of(parameter)
    assert rows["revisual-fast"]["reason"].startswith(part)
    assert rows["revisual-fast"]["errors"][part] == pytest.approx(1e-4, rel=0.1)


def test_ligers_layers_go_into_a_model_of_their_own(monkeypatch):
    x = make_step(STEPS["image"], build(tiny_config(), torch.float32, "cpu"))
    seen = []
    monkeypatch.setattr(step_ours, "apply_liger", lambda family: seen.append(family))
    own = step_ours.with_liger(x)
    (family,) = seen
    assert family.head is own.model.lm_head is not x.model.lm_head
    assert all(torch.equal(a, b) for a, b in zip(own.model.parameters(), x.model.parameters(), strict=True))
    assert own.group is x.group
    case = STEPS["image"].case("bfloat16", "cuda")
    cost = step.CostModel(shape=step.model_shape(x.model.config))
    monkeypatch.setattr(step, "available_backends", dict)
    monkeypatch.setattr(step, "pick_attention", lambda *arguments: ("sdpa", ""))
    (variant,) = [v for v in step._ours(case, x, cost) if "Liger" in v.name]
    assert (variant.setup is None) == bool(variant.reason)


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


@pytest.mark.parametrize(("config", "name"), [(step_inputs.large_config, "3b"), (step_inputs.huge_config, "7b")])
def test_the_large_models_are_the_published_ones(config, name, shared_data):
    """As the file that comes with the weights says."""
    found, published = config(), json.loads((shared_data / f"qwen2_5_vl_processor/config_{name}.json").read_text())
    text, vision = found.text_config, found.vision_config
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(text, key) == published[key], key
    assert text.num_key_value_heads == published["num_key_value_heads"]
    assert text.rope_parameters["mrope_section"] == published["rope_scaling"]["mrope_section"]
    assert found.tie_word_embeddings == published["tie_word_embeddings"]
    for key in ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "fullatt_block_indexes"):
        assert getattr(vision, key) == published["vision_config"][key], key


def test_cases_of_the_suites():
    labels = [case.label for case in problems.cases("cpu", ["grpo_step"])]
    assert set(STEP_TARGETS) <= set(labels)
    assert {case.label for case in problems.cases("gpu", ["grpo_step"])} == set(STEP_GPU)
    assert {case.label for case in problems.cases("gpu", ["trl_step"])} == set(TRL_GPU)
    sure = problems.within(problems.cases("gpu"), command.BUDGET["gpu"])
    assert {label for label in STEP_GPU if "1450/500" in label} <= {case.label for case in sure}
    assert set(problems.OPS) - problems.ALONE - {"grpo_step_share"} == {case.op for case in sure}
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
        **{
            "flops": 2e14,
            "flops_variant": flops,
            "ceiling_gemm_flops_per_s": 8e14,
            "errors": {},
            "errors_allowed": {},
            "outputs": [],
        },
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
    assert [target.verdict for target in found] == ["reached", "missed", "", *[""] * len(STEP_GPU)]
    assert found[0].measured == f"against {TRL}: 3.50x (revisual-fast); varlen layout: 35.00x"
    assert {target.measured for target in found[2:]} == {"not measured"}
    rows[3].update(status="failed", reason="no memory")
    assert next(t for t in targets(rows) if labels[0] in t.text).measured == f"{TRL} got no time"


def test_lines_of_a_step():
    text = report.table(step_rows(next(iter(STEP_TARGETS)), 1.0))
    assert "| predicted by FLOPs | of GEMM rate | error / allowed |" in text
    assert "| **revisual-fast** | **3.50x** | 1.00 to 1.00 | 1,024 MiB | 4.00x | 25% | 0.00 |" in text
    assert report.title(step_rows("64/512/8, text", 1.0)[0]["case"]) == "grpo_step, 64/512/8, text, float32"


@pytest.mark.parametrize(
    ("label", "seconds", "verdict"),
    [("Qwen2.5-VL-7B", 0.5, "missed"), ("Qwen2.5-VL-7B", 0.4, "reached"), ("Qwen2.5-VL-3B", 0.5, "measured")],
)
def test_on_a_gpu_tokens_and_mfu(label, seconds, verdict):
    label = next(name for name in STEP_GPU if name.startswith(label))
    rows = [
        *step_rows(label, seconds, "cuda"),
        timed("revisual-fast, no checkpointing", "ours", 0.9, 2e14, label, "cuda"),
    ]
    rows[1].update(median_s=2.0)
    for row in rows:
        row["case"]["dtype"] = "bfloat16"
    assert "| tokens/s | MFU |" in report.table(rows)
    (found,) = [target for target in targets(rows) if f"`grpo_step`, {label}" in target.text]
    mfu = 2e14 / seconds / 989e12
    assert f"| {768 / seconds:,.0f} | {mfu:.0%} |" in report.table(rows)
    rate = f"{2e14 / seconds / 8e14:.0%} of the measured GEMM rate, MFU {mfu:.0%}"
    assert found.measured == f"against {TRL}: {3.5 / seconds:.2f}x (revisual-fast), {rate}"
    assert found.verdict == verdict


def test_phases_of_a_step():
    rows = step_rows("64/512/8, text", 1.0)
    assert not phase_line(rows)
    rows[0]["phases_s"] = {"pack": 0.1, "forward": 0.3, "loss": 0.2, "backward": 0.4, "vision": 0.1}
    assert "pack 10%, forward 30%, loss 20%, backward 40%; the vision tower's forward pass alone 10%" in phase_line(
        rows
    )
    assert phase_line(rows) in report.results(rows, {})


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
