"""Runs the stages of a configuration in order, with evaluation, checkpoints and exact resumption."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from revisual_fast import __version__
from revisual_fast.checkpoint import Checkpoints, write_atomically
from revisual_fast.config import Config, GRPOConfig
from revisual_fast.data.processor import Processor
from revisual_fast.data.records import BadRecords, Record, load_dataset
from revisual_fast.doctor import device_name, versions
from revisual_fast.evaluate import evaluate
from revisual_fast.policy.init import build
from revisual_fast.policy.load import export_model, load_policy, quiet_transformers
from revisual_fast.policy.model import Policy
from revisual_fast.rollout.hf import HFEngine
from revisual_fast.seeds import seed_for
from revisual_fast.stages.grpo import GRPOStage
from revisual_fast.stages.sft import SFTStage
from revisual_fast.stages.stage import NonFiniteError, Stage, StageContext
from revisual_fast.telemetry import Progress, Telemetry, write_report

__all__ = ["Curriculum", "Interrupted", "train"]

START = "start"


class Interrupted(Exception):
    """The run was asked to stop and has saved itself; the message names the checkpoint."""


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Run the whole curriculum of ``config`` and return the path of ``report.html``.

    Raises :class:`Interrupted` after Ctrl-C, :class:`NonFiniteError` when too many updates in a row had a non-finite
    loss or gradient, ValueError for anything that the configuration or the data got wrong.
    """
    with Curriculum(config, resume=resume, overwrite=overwrite) as curriculum:
        return curriculum.run()


