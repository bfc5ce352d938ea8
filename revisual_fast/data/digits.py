"""Questions made from scikit-learn's 1,797 scanned handwritten digits, and arithmetic in text.

Three functions for ``data.<name>.function``: :func:`questions` (visual), :func:`additions` (text) and
:func:`cold_start` (text only: additions, and the visual questions with each image replaced by its digit). Each returns
dict records with ``problem``, ``answer``, ``response``, ``images`` (PIL, one per ``<image>``) and ``task``; the same
arguments give the same records, and a smaller ``size`` gives the first of them. The splits ``train``, ``validation``
and ``heldout`` share no scan and no pair of summands.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["SPLITS", "TASKS", "UNREADABLE", "DigitsError", "additions", "cold_start", "pairs", "questions", "scans"]

SPLITS = {"train": 1200, "validation": 200, "heldout": 397}
"""Split -> number of scans."""

TASKS = {"read": 0.4, "number": 0.2, "compare": 0.2, "add": 0.2}
"""Task -> share of the visual questions: read one digit, read two as a number, say which is larger, add two."""

UNREADABLE = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz#$%&*@^_|~"
"""Characters that stand, in text, for an image that nobody can read."""

SIDE = 28  # pixels: exactly one token of a Qwen2.5-VL vision tower (2 x 2 patches of 14)

Record = dict[str, Any]


class DigitsError(ValueError):
    """Arguments that make no data set, or a missing package."""


def questions(split: str = "train", size: int = 4096, seed: int = 0) -> list[Record]:
    """``size`` questions over one or two scans of ``split``, in the proportions of :data:`TASKS`."""
    _check(split, size)
    rng = random.Random(f"questions/{split}/{seed}")
    images, labels = scans(split)

    def draw(task: str) -> Record:
        chosen = [rng.randrange(len(labels)) for _ in range(1 if task == "read" else 2)]
        while task == "compare" and labels[chosen[0]] == labels[chosen[1]]:
            chosen[1] = rng.randrange(len(labels))
        record = _question(task, ["<image>"] * len(chosen), [labels[i] for i in chosen])
        return {**record, "images": [images[i] for i in chosen]}

    return [draw(task) for task in _tasks(rng, size)]


def additions(split: str = "train", size: int = 4096, seed: int = 0) -> list[Record]:
    """``size`` sums of two two-digit numbers, units first, the carry written out.

    Each pair of ``split`` comes once before any comes twice; a pair and its mirror image are in the same split.
    """
    _check(split, size)
    drawn = _shuffled_forever(pairs(split), random.Random(f"additions/{split}/{seed}"))
    return [_addition(a, b) for a, b in itertools.islice(drawn, size)]


def cold_start(
    split: str = "train", size: int = 8192, seed: int = 0, addition_share: float = 0.4, unreadable_share: float = 0.15
) -> list[Record]:
    """``size`` text records for supervised fine-tuning: the format, arithmetic, what to do with a digit once read.

    ``addition_share`` of them are :func:`additions`; the rest are the visual questions with ``<|vision_start|>``, the
    digit, ``<|vision_end|>`` where the image would be. In ``unreadable_share`` of these a character of
    :data:`UNREADABLE` stands for each digit and the digits in the response are random: the model learns to guess.
    """
    _check(split, size)
    for name, share in (("addition_share", addition_share), ("unreadable_share", unreadable_share)):
        if not 0 <= share <= 1:
            raise DigitsError(f"{name}: {share} must be between 0 and 1")
    rng = random.Random(f"cold_start/{split}/{seed}")
    sums = _shuffled_forever(pairs(split), rng)

    def draw(task: str) -> Record:
        if rng.random() < addition_share:
            return _addition(*next(sums))
        digits = rng.sample(range(10), 2) if task == "compare" else [rng.randrange(10) for _ in range(2)]
        digits = digits[: 1 if task == "read" else 2]
        hidden = rng.random() < unreadable_share
        shown = [rng.choice(UNREADABLE) if hidden else str(d) for d in digits]
        return _question(task, [f"<|vision_start|>{s}<|vision_end|>" for s in shown], digits)

    return [draw(task) for task in _tasks(rng, size)]


@functools.cache
def scans(split: str) -> tuple[list[Image.Image], list[int]]:
    """The scans of ``split`` (28 x 28, RGB, white on black) and the digits they show.

    The splits are drawn once and for all, with every digit in the same proportion in each. Raises
    :class:`DigitsError` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DigitsError("the scanned digits come with scikit-learn: pip install scikit-learn") from None
    pixels, labels = load_digits(return_X_y=True)  # [1797, 64] in 0..16, [1797]
    order = _stratified(labels.tolist())
    names = list(SPLITS)
    first = sum(SPLITS[name] for name in names[: names.index(split)])
    chosen = order[first : first + SPLITS[split]]
    return [_image(pixels[i]) for i in chosen], [int(labels[i]) for i in chosen]


