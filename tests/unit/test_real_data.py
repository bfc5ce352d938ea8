"""The data sets of ../shared/data load as they are, each with a small configuration."""

from collections import Counter

import pytest

from revisual_fast.config import DatasetConfig
from revisual_fast.data import BadRecords, load_dataset
from revisual_fast.data.bad import EMPTY_ANSWER


def load(bad, config):
    return load_dataset("d", DatasetConfig(**config), bad)


GSM8K_REPLACE = [("<<.*?>>", ""), (r"\n#### [^<]*", "")]
REAL = {
    "gsm8k": (
        {
            "path": "text/gsm8k_train.jsonl",
            "response": "<think>{solution}</think>\\boxed{{{answer}}}",
            "replace": GSM8K_REPLACE,
            "verifier": "number",
        },
        7473,
        {},
    ),
    "math": ({"path": "text/math_train_rllm.jsonl", "on_bad_record": "skip"}, 7470, {EMPTY_ANSWER: 4}),
    "aime": ({"path": "text/aime_1983_2023_rllm.jsonl", "verifier": "number"}, 975, {}),
    "aime24 and 25": ({"path": "text/aime2?.jsonl", "verifier": "number"}, 60, {}),
    "math500": ({"path": "text/math500.jsonl"}, 500, {}),
    "puzzlevqa": (
        {
            "path": "puzzlevqa/data.jsonl",
            "images": "image",
            "options": "options",
            "prompt": "{question}\n{options}",
            "response": "<think>{caption} {explanation} {deduction}</think>\\boxed{{{answer}}}",
            "verifier": "choice",
        },
        1000,
        {},
    ),
    "mathvision": (
        {
            "path": "mathvision_testmini/data.jsonl",
            "images": "image",
            "options": "options",
            "prompt": "{question}\n{options}",
            "verifier": "choice",
        },
        304,
        {},
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_loads_as_it_is(shared_data, name):
    config, usable, counts = REAL[name]
    bad = BadRecords()
    records = load(bad, {**config, "path": str(shared_data / config["path"])})
    assert len(records) == usable
    assert bad.counts == counts
    for record in records:
        assert record.prompt.count("<image>") == len(record.images) == ("images" in config)
        assert record.answer
        assert (record.response is not None) == ("response" in config)


def test_real_gsm8k_responses_have_no_calculator_marks(shared_data):
    config = REAL["gsm8k"][0]
    first, *rest = load(BadRecords(), {**config, "path": str(shared_data / config["path"])})
    assert first.response == (
        "<think>Natalia sold 48/2 = 24 clips in May.\n"
        "Natalia sold 48+24 = 72 clips altogether in April and May.</think>\\boxed{72}"
    )
    assert not any("<<" in r.response or "####" in r.response for r in rest)


def test_real_puzzles_have_their_options_by_letter(shared_data):
    config = REAL["puzzlevqa"][0]
    records = load(BadRecords(), {**config, "path": str(shared_data / config["path"]), "limit": 20})
    assert records[0].prompt.endswith("question mark?\nA. 6\nB. 3\nC. 4\nD. 2")
    assert records[0].options == ("6", "3", "4", "2")
    assert Counter(ref.open().mode for r in records for ref in r.images) == {"RGB": 20}
