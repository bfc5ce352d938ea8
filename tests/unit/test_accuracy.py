"""Answers taken from completions and verified: what is right, what is wrong, and what would hang a verifier."""

import itertools
import signal
import sys
import time

import pytest

from revisual_fast.config import DatasetConfig
from revisual_fast.data import BadRecords, Record, load_dataset
from revisual_fast.rewards import symbolic
from revisual_fast.rewards.accuracy import extract_answer, is_correct


def record(answer="5", verifier="math", options=()):
    return Record("?", (), answer, None, verifier, options, "data.jsonl:1", "d", {})


def right(gold, answer, verifier="math", options=()):
    return is_correct(f"<think>...</think>\\boxed{{{answer}}}", record(gold, verifier, options))


# ---- taking the answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{3} no, \\boxed{ 4 }", "4"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} is it", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed {7}", "7"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{a \\\\} then }", "a \\\\"),
        ("\\\\boxed{8}", "8"),
        ("{ \\boxed{5}", "5"),
        ("\\boxed{12} so \\boxed{1", "12"),
        ("\\boxed{\\boxed{9}}", "9"),
        ("The answer is 3. No, the answer is: **3.5**.\nDone", "3.5"),
        ("The answer is \\boxed{1}; the answer is 2", "1"),
        ("The Answer is (B).", "(B)"),
        ("\\boxed{}", ""),
        ("\\boxed{5", None),
        ("it is 5", None),
        ("", None),
    ],
)
def test_where_the_answer_stands(text, answer):
    assert extract_answer(text) == answer


# ---- verifying it

MATH_RIGHT = [
    ("5", "5.0"),
    ("025", "25"),
    ("1/2", "0.5"),
    ("\\frac12", "\\dfrac{1}{2}"),
    ("0.5", "50\\%"),
    ("50", "50\\%"),
    ("10,\\!000", "10000"),
    ("18", "\\$18"),
    ("90^\\circ", "90"),
    ("\\text{Evelyn}", "evelyn"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
    ("x^2-1", "(x-1)(x+1)"),
    ("3\\sqrt{2}", "\\sqrt{18}"),
    ("5", "x=5"),
    ("5/2", "2\\frac{1}{2}"),
]
MATH_WRONG = [
    ("12", "21"),
    ("14", "15"),
    ("2", "2.01"),
    ("0.5", "5\\%"),
    ("21/2", "2 1/2"),
    ("5", "4, 5, 6"),
    ("5", ""),
    ("parallel", "rapallel"),
    ("even", "odd"),
    ("x^2-1", "x^2+1"),
]


@pytest.mark.parametrize(("gold", "answer"), MATH_RIGHT)
def test_math_right(gold, answer):
    assert right(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), MATH_WRONG)
def test_math_wrong(gold, answer):
    assert not right(gold, answer)


OPTIONS = ("green", "red", "4", "$90^{\\circ}$")


@pytest.mark.parametrize(
    ("gold", "answer", "options", "expected"),
    [
        ("B", "B", OPTIONS, True),
        ("B", "(b)", OPTIONS, True),
        ("B", "B.", OPTIONS, True),
        ("B", "B. red", OPTIONS, True),
        ("B", "\\text{Option B}", OPTIONS, True),
        ("B", "red", OPTIONS, True),
        ("red", "B", OPTIONS, True),
        ("red", "Red", OPTIONS, True),
        ("4", "C", OPTIONS, True),
        ("4", "4.0", OPTIONS, True),
        ("D", "90", OPTIONS, True),
        ("B", "A", OPTIONS, False),
        ("B", "green", OPTIONS, False),
        ("B", "A. red", OPTIONS, False),
        ("4", "B", OPTIONS, False),
        ("4", "D", OPTIONS, False),
        ("B", "AB", OPTIONS, False),
        ("B", "", OPTIONS, False),
        ("E", "F", ("A", "B", "D", "F", "G"), False),
        ("E", "G", ("A", "B", "D", "F", "G"), True),
        ("III", "III", ("I", "II", "III"), True),
        ("III", "I", ("I", "II", "III"), False),
        ("C", "(C)", (), True),
        ("C", "D", (), False),
        ("61", "61", (), True),
    ],
)
def test_choice(gold, answer, options, expected):
    assert right(gold, answer, "choice", options) is expected


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("New York", "new  york.", True),
        ("New York", "\\text{New York}", True),
        ("on", "no", False),
        ("4", "4.0", False),
        ("$", "", False),
    ],
)
def test_exact(gold, answer, expected):
    assert right(gold, answer, "exact") is expected


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("25", "025", True),
        ("1,000", "1000.00", True),
        ("18", "\\$18", True),
        ("18", "18\\text{ dollars}", True),
        ("0.75", "\\frac{3}{4}", True),
        ("-0.5", "-\\frac12", True),
        ("50", "50\\%", True),
        ("0.5", "50%", True),
        ("1000", "1e3", True),
        ("0.333333", "1/3", True),
        ("12", "21", False),
        ("50%", "5", False),
        ("1000000", "1000001", False),
        ("5", "-5", False),
        ("5", "5/0", False),
        ("5", "five", False),
        ("5", "4 5", False),
        ("5", "1e999999999", False),
    ],
)
def test_number(gold, answer, expected):
    assert right(gold, answer, "number") is expected


