"""The quickstart's data: true answers, disjoint splits, the same records for the same arguments."""

import re
import sys
from collections import Counter

import pytest

from revisual_fast.config import RewardConfig
from revisual_fast.data import digits
from revisual_fast.data.records import Record
from revisual_fast.rewards import Completion, Rewards

MAKERS = [digits.questions, digits.additions, digits.cold_start]
SHOWN = re.compile(r"<\|vision_start\|>(.)<\|vision_end\|>")


def pixels(image) -> bytes:
    return image.tobytes()


def labels_by_pixels(split: str) -> dict[bytes, int]:
    images, labels = digits.scans(split)
    return dict(zip(map(pixels, images), labels, strict=True))


def expected(task: str, shown: list[int]) -> int:
    if task == "compare":
        return max(shown)
    return sum(shown) if task == "add" else int("".join(map(str, shown)))


def boxed(response: str) -> str:
    return re.fullmatch(r"<think>.+</think>\\boxed\{(\d+)\}", response)[1]


@pytest.mark.parametrize("make", MAKERS)
def test_same_arguments_same_records(make):
    first, again = make("train", size=40, seed=5), make("train", size=40, seed=5)
    assert first == again
    assert make("train", size=10, seed=5) == first[:10]
    assert make("train", size=40, seed=6) != first
    assert make("validation", size=40, seed=5) != first


@pytest.mark.parametrize("make", MAKERS)
def test_bad_arguments_are_named(make):
    with pytest.raises(digits.DigitsError, match="split: 'test' is not one of train, validation, heldout"):
        make("test")
    with pytest.raises(digits.DigitsError, match="size: 0"):
        make("train", size=0)


def test_splits_share_no_scan():
    seen = [set(labels_by_pixels(split)) for split in digits.SPLITS]
    assert [len(digits.scans(split)[0]) for split in digits.SPLITS] == [1200, 200, 397]
    assert len(set.union(*seen)) == sum(map(len, seen)), "no two scans of different splits are equal"
    for split, size in digits.SPLITS.items():
        counts = Counter(digits.scans(split)[1])
        assert len(counts) == 10
        assert max(counts.values()) - min(counts.values()) <= max(2, 0.01 * size)


def test_scans_show_their_labels():
    sklearn = pytest.importorskip("sklearn.neighbors")
    (train, labels), (heldout, gold) = digits.scans("train"), digits.scans("heldout")
    assert {(image.size, image.mode) for image in train} == {((28, 28), "RGB")}
    neighbours = sklearn.KNeighborsClassifier(3).fit([list(pixels(i)[::3]) for i in train], labels)
    assert neighbours.score([list(pixels(i)[::3]) for i in heldout], gold) > 0.95


@pytest.mark.parametrize("split", list(digits.SPLITS))
def test_visual_answers_are_true(split):
    known = labels_by_pixels(split)
    for record in digits.questions(split, size=500):
        shown = [known[pixels(image)] for image in record["images"]]  # also: every image is of this split
        assert record["problem"].count("<image>") == len(shown) == (1 if record["task"] == "read" else 2)
        assert int(record["answer"]) == int(boxed(record["response"])) == expected(record["task"], shown)
        assert record["response"].startswith(f"<think>{', '.join(map(str, shown))}")
        if record["task"] == "compare":
            assert shown[0] != shown[1]


def test_visual_tasks_have_their_shares():
    counts = Counter(record["task"] for record in digits.questions(size=4000))
    assert {task: pytest.approx(share, abs=0.03) for task, share in digits.TASKS.items()} == {
        task: count / 4000 for task, count in counts.items()
    }


def test_splits_share_no_pair_of_summands():
    pairs = {split: set(digits.pairs(split)) for split in digits.SPLITS}
    assert sum(map(len, pairs.values())) == len(set.union(*pairs.values())) == 90 * 90
    assert all({(b, a) for a, b in own} == own for own in pairs.values()), "47 + 38 must not give away 38 + 47"
    for split, own in pairs.items():
        asked = [tuple(map(int, re.findall(r"\d+", r["problem"]))) for r in digits.additions(split, size=len(own))]
        assert set(asked) == own, "each pair once before any comes twice"


def test_additions_carry_correctly():
    carries = 0
    for record in digits.additions(size=1000):
        a, b = map(int, re.findall(r"\d+", record["problem"]))
        steps = re.findall(r"([\d +]+) = (\d+)", record["response"])
        assert len(steps) == 2
        assert all(sum(map(int, left.split("+"))) == int(right) for left, right in steps)
        assert ("carry 1" in record["response"]) == (a % 10 + b % 10 > 9)
        assert int(record["answer"]) == int(boxed(record["response"])) == a + b
        assert steps[1][1] + steps[0][1][-1] == record["answer"]
        carries += "carry" in record["response"]
    assert 350 < carries < 550


def test_cold_start_is_text_in_the_shape_of_the_visual_questions():
    records = digits.cold_start(size=4000)
    assert not any(record["images"] for record in records)
    asked = [record for record in records if record["task"] != "addition"]
    assert len(asked) / 4000 == pytest.approx(0.6, abs=0.03)
    visual = {record["problem"] for record in digits.questions(size=200)}
    assert {SHOWN.sub("<image>", record["problem"]) for record in asked} == visual
    summands = [tuple(map(int, re.findall(r"\d+", r["problem"]))) for r in records if r["task"] == "addition"]
    assert set(summands) <= set(digits.pairs("train"))

    hidden = [record for record in asked if SHOWN.search(record["problem"])[1] in digits.UNREADABLE]
    assert len(hidden) / len(asked) == pytest.approx(0.15, abs=0.03)
    for record in asked:
        named = [int(d) for d in re.match(r"<think>(\d)(?:, (\d))?", record["response"]).groups() if d]
        assert int(record["answer"]) == int(boxed(record["response"])) == expected(record["task"], named)
        if record not in hidden:
            assert [int(d) for d in SHOWN.findall(record["problem"])] == named
    guessed = Counter(record["answer"] for record in hidden if record["task"] == "read")
    assert len(guessed) == 10
    assert max(guessed.values()) < 0.25 * sum(guessed.values())


def test_cold_start_shares_can_be_set():
    assert {r["task"] for r in digits.cold_start(size=50, addition_share=1.0)} == {"addition"}
    shown = [SHOWN.findall(r["problem"]) for r in digits.cold_start(size=50, addition_share=0.0, unreadable_share=1.0)]
    assert all(c in digits.UNREADABLE for found in shown for c in found)
    with pytest.raises(digits.DigitsError, match=r"addition_share: 1\.5"):
        digits.cold_start(size=5, addition_share=1.5)


@pytest.mark.parametrize("make", MAKERS)
def test_the_number_verifier_agrees(make):
    def completion(text: str, answer: str) -> Completion:
        record = Record("", (), answer, None, "number", (), "digits[0]", "digits", {})
        return Completion(text=text, tokens=10, finished=True, record=record)

    rewards = Rewards({"accuracy": RewardConfig()}, max_response_tokens=32)
    records = make(size=100)
    right = rewards([completion(r["response"], r["answer"]) for r in records])
    wrong = rewards([completion(r["response"], str(int(r["answer"]) + 1)) for r in records])
    assert right.accuracy.min() == 1
    assert wrong.accuracy.max() == 0


def test_without_scikit_learn_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits.scans.cache_clear()
    with pytest.raises(digits.DigitsError, match="pip install scikit-learn"):
        digits.questions(size=1)
    assert digits.additions(size=1)
