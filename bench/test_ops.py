"""``pytest bench --benchmark-only``: the variants of every op at small shapes, each checked before it is timed.

pytest-benchmark times one variant after the other, not interleaved: good for a first look, and with
``--benchmark-autosave --benchmark-compare`` between commits. RESULTS.md comes from ``python -m bench``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from bench.checks import Outputs, allowed_errors, errors_of, recompile_limit_is_an_error
from bench.harness import Call, Problem, Variant
from bench.problems import OPS, cases

pytest.importorskip("pytest_benchmark", reason="needs the bench extra: pip install -e '.[bench]'")

SUITE = "gpu" if torch.cuda.is_available() else "cpu"
SHAPE = {"cpu": (128, 64, 4096), "gpu": (2048, 2048, 32768)}[SUITE]
CASES = {f"{case.op}-{case.dtype}": case for case in cases(SUITE, shape=SHAPE)}


@cache
def problem_of(name: str) -> Problem:
    return OPS[CASES[name].op](CASES[name])


@cache
def answer_of(name: str) -> Outputs:
    return problem_of(name).reference()


@cache
def plain_errors(name: str, variant: str) -> dict[str, float]:
    (plain,) = (v for v in problem_of(name).variants if v.name == variant)
    return errors_of(ready(plain).run(), answer_of(name))


def ready(variant: Variant) -> Call:
    assert variant.setup is not None
    call = variant.setup()
    if call.reset:
        call.reset()
    return call


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Else the variants count as recompilations of each other, and beyond the limit eager torch would be timed."""
    torch.compiler.reset()
    with recompile_limit_is_an_error():
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [(name, variant) for name in CASES for variant in problem_of(name).variants]
    metafunc.parametrize(("name", "variant"), pairs, ids=[f"{name}-{variant.name}" for name, variant in pairs])


def test_op(name: str, variant: Variant, benchmark: Any) -> None:
    if variant.setup is None:
        pytest.skip(variant.reason)
    call = ready(variant)
    errors = errors_of(call.run(), answer_of(name))
    allowed = allowed_errors(list(errors), *(plain_errors(name, by) for by in variant.yardsticks))
    wrong = {key: error for key, error in errors.items() if not error <= allowed[key]}
    if wrong and variant.role != "ours":
        pytest.skip(f"not timed, its error is above {allowed}: {wrong}")
    assert not wrong, f"above {allowed}"
    benchmark.group = name

    def run() -> None:
        call.run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def reset() -> None:
        if call.reset:
            call.reset()

    benchmark.pedantic(run, setup=reset, rounds=5, warmup_rounds=1)