def test_without_an_answer_in_the_record_there_is_nothing_to_verify():
    with pytest.raises(ValueError, match=r"data\.jsonl:1: no answer .*data\.d\.answer"):
        right(None, "5")


# ---- completions that want to hang or crash the verifier


@pytest.fixture
def patience(monkeypatch):
    """A short limit on processor time, in a worker of its own."""
    worker = symbolic._Worker(cpu_seconds=0.5)
    monkeypatch.setattr(symbolic, "_worker", worker)
    symbolic.symbolically_equal.cache_clear()
    yield worker
    worker.close()
    symbolic.symbolically_equal.cache_clear()


@pytest.mark.parametrize("answer", ["9^{9^{9^9}}", "99999999!"])
def test_what_never_ends_is_wrong_and_the_next_answer_is_verified(patience, caplog, answer):
    assert right("\\sqrt{50}", "5\\sqrt{2}")  # the worker is warm
    start = time.monotonic()
    assert not right("5", answer)
    assert time.monotonic() - start < 30
    assert "counted as wrong" in caplog.text
    assert not right("5", answer)  # remembered
    assert caplog.text.count("counted as wrong") == 1
    assert right("\\sqrt{18}", "3\\sqrt{2}")


def test_a_worker_that_died_meanwhile_is_replaced(patience):
    assert right("\\sqrt{50}", "5\\sqrt{2}")
    assert "math_verify" not in sys.modules  # it is slow to import, and all its work is done over there
    patience._process.kill()
    patience._process.wait()
    assert right("\\sqrt{18}", "3\\sqrt{2}")


def test_an_interrupted_question_does_not_leave_its_verdict_for_the_next(patience):
    def interrupt(*_):
        raise KeyboardInterrupt

    assert right("\\sqrt{50}", "5\\sqrt{2}")
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            right("5", "9^{9^{9^9}}")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert patience._process is None
    assert right("\\sqrt{18}", "3\\sqrt{2}")


@pytest.mark.parametrize(
    "answer",
    ["\ud800", "\x00", "\\frac", "\\begin{matrix}", "^", "\\left(", "\\\\", "[[[", "\\sum_", "1/0", "∞", "\\input{x}"],
)
def test_strange_answers_are_wrong(answer):
    assert not right("5", answer)


def test_long_answers_are_not_parsed():
    assert not right("5", "+".join(["1"] * 400))
    assert right("x" * 600, "x" * 600)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 10000,
        "{\\boxed{" * 10000,
        "answer is " * 10000,
        "answer is" + " " * 80000 + "x",
        "\\boxed" + " " * 80000,
        "\\boxed{5" + " " * 80000 + "1}",
    ],
    ids=range(6),
)
@pytest.mark.parametrize("verifier", ["math", "number", "choice", "exact"])
def test_long_texts_take_linear_time(text, verifier):
    start = time.process_time()
    assert not is_correct(text, record("5", verifier))
    assert time.process_time() - start < 2


# ---- the real answers


def test_real_answers_equal_themselves_and_the_solutions_give_them(shared_data):
    config = DatasetConfig(path=str(shared_data / "text/math500.jsonl"))
    records = load_dataset("math500", config, BadRecords())
    assert all(is_correct(f"\\boxed{{{r.answer}}}", r) for r in records)
    assert all(is_correct(r.extra["solution"], r) for r in records)
    others = [(a, b.answer) for a, b in itertools.pairwise(records) if a.answer != b.answer]
    equal = [(a.answer, answer) for a, answer in others if is_correct(f"\\boxed{{{answer}}}", a)]
    assert equal == [("5", "x=5")]  # what a variable is found to be counts as its value


def test_real_puzzle_answers_are_right_by_letter_and_by_value_and_the_others_are_not(shared_data):
    config = DatasetConfig(
        path=str(shared_data / "puzzlevqa/data.jsonl"), prompt="{question}", options="options", verifier="choice"
    )
    for r in load_dataset("puzzles", config, BadRecords()):
        for letter, option in zip("ABCD", r.options, strict=False):
            expected = option == r.answer
            assert is_correct(f"\\boxed{{{letter}}}", r) is expected
            assert is_correct(f"\\boxed{{{option}}}", r) is expected
