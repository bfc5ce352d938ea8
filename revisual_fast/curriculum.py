"""Runs the stages of a configuration in order, with evaluation, checkpoints and exact resumption."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from revisual_fast.checkpoint import Checkpoints, write_atomically
from revisual_fast.config import Config, GRPOConfig
from revisual_fast.data.processor import Processor
from revisual_fast.data.records import BadRecordError, BadRecords
from revisual_fast.distributed import joined, world
from revisual_fast.evaluate import evaluate
from revisual_fast.policy.init import build
from revisual_fast.policy.load import check_model_path, export_model, load_policy
from revisual_fast.policy.model import Policy
from revisual_fast.preflight import check_resumed, check_settings, check_stages, header, load_records, prepare_torch
from revisual_fast.ranges import ranged, span
from revisual_fast.rollout.build import EngineRoom
from revisual_fast.rollout.engine import EngineError, NonFiniteLogits
from revisual_fast.rollout.session import EngineSession
from revisual_fast.run_dir import RunDir
from revisual_fast.seeds import seed_for
from revisual_fast.stages.grpo import GRPOStage
from revisual_fast.stages.sft import SFTStage
from revisual_fast.stages.stage import NonFiniteError, Stage, StageContext
from revisual_fast.stop import StopRequest, over
from revisual_fast.telemetry import Progress, Telemetry, write_report
from revisual_fast.telemetry.report import START

__all__ = ["Curriculum", "EngineError", "Interrupted", "NonFiniteError", "OutOfTime", "train"]


class Interrupted(Exception):
    """The run was asked to stop and has saved itself; the message names the checkpoint."""


class OutOfTime(Interrupted):
    """It stopped because ``run.max_minutes`` are over."""


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Run the whole curriculum of ``config`` and return the path of ``report.html``.

    Raises :class:`Interrupted` after Ctrl-C, :class:`OutOfTime` after ``run.max_minutes``, :class:`NonFiniteError` when
    too many updates in a row had a non-finite loss or gradient, EngineError where the engine could not go on before
    there was anything to save, ValueError for anything that the configuration or the data got wrong, or (the run is
    saved) an engine that could not go on later.
    In processes that torchrun started, the run is theirs together (:mod:`revisual_fast.distributed`).
    """
    with joined() as ranks:
        try:
            with Curriculum(config, resume=resume, overwrite=overwrite) as curriculum:
                return curriculum.run()
        except Interrupted:
            ranks.wait()  # torchrun ends those that are left when one has gone with an exit code
            raise


