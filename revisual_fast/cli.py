"""The command ``revisual-fast``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

INTERRUPTED = 130
OUT_OF_TIME = 124


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0, 1 for an error of the user's, 2 for bad usage, 130 after Ctrl-C, 124 where ``run.max_minutes`` are over.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.run is not _bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return int(options.run(options) or 0)
    except (ValueError, OSError) as error:
        print(f"revisual-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("revisual-fast: stopped", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="revisual-fast", description="A fast GRPO trainer for multimodal models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run the curriculum of a configuration")
    _with_config(train)
    start = train.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in run.dir exactly where it was saved")
    start.add_argument("--overwrite", action="store_true", help="delete the run in run.dir and start again")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="accuracy of a model on the configuration's held-out data")
    _with_config(evaluate)
    evaluate.add_argument("--model", metavar="DIR", help="the model to evaluate (default: the starting model)")
    evaluate.set_defaults(run=_evaluate)

    init = commands.add_parser("init", help="build a starting model from packages, without a download")
    init.add_argument("kind", choices=("tiny-vl", "smollm2-vl"))
    init.add_argument("directory", type=Path)
    init.set_defaults(run=_init)

    report = commands.add_parser("report", help="write a run's report.html, report.json, report.md and plots again")
    report.add_argument("directory", type=Path)
    report.set_defaults(run=_report)

    bench = commands.add_parser(
        "bench", help="time the fused ops against plain torch and other packages", add_help=False
    )
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser("doctor", help="versions, devices, backends, and what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


def _with_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, for example configs/quickstart.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting, for example train.max_steps=3",
    )


def _train(options: argparse.Namespace) -> int:
    from revisual_fast.config_file import load_config

    config = load_config(options.config, options.set)
    from revisual_fast.curriculum import EngineError, Interrupted, NonFiniteError, OutOfTime, train

    try:
        html = train(config, resume=options.resume, overwrite=options.overwrite)
    except Interrupted as stop:
        print(stop)
        return OUT_OF_TIME if isinstance(stop, OutOfTime) else INTERRUPTED
    except (NonFiniteError, EngineError) as error:
        print(f"revisual-fast: {error}", file=sys.stderr)
        return 1
    _say_where(html)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from revisual_fast.config_file import load_config

    config = load_config(options.config, options.set)
    from revisual_fast.distributed import joined
    from revisual_fast.evaluate import EngineError, evaluate_model

    try:
        with joined() as ranks:
            results = evaluate_model(config, options.model or config.start_model)
    except EngineError as error:
        print(f"revisual-fast: {error}", file=sys.stderr)
        return 1
    for name, result in results.items() if ranks.main else ():
        print(f"{name}: accuracy {result['accuracy']:.4f}, n {result['n']}, mean length {result['length_mean']:.1f}")
        for reason, count in result["bad_records"].items():
            print(f"{name}: bad records ({reason}): {count}")
    return 0


def _init(options: argparse.Namespace) -> int:
    from revisual_fast.policy.init import build

    print(*build(options.kind, options.directory), sep="\n")
    return 0


def _report(options: argparse.Namespace) -> int:
    from revisual_fast.telemetry import write_report

    _say_where(write_report(options.directory)[1])
    return 0


def _say_where(html: Path) -> None:
    files = {"report": html.name, "numbers": "report.json", "table": "report.md", "plots": "plots"}
    print(*(f"{what}: {html.parent / name}" for what, name in files.items()), sep="\n")


def _bench(options: argparse.Namespace) -> int:
    """The benchmarks are no part of the package: they run as a program of their own, which parses the arguments."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        raise ValueError(
            f"bench needs the repository's folder bench/, which is not part of an installed package, and {root} has "
            "none: clone the repository and install it with `pip install -e '.[bench]'`"
        )
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "bench", *options.rest]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode


def _doctor(options: argparse.Namespace) -> int:
    from revisual_fast.doctor import run_doctor

    return run_doctor()
