"""The built-in rewards of form and length, the user's own, and their sum; for accuracy see test_accuracy.py."""

import pytest
import torch

from revisual_fast.config import RewardConfig
from revisual_fast.data import Record
from revisual_fast.rewards import Completion, Rewards


def completion(text, tokens=10):
    record = Record("?", (), "5", None, "math", (), "data.jsonl:1", "d", {})
    return Completion(text, tokens, True, record)


def make(limit=1000, **components):
    return Rewards({name: RewardConfig(**c) for name, c in components.items()}, max_response_tokens=limit)


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


def test_length_follows_the_formula():
    rewards = make(accuracy={}, length={"args": {"budget": 500}})
    lengths = [1, 400, 401, 500, 560, 600, 1000]
    got = rewards([completion("", tokens=n) for n in lengths]).components["length"]
    torch.testing.assert_close(got, torch.tensor([1.0, 1.0, 0.995, 0.5, 0.2, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"budget": 500}, "1 up to 400 tokens, falling to 0 at 600"),
        ({"budget": 1000}, "1 up to 900 tokens, falling to 0 at 1100: moves only from 900 to 1000"),
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
        ({"accuracy": {}, "length": {}}, r"^rewards\.length\.args\.budget: give the number of tokens"),
        ({"accuracy": {}, "length": {"args": {"bugdet": 1}}}, r"^rewards\.length\.args\.budget: .*only 'bugdet'"),
        ({"accuracy": {}, "length": {"args": {"budget": 9, "x": 1}}}, r"rewards\.length\.args: .*'x'.*takes"),
        ({"accuracy": {}, "length": {"args": {"budget": 9, "alpha": 0}}}, r"rewards\.length\.args: .*alpha 0 must be"),
        ({"accuracy": {}, "length": {"args": {"budget": 9, "delta": "x"}}}, r"rewards\.length\.args: "),
        ({"accuracy": {"args": {"x": 1}}}, r"rewards\.accuracy\.args: .*'x'"),
        ({"accuracy": {}, "mine": {"function": "no/such.py:f"}}, r"rewards\.mine\.function: there is no file"),
    ],
)
def test_components_that_cannot_be_used(components, message):
    with pytest.raises(ValueError, match=message):
        make(**components)


@pytest.mark.parametrize(
    "components",
    [
        {"format": {}},
        {"accuracy": {}, "lenght": {}},
        {"accuracy": {}, "length": {}},
        {"accuracy": {}, "length": {"args": {"budget": 9, "alpha": 0}}},
        {"accuracy": {"args": {"x": 1}}},
        {"accuracy": {}, "mine": {"function": "no/such.py:f"}},
    ],
)
def test_messages_name_the_key_that_the_caller_gives(components):
    configs = {name: RewardConfig(**c) for name, c in components.items()}
    with pytest.raises(ValueError, match=r"^stages\.mrl\.rewards[.:]"):
        Rewards(configs, max_response_tokens=10, where="stages.mrl.rewards")
