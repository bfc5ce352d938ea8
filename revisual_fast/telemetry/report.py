"""The report of a run: ``report.json`` for programs, a self-contained ``report.html`` for people, and ``report.md``, a
table that can stand in other pages.

All are made from the files in ``run.dir`` alone: the JSONL files of :mod:`.sinks` and ``run.json`` of the trainer::

    {"config": {...}, "versions": {package: version}, "device": text, "header": [lines],
     "stages": [{"name", "kind", "seconds", "steps", "skipped_steps", "finished": bool (default true)}],
     "bad_records": {reason: count}, "total_seconds"}

A run that is still going, or was killed, gives a report too; what is not there is listed under ``"missing"``.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import yaml
from PIL import Image

from revisual_fast.telemetry.plots import OVERVIEW, plot_overview, plot_run
from revisual_fast.telemetry.sinks import read_jsonl
from revisual_fast.telemetry.stages import PHASES, duration, markdown_table, stage_totals

__all__ = ["START", "write_report"]

Record = Mapping[str, Any]

START = "start"
_SAMPLES_PER_STAGE = 3
_COMPLETIONS_PER_SAMPLE = 8
_IMAGE_PIXELS = 640


def write_report(run_dir: str | Path, *, plots: bool = True) -> tuple[Path, Path]:
    """Write ``report.json``, ``report.html``, ``report.md`` and, unless told not to, ``plots/`` into ``run_dir``.

    Returns the paths of the first two.

    ``report.json``: ``{"stages": [{"name", "kind", "seconds", "steps", "heldout": {name: accuracy}, "tokens":
    {"rollout", "update"}, "tokens_per_second": {"rollout", "update", "step"}, "trends": {metric: [first, last]},
    "skipped_steps"}], "total_seconds", "device", "versions", "bad_records": {reason: count}, "complete", "missing":
    [text]}``; its first stage is ``"start"``, before any training. :func:`~revisual_fast.telemetry.stages.stage_totals`
    says what the numbers are. ``report.md`` is a table of them and shows ``plots/overview.png``. Raises
    :class:`~revisual_fast.telemetry.sinks.TelemetryError` for a damaged JSONL file.
    """
    run_dir = Path(run_dir)
    run, missing = _read_run(run_dir)
    metrics, evaluations = read_jsonl(run_dir / "metrics.jsonl"), read_jsonl(run_dir / "evaluations.jsonl")
    samples = read_jsonl(run_dir / "samples.jsonl")
    stages = _stages(run, metrics, evaluations)
    missing += _what_is_missing(run, stages, metrics, samples)
    report = {
        "stages": stages,
        "total_seconds": run["total_seconds"] if _complete(run) else sum(stage["seconds"] for stage in stages),
        "device": run.get("device"),
        "versions": run.get("versions", {}),
        "bad_records": run.get("bad_records", {}),
        "complete": _complete(run),
        "missing": missing,
    }
    json_path, html_path = run_dir / "report.json", run_dir / "report.html"
    drawn = plot_run(run_dir) if plots else {}
    pictures = {name: _data_uri(path.with_suffix(".svg").read_bytes(), "svg+xml") for name, path in drawn.items()}
    page = _render(run_dir, run, report, pictures, _pick_samples(run_dir, samples, [stage["name"] for stage in stages]))
    _replace(json_path, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _replace(html_path, page)
    if plots:
        plot_overview(run_dir)
    tests = [record for record in evaluations if record["kind"] == "heldout"]
    _replace(run_dir / "report.md", _markdown(run_dir, report, tests))
    return json_path, html_path


def _read_run(run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """``run.json`` and, if it cannot be read, what that means for the report."""
    path = run_dir / "run.json"
    effect = "settings, versions and device are unknown, and stage times are sums of step times"
    try:
        return json.loads(path.read_text()), []
    except FileNotFoundError:
        return {}, [f"run.json: {effect}"]
    except json.JSONDecodeError as error:
        return {}, [f"run.json is not valid JSON ({error}): {effect}"]


def _stages(run: Record, metrics: Sequence[Record], evaluations: Sequence[Record]) -> list[dict[str, Any]]:
    """The report's stages: ``start``, those of ``run.json``, then those that only the metrics know."""
    configured = run.get("config", {}).get("stages", {})
    noted = {stage["name"]: stage for stage in run.get("stages", [])}
    finished = _finished(run)
    stages = []
    for name in dict.fromkeys([START, *noted, *(record["stage"] for record in metrics)]):
        steps = [record for record in metrics if record["stage"] == name]
        tests = [record for record in evaluations if record["stage"] == name and record["kind"] == "heldout"]
        seconds = sum(r.get("time/step") or 0.0 for r in steps) + sum(r.get("seconds") or 0.0 for r in tests)
        known = noted.get(name, {})
        stages.append(
            {
                "name": name,
                "kind": known.get("kind") or configured.get(name, {}).get("kind"),
                "seconds": known["seconds"] if name in finished else seconds,
                "steps": known["steps"] if name in finished else len(steps),
                "heldout": {test["name"]: test["accuracy"] for test in tests},
                **stage_totals(steps),
                "skipped_steps": known.get("skipped_steps"),
            }
        )
    return stages


def _finished(run: Record) -> set[str]:
    return {stage["name"] for stage in run.get("stages", []) if stage.get("finished", True)}


def _complete(run: Record) -> bool:
    """Whether every stage of the curriculum has finished."""
    return "total_seconds" in run and _finished(run) >= set(run.get("config", {}).get("curriculum", []))