@functools.cache
def pairs(split: str) -> list[tuple[int, int]]:
    """The ordered pairs of two-digit numbers of ``split``: about 80, 10 and 10 percent of all 8,100."""
    unordered = list(itertools.combinations_with_replacement(range(10, 100), 2))
    random.Random("pairs").shuffle(unordered)
    tenth = len(unordered) // 10
    bounds = {"heldout": (0, tenth), "validation": (tenth, 2 * tenth), "train": (2 * tenth, None)}
    start, stop = bounds[split]
    return sorted({pair for a, b in unordered[start:stop] for pair in ((a, b), (b, a))})


def _stratified(labels: Sequence[int]) -> list[int]:
    """A fixed shuffle of the indices in which every stretch has the labels in the same proportion."""
    rng = random.Random("scans")
    place: list[tuple[float, int]] = []
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        rng.shuffle(members)
        place += [((rank + rng.random()) / len(members), i) for rank, i in enumerate(members)]
    return [i for _, i in sorted(place)]


def _image(pixels: np.ndarray) -> Image.Image:
    grey = Image.fromarray((pixels.reshape(8, 8) * (255 / 16)).astype(np.uint8))
    return grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def _tasks(rng: random.Random, size: int) -> Iterator[str]:
    for _ in range(size):
        yield rng.choices(list(TASKS), weights=list(TASKS.values()))[0]


def _shuffled_forever(items: Sequence[tuple[int, int]], rng: random.Random) -> Iterator[tuple[int, int]]:
    while True:
        yield from rng.sample(items, len(items))


def _question(task: str, shown: list[str], digits: list[int]) -> Record:
    """``shown`` is what stands in the question for ``digits``; the response names the digits before it uses them."""
    first, last = shown[0], shown[-1]
    a, b = digits[0], digits[-1]
    if task == "read":
        return _record(task, f"Read {first}", str(a), str(a))
    if task == "number":
        return _record(task, f"Read {first}{last}", f"{a}, {b}", f"{a}{b}")
    if task == "compare":
        sign = ">" if a > b else "<"
        return _record(task, f"Which is larger, {first} or {last}?", f"{a}, {b}; {a} {sign} {b}", str(max(a, b)))
    return _record(task, f"{first} + {last} = ?", f"{a}, {b}; {a} + {b} = {a + b}", str(a + b))


def _addition(a: int, b: int) -> Record:
    units = a % 10 + b % 10
    thought = f"{a % 10} + {b % 10} = {units}"
    carried, plus = (", carry 1", " + 1") if units > 9 else ("", "")
    thought += f"{carried}; {a // 10} + {b // 10}{plus} = {a // 10 + b // 10 + units // 10}"
    return _record("addition", f"{a} + {b} = ?", thought, str(a + b))


def _record(task: str, problem: str, thought: str, answer: str) -> Record:
    response = f"<think>{thought}</think>\\boxed{{{answer}}}"
    return {"problem": problem, "answer": answer, "response": response, "images": [], "task": task}


def _check(split: str, size: int) -> None:
    if split not in SPLITS:
        raise DigitsError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    if size < 1:
        raise DigitsError(f"size: {size} must be at least 1")
