r"""Whether a completion is right: the answer is taken from the text, then compared as the record's verifier says.

math     equal texts, numbers, or expressions (math-verify)
choice   the letter of the right option, or its text or value
exact    equal texts, up to case, spaces, ``\text{}`` and a final full stop
number   equal numbers; units after the number are ignored

A percentage equals its share and its bare number (``50%``, ``0.5`` and ``50`` where the other side is the percentage),
as in math-verify. Numbers that are not integers may differ by one part in a million.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from revisual_fast.rewards.symbolic import symbolically_equal

if TYPE_CHECKING:
    from revisual_fast.data.records import Record
    from revisual_fast.rewards import Completion

__all__ = ["accuracy", "boxed", "extract_answer", "is_correct"]

MAX_ANSWER = 512
"""Characters; a longer answer is right only if its text equals the gold answer's."""

_BRACES = re.compile(r"\\boxed\s*\{|\\\\(?!boxed)|\\?[{}]")
_ANSWER_IS = re.compile(r"answer\s+is\b\s*:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|\.(?:\s|$)")
_STYLED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[;: ]|\\q?quad(?![a-z])|~")
_INNER_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_NUMBER = re.compile(r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)
_LATEX_FRACTION = re.compile(r"([+-]?)\\frac(?:\{([^{}]+)\}\{([^{}]+)\}|(\d)(\d))", re.ASCII)
_UNITS = re.compile(r"\s+[^\W\d_][^\d\\{}^_+*/=<>]*$")
_LETTER = re.compile(r"(?:option\s+|choice\s+)?(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z])(?=[.:)]|$))", re.IGNORECASE)


def accuracy(completions: Sequence[Completion]) -> list[float]:
    """1.0 for a right answer, 0.0 for a wrong one. Raises ValueError for a record without an answer."""
    return [float(is_correct(completion.text, completion.record)) for completion in completions]


def is_correct(text: str, record: Record) -> bool:
    """Whether the completion ``text`` answers ``record``; a text without an answer does not."""
    if record.answer is None:
        raise ValueError(f"{record.source}: no answer to compare with; set data.{record.dataset}.answer")
    answer = extract_answer(text)
    if answer is None:
        return False
    if len(answer) > MAX_ANSWER:
        return answer == record.answer
    if record.verifier == "choice":
        return _choice_equal(record.answer, answer, record.options)
    return {"math": _math_equal, "exact": _exact_equal, "number": _number_equal}[record.verifier](record.answer, answer)


def extract_answer(text: str) -> str | None:
    r"""What stands in the last complete ``\boxed{}``, else after the last "answer is" up to the end of the sentence."""
    boxes = boxed(text)
    if boxes:
        return boxes[-1].strip()
    phrases = list(_ANSWER_IS.finditer(text))
    if not phrases:
        return None
    sentence = _SENTENCE_END.split(text[phrases[-1].end() :].lstrip(" *:"), maxsplit=1)[0]
    return sentence.strip(" *") or None


def boxed(text: str) -> list[str]:
    r"""What stands in each ``\boxed{}`` with balanced braces, in the order in which they begin; takes one pass."""
    spans: list[tuple[int, int]] = []
    open_braces: list[int | None] = []  # where a box's content begins; None for any other brace
    for match in _BRACES.finditer(text):
        if match[0].startswith(r"\boxed"):
            open_braces.append(match.end())
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0] == "}" and open_braces:
            begin = open_braces.pop()
            if begin is not None:
                spans.append((begin, match.start()))
    return [text[begin:end] for begin, end in sorted(spans)]