def _what_is_missing(
    run: Record, stages: Sequence[Record], metrics: Sequence[Record], samples: Sequence[Record]
) -> list[str]:
    """What a complete run would have and this one has not, one line each."""
    config = run.get("config", {})
    reported = {stage["name"]: stage for stage in stages}
    finished = _finished(run)
    missing = []
    for name in config.get("curriculum", []):
        if name not in reported:
            missing.append(f"stage {name}: not started")
        elif name not in finished:
            missing.append(f"stage {name}: not finished, {reported[name]['steps']} steps{_of_all(config, name)} so far")
    heldout = set(config.get("evaluation", {}).get("heldout", {}))
    for name, stage in reported.items():
        absent = sorted(heldout - set(stage["heldout"]))
        if absent and (name in finished or name == START):  # the others have not come to it yet
            missing.append(f"stage {name}: no held-out accuracy for {', '.join(absent)}")
    if not metrics:
        missing.append("metrics.jsonl: no training step yet, so there are no curves")
    if not samples and any("reward/total" in record for record in metrics):
        missing.append("samples.jsonl: no sample rollouts; telemetry.samples_every says how often they are stored")
    return missing


def _of_all(config: Record, stage: str) -> str:
    limits = (config.get("stages", {}).get(stage, {}).get("steps"), config.get("train", {}).get("max_steps"))
    known = [limit for limit in limits if limit is not None]
    return f" of {min(known)}" if known else ""


def _pick_samples(run_dir: Path, samples: Sequence[Record], stages: Iterable[str]) -> list[dict[str, Any]]:
    """The first, middle and last samples of each stage, with their pictures as data URIs."""
    picked = []
    for stage in stages:
        of_stage = [sample for sample in samples if sample["stage"] == stage]
        count = min(_SAMPLES_PER_STAGE, len(of_stage))
        for i in range(count):
            sample = of_stage[i * (len(of_stage) - 1) // max(count - 1, 1)]
            completions = sample.get("completions", [])
            picked.append(
                {
                    **sample,
                    "pictures": [_picture(run_dir, name) for name in sample.get("images", [])],
                    "completions": completions[:_COMPLETIONS_PER_SAMPLE],
                    "hidden": max(0, len(completions) - _COMPLETIONS_PER_SAMPLE),
                    "right": sum((completion.get("accuracy") or 0) >= 1 for completion in completions),
                    "group": len(completions),
                }
            )
    return picked


def _picture(run_dir: Path, name: str) -> dict[str, Any]:
    """A sample's image, scaled down to at most 640 pixels a side; ``uri`` is None if the file is not there."""
    path = run_dir / name
    if not path.exists():
        return {"name": name, "uri": None}
    with Image.open(path) as image:
        size = image.size
        if max(size) <= _IMAGE_PIXELS:
            return {"name": name, "uri": _data_uri(path.read_bytes(), "png"), "small": max(size) < 100, "size": size}
        image.thumbnail((_IMAGE_PIXELS, _IMAGE_PIXELS))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=85)
    return {"name": name, "uri": _data_uri(buffer.getvalue(), "jpeg"), "small": False, "size": size}


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _render(
    run_dir: Path,
    run: Record,
    report: Record,
    plots: Mapping[str, str],
    samples: Sequence[Record],
) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(duration=duration, decimal=_decimal, count=_count, warned=_warned)
    template = environment.from_string(files("revisual_fast.telemetry").joinpath("report.html.j2").read_text())
    stages = report["stages"]
    heldout = list(dict.fromkeys(name for stage in stages for name in stage["heldout"]))
    return template.render(
        title=run_dir.resolve().name,
        report=report,
        heldout=heldout,
        cards=[*(_accuracy_card(name, stages) for name in heldout), _time_card(report)],
        phases=[p for p in PHASES if any(p in stage["tokens_per_second"] for stage in stages)],
        steps=sum(stage["steps"] for stage in stages),
        plots=plots,
        samples=samples,
        header=run.get("header", []),
        config=yaml.safe_dump(run["config"], sort_keys=False, allow_unicode=True) if "config" in run else None,
    )


def _markdown(run_dir: Path, report: Record, tests: Sequence[Record]) -> str:
    """The table under the run's name, with the overview where there is one."""
    steps = sum(stage["steps"] for stage in report["stages"])
    lines = [f"# {run_dir.resolve().name}", ""]
    lines.append(f"{steps:,} steps · {duration(report['total_seconds'])} · {report['device'] or 'device unknown'}")
    lines += [f"- {line}" for line in report["missing"]]
    if (run_dir / OVERVIEW).exists():
        lines += ["", f"![Curves of the run]({OVERVIEW})"]
    return "\n".join([*lines, "", markdown_table(report["stages"], tests)])


def _accuracy_card(name: str, stages: Sequence[Record]) -> dict[str, Any]:
    """The latest held-out accuracy of the set ``name``, with a bar for each stage that has one."""
    tested = [(stage["name"], stage["heldout"][name]) for stage in stages if name in stage["heldout"]]
    bars = [{"stage": stage, "share": value or 0.0, "text": _decimal(value)} for stage, value in tested]
    return {"label": f"{name}, held-out accuracy", "number": bars[-1]["text"], "bars": bars}


def _time_card(report: Record) -> dict[str, Any]:
    longest = max([stage["seconds"] for stage in report["stages"]]) or 1.0
    bars = [
        {"stage": stage["name"], "share": stage["seconds"] / longest, "text": duration(stage["seconds"])}
        for stage in report["stages"]
    ]
    return {"label": "training and evaluation", "number": duration(report["total_seconds"]), "bars": bars}


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _warned(value: int | None) -> str:
    """A count that should be 0, marked if it is not."""
    return markupsafe.Markup('<span class="chip warn">{}</span>').format(_count(value)) if value else _count(value)


def _replace(path: Path, text: str) -> None:
    """Write ``text`` so that a reader finds the old file or the new one, never half of it."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