class Curriculum:
    """One run in ``config.run.dir``.

    Every stage starts from a model on disk: the configured one, then the result of the stage before. ``state`` (with
    the stage's own) is all that a checkpoint needs besides model, optimizer and the lengths of the metric files. Among
    several ranks all go the same way, and the main one writes.
    """

    def __init__(self, config: Config, *, resume: bool, overwrite: bool):
        self.config = config
        self.ranks = world()
        self.run_dir = RunDir(config, resume=resume, overwrite=overwrite)
        self.checkpoints = Checkpoints(self.run_dir.path, config.checkpoint.keep)
        self.progress = Progress(config.telemetry.progress) if self.ranks.main else Progress.silent()
        self.stop = StopRequest()
        self.stopping = False  # some rank was asked to stop, and all know it
        self.bad_records = BadRecords()
        self.state: dict[str, Any] = {"stage": 0, "global_step": 0, "seconds": {}, "steps": {}, "skipped": {}}
        self.resume = resume
        self.resumed_from: Path | None = None
        self.stage_state: dict[str, Any] | None = None  # of the stage that the checkpoint was written in
        self.telemetry: Telemetry | None = None
        self.room: EngineRoom | None = None

    def __enter__(self) -> Curriculum:
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.close()
        if self.room is not None:
            self.room.close()
        if self.telemetry is not None:
            self.telemetry.close()

    def run(self) -> Path:
        """All stages that are not done yet; returns the path of the report."""
        with self.stop:
            self.start()
            if self.resumed_from is None:
                self._evaluate_start()
            while self.state["stage"] < len(self.config.curriculum):
                name = self.config.curriculum[self.state["stage"]]
                with span(f"stage {name}"):
                    self._run_stage(name)
                    if self.state["stage"] == len(self.config.curriculum):
                        break
                    if self._has_to_stop():
                        raise self._stopped(f"{name}, which is finished", self.checkpoints.latest())
                    self._report()
        return self._report()

    # -- set-up

    def start(self) -> None:
        """What happens once, before the first stage. Whatever is wrong with a later stage comes to light here."""
        prepare_torch(self.config.run)
        self.changes = self.run_dir.changed_settings() if self.resume else []
        self.attention, self.layers = check_settings(self.config)
        self.records = load_records(self.config, self.bad_records)
        self.ranks.wait()  # until all have looked at the folder as it was
        if not self.ranks.main:
            self.ranks.wait()  # for the claim
            self._open()
            return
        self.run_dir.claim()
        try:
            self.ranks.wait()
            self._open()
        except BaseException:
            self.run_dir.give_up()
            raise
        self.run_dir.confirm()

    def _open(self) -> None:
        """Model, checkpoint, telemetry, header."""
        model, path = self.config.model, self.config.start_model
        if model.init is not None and not Path(path).exists() and self.ranks.main:
            for line in build(model.init, path, seed=self.config.run.seed):
                self.progress.message(line)
        self.ranks.wait()
        check_model_path(path)
        self.processor = Processor(path, self.config.chat, min_pixels=model.min_pixels, max_pixels=model.max_pixels)
        check_stages(self.config, self.processor)
        every = [record for records in self.records.values() for record in records]
        log = "vllm.log" if self.ranks.main else f"vllm.{self.ranks.rank}.log"
        self.room = EngineRoom(self.config, self.processor, every, self.run_dir.path / log)
        telemetry_state = self._restore() if self.resume else None
        if self.ranks.main:
            self.telemetry = Telemetry(
                self.run_dir.path, self.config.telemetry, self.run_dir.path.name, resume_from=telemetry_state
            )
        engines = [self.attention, self.room.describe(), self.layers]
        self.header = header(self.config, self.records, self.bad_records, engines)
        if self.resume:
            self.header.append(f"resumed from {self.resumed_from or 'the beginning: there is no checkpoint yet'}")
        self.header += self.changes
        for line in self.header:
            self.progress.message(line)
        self._write_run()
        self.ranks.wait()  # a start that fails on one rank is confirmed on none

    def _restore(self) -> dict[str, Any] | None:
        """Go back to the newest checkpoint, if there is one; returns telemetry's part of it."""
        if self.ranks.main:
            self.checkpoints.recover()
        self.ranks.wait()
        self.resumed_from = self.checkpoints.latest()
        if self.resumed_from is None:
            return None
        self.tensors, saved = self.checkpoints.load(self.resumed_from)
        self.state, self.stage_state = saved["run"], saved["stage"]
        self.bad_records.load_state_dict(saved["bad_records"])
        check_resumed(self.config, saved, self.changes)
        if self._out_of_time() and self.state["stage"] < len(self.config.curriculum):
            raise ValueError(
                f"--resume: the run has taken {self._seconds() / 60:.1f} of its {self.config.run.max_minutes:g} "
                "minutes: give it more with --set run.max_minutes=..."
            )
        return saved["telemetry"]

    # -- the stages

    def _evaluate_start(self) -> None:
        began = time.perf_counter()
        self._evaluate(load_policy(self.config.start_model, self.config.model), START, 0, "heldout")
        self._note(START, time.perf_counter() - began, 0, 0)

    def _run_stage(self, name: str) -> None:
        began = time.perf_counter() - self.state["seconds"].get(name, 0.0)
        stage = self.build_stage(name)
        self.progress.message(f"{name}: {stage.describe()}")
        self.progress.stage(name, stage.total_steps, stage.steps, self._seconds_left(name))
        try:
            self._steps(name, stage, began)
            self._evaluate(stage.policy, name, stage.steps, "heldout")
        except NonFiniteLogits as error:
            raise self._diverged(name, stage, error) from None
        except EngineError as error:
            raise self._saved(error, stage) from error
        if self.ranks.main:
            write_atomically(self.run_dir.model(name), lambda folder: self._export(stage.policy, folder))
        self.ranks.wait()
        self._note(name, time.perf_counter() - began, stage.steps, stage.skipped)
        self.state["stage"] += 1
        self._save(stage.policy, None)

    def _steps(self, name: str, stage: Stage, began: float) -> None:
        limit = self.config.stages[name].max_minutes
        while stage.steps < stage.total_steps and not over(limit, self.state["seconds"].get(name, 0.0)):
            self._train_step(name, stage)
            self._note(name, time.perf_counter() - began, stage.steps, stage.skipped)
            if self._has_to_stop():
                raise self._stopped(f"{name} step {stage.steps}", self._save(stage.policy, stage))
            if stage.steps % self.config.checkpoint.every == 0 and stage.steps < stage.total_steps:
                self._save(stage.policy, stage)
        if stage.steps < stage.total_steps:
            stage.settle()  # the next step's rollouts may be under way
            self.progress.message(
                f"{name}: ends after step {stage.steps} of {stage.total_steps}: its {limit:g} minutes are over"
            )

    # -- when to stop

    def _has_to_stop(self) -> bool:
        self.stopping = self.ranks.any(self.stop.requested)
        return self.stopping or self._out_of_time()

    def _out_of_time(self) -> bool:
        return over(self.config.run.max_minutes, self._seconds())

    def _seconds(self) -> float:
        """What training and evaluation have taken so far."""
        return sum(self.state["seconds"].values())

    def _seconds_left(self, name: str) -> float | None:
        """What the limits of time leave to a stage, if there are any."""
        limits = [
            (self.config.stages[name].max_minutes, self.state["seconds"].get(name, 0.0)),
            (self.config.run.max_minutes, self._seconds()),
        ]
        return min((60 * minutes - seconds for minutes, seconds in limits if minutes is not None), default=None)

    def _stopped(self, place: str, saved: Path | None) -> Interrupted:
        """What to raise where the run stops, after ``place``."""
        self._report()
        if self.stopping:
            return Interrupted(f"stopped after {place}; saved {saved}; continue with --resume")
        return OutOfTime(
            f"stopped after {place}: run.max_minutes ({self.config.run.max_minutes:g}) are over; saved {saved}; "
            "continue with --resume --set run.max_minutes=..."
        )

    def _note(self, name: str, seconds: float, steps: int, skipped: int) -> None:
        seconds = self.ranks.agree(seconds)  # limits of time are reached by all ranks at once
        for key, value in (("seconds", seconds), ("steps", steps), ("skipped", skipped)):
            self.state[key][name] = value

    def _train_step(self, name: str, stage: Stage) -> None:
        before = stage.state_dict()
        try:
            metrics = stage.run_step()
        except NonFiniteLogits as error:
            raise self._diverged(name, stage, error) from None
        except (BadRecordError, EngineError) as error:
            stage.load_state_dict(before)
            raise self._saved(error, stage) from None
        except NonFiniteError as error:
            raise self._diverged(name, stage, error) from None
        self.state["global_step"] += 1
        place = {"stage": name, "step": stage.steps, "global_step": self.state["global_step"]}
        self.progress.update({**place, **metrics})
        if self.telemetry is not None:
            self._record(place, metrics, stage)
        every = self.config.evaluation.every
        if every is not None and stage.steps % every == 0:
            stage.settle()  # the engine does one thing at a time
            self._evaluate(stage.policy, name, stage.steps, "validation")

    def _diverged(self, name: str, stage: Stage, error: Exception) -> NonFiniteError:
        """What to raise in place of ``error``; nothing is saved, since these weights are of no use."""
        good = self.checkpoints.latest() or "none yet"
        return NonFiniteError(f"stage {name}, step {stage.steps + 1}: {error}; last good checkpoint: {good}")

    def _saved(self, error: Exception, stage: Stage) -> ValueError:
        """The run is saved where it is; what to raise in place of ``error``."""
        return ValueError(f"{error}\nsaved {self._save(stage.policy, stage)}; continue with --resume")

    def _record(self, place: dict[str, Any], metrics: dict[str, Any], stage: Stage) -> None:
        assert self.telemetry is not None
        self.telemetry.step({**place, **metrics})
        if not isinstance(stage, GRPOStage) or (stage.steps - 1) % self.config.telemetry.samples_every:
            return
        assert stage.last_sample is not None
        record, completions = stage.last_sample
        sample = {**place, "prompt": record.prompt, "answer": record.answer, "source": record.source}
        images = {image.key: image.open() for image in record.images}
        self.telemetry.sample({**sample, "completions": completions}, images)

    @ranged("evaluate")
    def _evaluate(self, policy: Policy, stage: str, step: int, kind: str) -> None:
        session = self._session(policy)
        for name, dataset in getattr(self.config.evaluation, kind).items():
            self.progress.phase(f"evaluate {name}")
            with session.use(policy, step) as engine:
                result = evaluate(self.records[dataset], self.config, engine, self.processor, self.bad_records)
            place = {"stage": stage, "step": step, "global_step": self.state["global_step"]}
            if self.telemetry is not None:
                self.telemetry.evaluation({**place, "kind": kind, "name": name, **result})
            if kind == "heldout":
                self.progress.message(f"{stage}: held-out {name} accuracy {result['accuracy']:.3f} (n = {result['n']})")

    # -- a stage and its model

    @ranged("load")
    def build_stage(self, name: str) -> Stage:
        """The current stage, at its start or where the checkpoint left it."""
        stage, midway = self.config.stages[name], self.stage_state
        done = self.config.curriculum[: self.state["stage"]]
        source = self.run_dir.model(done[-1]) if done else Path(self.config.start_model)
        torch.manual_seed(seed_for(self.config.run.seed, name, "init"))
        policy = self._stage_policy(source)
        records = [record for dataset in stage.data for record in self.records[dataset]]
        context = StageContext(name, self.config, policy, self.processor, records, self.bad_records, self.progress)
        built: Stage
        if isinstance(stage, GRPOConfig):
            built = GRPOStage(context, stage, self._session(policy), self._reference(stage, source, policy))
        else:
            built = SFTStage(context, stage)
        if midway is not None:
            built.load_saved(midway, self.tensors)
        self.stage_state = None  # later stages start at their beginning
        return built

    def _stage_policy(self, source: Path) -> Policy:
        if self.stage_state is None or self.resumed_from is None:
            return load_policy(source, self.config.model)
        saved = self.resumed_from / "model"
        if self.config.model.lora is not None:
            return load_policy(source, self.config.model, adapter=saved)
        return load_policy(saved, self.config.model)

    def _reference(self, stage: GRPOConfig, source: Path, policy: Policy) -> Policy | None:
        """The stage's starting model, frozen, where the objective has a KL term; LoRA's base is that model already."""
        if stage.objective.kl_coef == 0:
            return None
        if self.config.model.lora is not None:
            return policy
        reference = load_policy(source, self.config.model)
        reference.model.requires_grad_(False)
        return reference

    def _session(self, policy: Policy) -> EngineSession:
        assert self.room is not None
        return self.room.session(policy)

    @ranged("export")
    def _export(self, policy: Policy, folder: Path) -> None:
        export_model(policy, folder)
        self.processor.save(folder)

    # -- state on disk

    def _save(self, policy: Policy, stage: Stage | None) -> Path:
        """A checkpoint in the middle of ``stage``, or (None) between two stages."""

        def save_model(folder: Path) -> None:
            if stage is None:
                self._export(policy, folder)
            else:
                policy.model.save_pretrained(folder)  # with LoRA: the adapter
                self.processor.save(folder)

        self.progress.phase("checkpoint")
        place, tensors = stage.saved() if stage is not None else (None, {})
        tensors = self.ranks.collect(tensors)
        if self.telemetry is None:
            self.ranks.wait()  # for the main rank to write
            return self.checkpoints.path(self.state["global_step"])
        state = {
            "run": self.state,
            "curriculum": self.config.curriculum,
            "stage": place,
            "telemetry": self.telemetry.state_dict(),
            "bad_records": self.bad_records.state_dict(),
        }
        path = self.checkpoints.save(self.state["global_step"], save_model, tensors, state)
        self._write_run()
        self.ranks.wait()
        return path

    def _write_run(self) -> None:
        if self.ranks.main:
            self.run_dir.write(self.state, self.header, self.bad_records.counts)

    @ranged("report")
    def _report(self) -> Path:
        self._write_run()
        if not self.ranks.main:
            return self.run_dir.path / "report.html"
        return write_report(self.run_dir.path, plots=self.config.telemetry.plots)[1]