def _math_equal(gold: str, answer: str) -> bool:
    """Text and numbers decide where they can; they are a thousand times faster than symbols."""
    if _text_equal(gold, answer):
        return True
    numbers = _parse_number(_tidy(gold)), _parse_number(_tidy(answer))
    if numbers[0] is not None and numbers[1] is not None:
        return _close(numbers[0], numbers[1])
    words = _tidy(gold).split()
    if all(map(str.isalpha, words)) and any(len(word) > 2 for word in words):
        return _exact_equal(gold, answer)  # as products of symbols, "parallel" and "rapallel" would be equal
    return bool(_tidy(answer)) and symbolically_equal(gold, answer)


def _exact_equal(gold: str, answer: str) -> bool:
    words = _tidy(answer).casefold().split()
    return bool(words) and words == _tidy(gold).casefold().split()


def _number_equal(gold: str, answer: str) -> bool:
    numbers = [_parse_number(_UNITS.sub("", _tidy(text))) for text in (gold, answer)]
    return numbers[0] is not None and numbers[1] is not None and _close(numbers[0], numbers[1])


def _choice_equal(gold: str, answer: str, options: tuple[str, ...]) -> bool:
    """A gold answer that equals an option's text means that option; otherwise it is a letter.

    Without options a gold letter is compared with the answer's letter, and anything else as math.
    """
    right = options.index(gold) if gold in options else _letter(gold, len(options))
    chosen = _letter(answer, len(options))
    if chosen is not None and chosen == right:
        return True
    value = options[right] if options and right is not None else gold
    return _text_equal(value, answer) or (chosen is None and _math_equal(value, answer))


def _letter(text: str, options: int) -> int | None:
    """The place (from 0) of the option meant by ``A``, ``(a)``, ``B.``, ``C) 12``, ``Option D``."""
    match = _LETTER.match(_tidy(text))
    if match is None:
        return None
    place = ord(next(filter(None, match.groups())).upper()) - ord("A")
    return place if place < (options or 26) else None


def _text_equal(gold: str, answer: str) -> bool:
    """Equal but for marks and spaces; a space between digits counts (``2 1/2`` is not ``21/2``)."""
    gold, answer = (_INNER_SPACE.sub("", _tidy(text)) for text in (gold, answer))
    return bool(gold) and gold == answer


def _tidy(text: str) -> str:
    """Without the marks that change how an expression looks and not what it says."""
    text = _STYLED.sub(r" \1 ", text)
    text = text.replace(r"\$", "").replace("$", "").replace(r"\%", "%").replace("°", "")
    text = text.replace(r"^{\circ}", "").replace(r"^\circ", "").replace("−", "-")
    text = re.sub(r"\\[dt]frac", r"\\frac", _SPACING.sub(" ", text.replace(r"\,", "").replace(r"\!", "")))
    return text.strip().removesuffix(".").strip(" \"'")


def _parse_number(text: str) -> tuple[Fraction, bool] | None:
    """A number and whether it is a percentage: ``-1,234.50``, ``3/4``, ``\\frac{3}{4}``, ``50%``, ``1e-3``."""
    percent = text.endswith("%")
    text = _INNER_SPACE.sub("", text.removesuffix("%").strip())
    latex = _LATEX_FRACTION.fullmatch(text)
    sign, *parts = [part for part in latex.groups() if part is not None] if latex else ["", *text.split("/")]
    if len(parts) > 2 or not all(map(_NUMBER.fullmatch, parts)):
        return None
    top, *bottom = (Fraction(part.replace(",", "").removesuffix(".")) for part in parts)
    if bottom == [0]:
        return None
    value = top / bottom[0] if bottom else top
    return (-value if sign == "-" else value), percent


def _close(gold: tuple[Fraction, bool], answer: tuple[Fraction, bool]) -> bool:
    (a, a_percent), (b, b_percent) = gold, answer
    if a_percent != b_percent and _near(a, b):
        return True
    return _near(a / 100 if a_percent else a, b / 100 if b_percent else b)


def _near(a: Fraction, b: Fraction) -> bool:
    if a.denominator == b.denominator == 1:
        return a == b
    return abs(a - b) <= Fraction(1, 10**6) * max(abs(a), abs(b))