class Curriculum:
    """One run in ``config.run.dir``."""

    def __init__(self, config: Config, *, resume: bool, overwrite: bool):
        self.config = config
        self.dir = Path(config.run.dir)
        self._claim(resume, overwrite)
        self.checkpoints = Checkpoints(self.dir, config.checkpoint.keep)
        self.checkpoint = self.checkpoints.latest() if resume else None
        self._prepare_torch()
        self.progress = Progress(config.telemetry.progress)
        self.bad_records = BadRecords()
        self.records: dict[str, list[Record]] = {}
        self.state: dict[str, Any] = {"stage": 0, "global_step": 0, "seconds": {}, "steps": {}, "skipped": {}}
        self.stop_requested = False

    def __enter__(self) -> Curriculum:
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.close()
        if hasattr(self, "telemetry"):
            self.telemetry.close()

    # -- set-up

    def _claim(self, resume: bool, overwrite: bool) -> None:
        """Refuse to mix two runs in one folder."""
        if (self.dir / "run.json").exists() and not resume:
            if not overwrite:
                raise ValueError(
                    f"run.dir: {self.dir} already holds a run; continue it with --resume, replace it with --overwrite, "
                    "or give another folder with --set run.dir=..."
                )
            shutil.rmtree(self.dir)
        if resume and not (self.dir / "run.json").exists():
            raise ValueError(f"--resume: there is no run in {self.dir}; start it without --resume")
        self.dir.mkdir(parents=True, exist_ok=True)

    def _prepare_torch(self) -> None:
        if self.config.run.threads is not None:
            torch.set_num_threads(self.config.run.threads)
        torch.set_flush_denormal(True)
        quiet_transformers()
        torch.use_deterministic_algorithms(self.config.run.deterministic)

    def _start(self) -> None:
        """Everything that happens once, before the first stage: model, data, telemetry, header."""
        model = Path(self.config.model.path)
        if self.config.model.init is not None and not model.exists():
            for line in build(self.config.model.init, model):
                self.progress.message(line)
        chat, sizes = self.config.chat, self.config.model
        self.processor = Processor(sizes.path, chat, min_pixels=sizes.min_pixels, max_pixels=sizes.max_pixels)
        self._load_data()
        telemetry_state = None
        if self.checkpoint is not None:
            self.optimizer_tensors, saved = self.checkpoints.load(self.checkpoint)
            self.state, telemetry_state = saved["run"], saved["telemetry"]
            self.stage_state = saved["stage"]
            self.bad_records.load_state_dict(saved["bad_records"])
        self.telemetry = Telemetry(self.dir, self.config.telemetry, self.dir.name, telemetry_state)
        self.header = self._header()
        for line in self.header:
            self.progress.message(line)
        self._write_run()

    def _load_data(self) -> None:
        used = [d for name in self.config.curriculum for d in self.config.stages[name].data]
        used += [*self.config.evaluation.heldout.values(), *self.config.evaluation.validation.values()]
        for name in dict.fromkeys(used):
            self.records[name] = load_dataset(name, self.config.data[name], self.bad_records)

    def _header(self) -> list[str]:
        device = device_name(self.config.model.device)
        lines = [f"revisual-fast {__version__} · {device} · run {self.dir} · seed {self.config.run.seed}"]
        lines += [f"data {name}: {len(records)} records" for name, records in self.records.items()]
        lines += [f"bad records ({reason}): {count}" for reason, count in self.bad_records.counts.items()]
        lines.append(f"curriculum: {' -> '.join(self.config.curriculum)}")
        if self.checkpoint is not None:
            lines.append(f"resumed from {self.checkpoint}")
            lines += _changes(json.loads((self.dir / "run.json").read_text())["config"], self._config_tree())
        return lines

    def _config_tree(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")

    # -- the run

    def run(self) -> Path:
        with self._stop_on_signals():
            self._start()
            if self.checkpoint is None:
                self._evaluate_start()
            while self.state["stage"] < len(self.config.curriculum):
                self._run_stage(self.config.curriculum[self.state["stage"]])
        _, html = self._report()
        return html

    def _evaluate_start(self) -> None:
        began = time.perf_counter()
        policy = load_policy(self.config.model.path, self.config.model)
        self._evaluate(policy, START, 0, "heldout")
        self.state["seconds"][START] = time.perf_counter() - began
        self.state["steps"][START] = 0

    def _run_stage(self, name: str) -> None:
        began = time.perf_counter() - self.state["seconds"].get(name, 0.0)
        stage = self._build_stage(name)
        resumed, self.checkpoint = self.checkpoint is not None, None
        if resumed and self.stage_state is not None:
            stage.load_state_dict(self.stage_state)
            stage.optimizer.load_state_tensors(self.optimizer_tensors)
        self.progress.stage(name, stage.total_steps, stage.steps)

        def note_time() -> None:
            self.state["seconds"][name] = time.perf_counter() - began
            self.state["steps"][name] = stage.steps
            self.state["skipped"][name] = stage.skipped

        while stage.steps < stage.total_steps:
            self._train_step(name, stage)
            note_time()
            if self.stop_requested:
                path = self._save(stage)
                raise Interrupted(f"stopped after {name} step {stage.steps}; saved {path}; continue with --resume")
            if stage.steps % self.config.checkpoint.every == 0 and stage.steps < stage.total_steps:
                self._save(stage)
        self._evaluate(stage.policy, name, stage.steps, "heldout")
        write_atomically(self.dir / "models" / name, lambda folder: self._export(stage.policy, folder))
        note_time()
        self.state["stage"] += 1
        self._save(None, stage.policy)
        self._report()

    def _train_step(self, name: str, stage: Stage) -> None:
        try:
            metrics = stage.run_step()
        except NonFiniteError as error:
            good = self.checkpoints.latest()
            raise NonFiniteError(
                f"stage {name}, step {stage.steps + 1}: {error}; last good checkpoint: {good}"
            ) from None
        self.state["global_step"] += 1
        place = {"stage": name, "step": stage.steps, "global_step": self.state["global_step"]}
        self.telemetry.step({**place, **metrics})
        self.progress.update({**place, **metrics})
        if isinstance(stage, GRPOStage) and (stage.steps - 1) % self.config.telemetry.samples_every == 0:
            self._store_sample(place, stage)
        every = self.config.evaluation.every
        if every is not None and stage.steps % every == 0:
            self._evaluate(stage.policy, name, stage.steps, "validation")

    def _store_sample(self, place: dict[str, Any], stage: GRPOStage) -> None:
        assert stage.last_sample is not None
        record = stage.last_sample["record"]
        sample = {**place, "prompt": record.prompt, "answer": record.answer, "source": record.source}
        images = {image.key: image.open() for image in record.images}
        self.telemetry.sample({**sample, "completions": stage.last_sample["completions"]}, images)

    def _evaluate(self, policy: Policy, stage: str, step: int, kind: str) -> None:
        datasets = getattr(self.config.evaluation, kind)
        engine = HFEngine(policy, self.processor.eos_token_id, max_batch=self.config.rollout.max_batch)
        for name, dataset in datasets.items():
            self.progress.phase(f"evaluate {name}")
            result = evaluate(self.records[dataset], self.config, engine, self.processor, self.bad_records)
            place = {"stage": stage, "step": step, "global_step": self.state["global_step"]}
            self.telemetry.evaluation({**place, "kind": kind, "name": name, **result})
            if kind == "heldout":
                self.progress.message(f"{stage}: held-out {name} accuracy {result['accuracy']:.3f} (n = {result['n']})")

    # -- stages and their models

    def _build_stage(self, name: str) -> Stage:
        stage = self.config.stages[name]
        source = self._stage_source()
        torch.manual_seed(seed_for(self.config.run.seed, name, "init"))
        policy = self._stage_policy(source)
        records = [record for dataset in stage.data for record in self.records[dataset]]
        context = StageContext(name, self.config, policy, self.processor, records, self.bad_records, self.progress)
        if not isinstance(stage, GRPOConfig):
            return SFTStage(context, stage)
        engine = HFEngine(policy, self.processor.eos_token_id, max_batch=self.config.rollout.max_batch)
        built = GRPOStage(context, stage, engine, self._reference(stage, source, policy))
        for line in built.rewards.header():
            self.progress.message(f"{name}: {line}")
        return built

    def _stage_source(self) -> Path:
        """The model that the current stage starts from: the previous stage's result, or the configured model."""
        done = self.config.curriculum[: self.state["stage"]]
        return self.dir / "models" / done[-1] if done else Path(self.config.model.path)

    def _stage_policy(self, source: Path) -> Policy:
        """The policy at the stage's start, or in the middle of it where a checkpoint says so."""
        midway = self.checkpoint is not None and self.stage_state is not None
        model = self.config.model
        if midway and model.lora is None:
            assert self.checkpoint is not None
            return load_policy(self.checkpoint / "model", model)
        return load_policy(source, model, adapter=self.checkpoint / "model" if midway and self.checkpoint else None)

    def _reference(self, stage: GRPOConfig, source: Path, policy: Policy) -> Policy | None:
        """The stage's starting model, frozen, where the objective has a KL term; LoRA's base is that model already."""
        if stage.objective.kl_coef == 0:
            return None
        if self.config.model.lora is not None:
            return policy
        reference = load_policy(source, self.config.model)
        reference.model.requires_grad_(False)
        return reference

    def _export(self, policy: Policy, folder: Path) -> None:
        export_model(policy, folder)
        self.processor.save(folder)

    # -- state on disk

    def _save(self, stage: Stage | None, policy: Policy | None = None) -> Path:
        """A checkpoint in the middle of ``stage``, or (None) between two stages."""
        owner = stage.policy if stage is not None else policy
        assert owner is not None

        def save_model(folder: Path) -> None:
            (owner.model.save_pretrained if stage is not None else lambda f: export_model(owner, f))(folder)
            self.processor.save(folder)

        state = {
            "run": self.state,
            "stage": stage.state_dict() if stage is not None else None,
            "telemetry": self.telemetry.state_dict(),
            "bad_records": self.bad_records.state_dict(),
        }
        tensors = stage.optimizer.state_tensors() if stage is not None else {}
        self.progress.phase("checkpoint")
        path = self.checkpoints.save(self.state["global_step"], save_model, tensors, state)
        self._write_run()
        return path

    def _write_run(self) -> None:
        names = [START, *self.config.curriculum]
        stages = [
            {
                "name": name,
                "kind": "evaluation" if name == START else self.config.stages[name].kind,
                "seconds": self.state["seconds"][name],
                "steps": self.state["steps"][name],
                "skipped_steps": self.state["skipped"].get(name, 0),
                "finished": name == START or self.config.curriculum.index(name) < self.state["stage"],
            }
            for name in names
            if name in self.state["seconds"]
        ]
        run = {
            "config": self._config_tree(),
            "versions": versions(),
            "device": device_name(self.config.model.device),
            "header": self.header,
            "stages": stages,
            "bad_records": self.bad_records.counts,
            "total_seconds": sum(self.state["seconds"].values()),
        }
        temporary = self.dir / ".run.json.writing"
        temporary.write_text(json.dumps(run, indent=1))
        temporary.replace(self.dir / "run.json")

    def _report(self) -> tuple[Path, Path]:
        self._write_run()
        return write_report(self.dir)

    # -- signals

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) lets the step finish and saves; the second stops at once."""

        def handle(signum: int, frame: FrameType | None) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            self.progress.message("stopping: this step is finished and saved first; once more to stop at once")

        signals = (signal.SIGINT, signal.SIGTERM)
        previous = [signal.signal(s, handle) for s in signals]
        try:
            yield
        finally:
            for s, old in zip(signals, previous, strict=True):
                signal.signal(s, old)


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines for every setting that a resumed run has changed."""
    lines = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"changed since the run began: {prefix}{key}: {old!r} -> {new!r}")
    return lines
