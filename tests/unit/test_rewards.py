"""Answers taken from completions and verified, the other built-in rewards, and the user's own."""

import time
from pathlib import Path

import pytest
import torch

from revisual_fast.config import DatasetConfig, RewardConfig
from revisual_fast.data import BadRecords, Record, load_dataset
from revisual_fast.rewards import Completion, Rewards, symbolic
from revisual_fast.rewards.accuracy import extract_answer, is_correct


def record(answer="5", verifier="math", options=()):
    return Record("?", (), answer, None, verifier, options, "data.jsonl:1", "d", {"answer": answer})


def completion(text, answer="5", tokens=10):
    return Completion(text, tokens, True, record(answer))


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
    patience._process.kill()
    patience._process.wait()
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


# ---- format and length


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think> so \\boxed{1}.", 1.0),
        ("<think>\\boxed{0}</think>\\boxed{\\frac{1}{2}}", 1.0),
        ("<think>a</think>\\boxed{1}\\boxed{2}", 0.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think>\\boxed{1", 0.0),
        ("\\boxed{1}<think>a</think>", 0.0),
        ("<think>a\\boxed{1}", 0.0),
        ("a</think>\\boxed{1}", 0.0),
        ("</think><think>\\boxed{1}", 0.0),
        ("<think>a</think><think>b</think>\\boxed{1}", 0.0),
        ("", 0.0),
    ],
)
def test_format(text, expected):
    rewards = make(accuracy={}, format={})
    assert rewards([completion(text)]).components["format"].tolist() == [expected]


def make(limit=1000, **components):
    return Rewards({name: RewardConfig(**c) for name, c in components.items()}, max_response_tokens=limit)


def test_length_follows_the_formula():
    rewards = make(accuracy={}, length={"args": {"budget": 500}})
    lengths = [1, 400, 401, 500, 560, 600, 1000]
    got = rewards([completion("", tokens=n) for n in lengths]).components["length"]
    torch.testing.assert_close(got, torch.tensor([1.0, 1.0, 0.995, 0.5, 0.2, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"budget": 500}, "1 up to 400 tokens, falling to 0 at 600"),
        ({}, "1 up to 900 tokens, falling to 0 at 1100: moves only from 900 to 1000"),
        ({"budget": 1100}, "1 up to 1000 tokens, falling to 0 at 1200: never moves"),
        ({"budget": 100, "alpha": 0.01, "delta": 1.0}, "1 up to 100 tokens, falling to 0 at 200"),
    ],
)
def test_the_header_says_where_the_length_reward_moves(args, text):
    header = make(accuracy={}, length={"weight": 0.2, "args": args}).header()
    assert header[0] == "reward accuracy: weight 1, built in"
    assert header[1].startswith("reward length: weight 0.2, built in; ")
    assert text in header[1]


# ---- components


def test_the_total_is_the_weighted_sum(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(completions, scale):\n    return [scale * c.tokens + float(c.record.answer) for c in completions]\n"
    )
    rewards = make(
        accuracy={"weight": 2.0},
        format={"weight": 0.5},
        mine={"weight": -1.0, "function": f"{tmp_path}/mine.py:score", "args": {"scale": 0.1}},
    )
    table = rewards([completion("<think></think>\\boxed{5}"), completion("\\boxed{4}", tokens=20)])
    assert list(table.components) == ["accuracy", "format", "mine"]
    torch.testing.assert_close(table.accuracy, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(table.components["mine"], torch.tensor([6.0, 7.0]))
    torch.testing.assert_close(table.total, torch.tensor([2.0 + 0.5 - 6.0, -7.0]))
    assert {v.dtype for v in [*table.components.values(), table.total]} == {torch.float32}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"reward mine .*bad\.py:score.*must return 2 numbers.*found \(1,\)"),
        ("return [1.0, float('nan')]", r"reward mine .*nan for a completion of data\.jsonl:1"),
        ("return [1.0, float('inf')]", r"reward mine .*inf"),
        ("return None", "reward mine .*must return a number for each completion"),
        ("return ['a', 'b']", "reward mine .*must return a number for each completion"),
        ("return [[1.0], [2.0]]", r"reward mine .*found \(2, 1\)"),
        ("return 1.0", r"reward mine .*found \(\)"),
    ],
)
def test_what_a_users_reward_returns_is_checked(tmp_path, body, message):
    (tmp_path / "bad.py").write_text(f"def score(completions):\n    {body}\n")
    rewards = make(accuracy={}, mine={"function": f"{tmp_path}/bad.py:score"})
    with pytest.raises(ValueError, match=message):
        rewards([completion("a"), completion("b")])


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({"format": {}}, "component named accuracy"),
        ({"accuracy": {}, "lenght": {}}, r"rewards\.lenght: .*did you mean 'length'.*function: file\.py:function"),
        ({"accuracy": {}, "length": {"args": {"bugdet": 1}}}, r"rewards\.length\.args: .*bugdet.*takes"),
        ({"accuracy": {}, "length": {"args": {"alpha": 0}}}, r"rewards\.length\.args: .*alpha 0 must be positive"),
        ({"accuracy": {}, "length": {"args": {"delta": "x"}}}, r"rewards\.length\.args"),
        ({"accuracy": {"args": {"x": 1}}}, r"rewards\.accuracy\.args: .*'x'"),
        ({"accuracy": {}, "mine": {"function": "no/such.py:f"}}, r"rewards\.mine\.function: there is no file"),
    ],
)
def test_components_that_cannot_be_used(components, message):
    with pytest.raises(ValueError, match=message):
        make(**components)


def test_importing_rewards_does_not_import_math_verify():
    import subprocess
    import sys

    code = "import sys, revisual_fast.rewards; sys.exit('math_verify' in sys.modules or 'sympy' in sys.modules)"
    # torch may import sympy itself; only math_verify would be ours
    code = "import sys, revisual_fast.rewards; sys.exit('math_verify' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


# ---- the real answers


def test_real_answers_equal_themselves_and_the_solutions_give_them(shared_data):
    config = DatasetConfig(path=str(shared_data / "text/math500.jsonl"))
    records = load_dataset("math500", config, BadRecords())
    assert all(is_correct(f"\\boxed{{{r.answer}}}", r) for r in records)
    assert all(is_correct(r.extra["solution"], r) for r in records)
    pairs = zip(records[:100], records[1:101], strict=True)
    wrong = [(a.answer, b.answer) for a, b in pairs if a.answer != b.answer and is_correct(f"\\boxed{{{b.answer}}}", a)]
    assert wrong == []


def test_real_puzzle_answers_are_right_by_letter_and_by_value_and_the_others_are_not(shared_data):
    config = DatasetConfig(
        path=str(shared_data / "puzzlevqa/data.jsonl"), prompt="{question}", options="options", verifier="choice"
    )
    for r in load_dataset("puzzles", config, BadRecords()):
        for letter, option in zip("ABCD", r.options, strict=False):
            expected = option == r.answer
            assert is_correct(f"\\boxed{{{letter}}}", r) is expected
            assert is_correct(f"\\boxed{{{option}}}", r) is expected
