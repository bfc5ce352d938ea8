"""The benchmark of rollouts, at toy sizes: engines give the same greedy completions, and who does not gets no time."""

import json

import pytest
import torch

from bench import harness, problems, report, rollout
from bench.report_rollout import sync_lines
from bench.rollout_inputs import TINY, Load
from bench.targets import targets

LOAD = Load(12, 4, 3, 2, (1, 4, 4), TINY)


def rows_of(monkeypatch):
    case = LOAD.case("float32", "cpu")
    monkeypatch.setitem(rollout.LOADS, case.label, LOAD)
    monkeypatch.setattr(rollout, "vllm_problem", lambda: "vllm is not installed")
    return harness.measure(rollout.rollout(case), harness.stamp("cpu", "cpu"), 1)


def test_all_engines_give_the_same_greedy_completions(monkeypatch):
    rows = {row["variant"]: row for row in rows_of(monkeypatch)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "revisual-fast": "ok",
        "revisual-fast, a prompt for each completion": "ok",
        "transformers generate": "ok",
        "transformers generate, prompt by prompt": "ok",
        "revisual-fast on vLLM": "unavailable",
        "revisual-fast on vLLM, no prefix cache": "unavailable",
    }
    assert rows["revisual-fast"]["case"]["n"] == 2 * 3 * 4, "tokens generated"
    assert rows["revisual-fast"]["flops_variant"] < rows["transformers generate"]["flops_variant"]
    lines = report.table(list(rows.values())).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count(" | ") for line in lines[2:]}) == 1


def test_other_completions_get_no_time(monkeypatch):
    generate = rollout.HFEngine.generate

    def wrong(engine, prompts, n, sampling, on_group=None):
        groups = generate(engine, prompts, n, sampling)
        groups[-1][-1].ids[-1] += 1
        return groups

    monkeypatch.setattr(rollout.HFEngine, "generate", wrong)
    rows = {row["variant"]: row for row in rows_of(monkeypatch)}
    assert rows["revisual-fast"]["status"] == "wrong"
    assert rows["revisual-fast"]["errors"] == {"tokens": pytest.approx(1 / 24)}
    assert rows["transformers generate"]["status"] == "ok"


def test_regret_is_how_far_below_the_best_token_the_completions_are():
    x = rollout.RolloutInputs(LOAD, torch.float32, "cpu")
    best = [
        [r.ids for r in group]
        for group in rollout.HFEngine(x.policy, []).generate(x.prompts, 1, rollout.Sampling(4, 0))
    ]
    assert x.regret(best) == 0
    assert x.regret([[torch.randint(10, 60, (4,))] for _ in best]) > 0.1


def test_rollouts_are_measured_only_where_they_are_named():
    assert not {case.op for case in problems.cases("cpu")} & problems.ALONE
    assert {case.op for case in problems.cases("cpu", sorted(problems.ALONE))} == problems.ALONE
    assert {case.op for case in problems.cases("gpu", sorted(problems.ALONE))} == problems.ALONE


def row(variant, role, median, **more):
    case = {"op": "rollout", "label": more.pop("label"), "dtype": "float32", "n": 10, "d": 0, "v": 0}
    timing = {"outputs": ["tokens"], "median_s": median, "p20_s": median, "p80_s": median, "note": "", "bytes": 2e9}
    where = {"device": "x", "device_kind": "cpu", "run": "1", "time": "1"}
    return {"variant": variant, "role": role, "status": "ok", "case": case, **timing, **where, **more}


def test_the_target_is_against_the_faster_way_to_call_generate():
    label = "tiny-vl, 4 x 512/32/8, image of 196 tokens"
    rows = [row("revisual-fast", "ours", 1.0, label=label), row("revisual-fast on vLLM", "ours", 0.1, label=label)]
    rows += [row("transformers generate", "plain", 4.0, label=label), row("other", "plain", 3.1, label=label)]
    (found,) = [target for target in targets(rows) if "`rollout`" in target.text]
    assert (found.measured, found.verdict) == ("against other: 3.10x (revisual-fast)", "reached")
    rows[-1]["median_s"] = 2.9
    (found,) = [target for target in targets(rows) if "`rollout`" in target.text]
    assert found.verdict == "missed"


def test_a_weight_sync_is_told_by_the_copy_it_could_be():
    rows = [row("sync", "ours", 3.0, label="all"), row("copy", "plain", 0.5, label="all")]
    assert sync_lines(rows)[1][:2] == ["**sync**", "**6.0x**"]
    for one in rows:
        one["device_kind"] = "cuda"
    assert sync_lines(rows)[1][-1] == "3.000"
    assert json.dumps(rows)
