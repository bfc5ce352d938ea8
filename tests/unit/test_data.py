"""Records from every source, templates, images, bad records, the sampler; for real data see test_real_data.py."""

import io
import json
import sys

import pytest
from PIL import Image

from revisual_fast.config import DatasetConfig
from revisual_fast.data import BadRecordError, BadRecords, ImageRef, Sampler, load_dataset
from revisual_fast.data.bad import (
    BROKEN_JSON,
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    EMPTY_RESPONSE,
    MISSING_FIELD,
    MISSING_IMAGE,
    PLACEHOLDERS,
    UNREADABLE_IMAGE,
    WRONG_TYPE,
)


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("not an image")
    return tmp_path


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return str(path)


def load(bad=None, **config):
    return load_dataset("d", DatasetConfig(**config), bad or BadRecords())


def one(folder, record, **config):
    return load(path=write(folder / "one.jsonl", record), **config)[0]


def png(colour="red", **kwargs):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, "PNG", **kwargs)
    return buffer.getvalue()


def colour(ref):
    return ref.open().getpixel((0, 0))


RED, BLUE = (255, 0, 0), (0, 0, 255)
QUESTION = {"problem": "1 + 1?", "answer": 2}


# ---- sources


def test_jsonl_keeps_the_order_and_names_the_line(folder):
    path = write(folder / "a.jsonl", QUESTION, "", {"problem": "b", "answer": "3"})
    first, second = load(path=path)
    assert (first.prompt, first.answer, first.source) == ("1 + 1?", "2", f"{path}:1")
    assert (second.answer, second.source) == ("3", f"{path}:3")
    assert first.dataset == "d"
    assert first.extra == QUESTION
    assert first.images == ()
    assert first.response is None


def test_json_globs_and_lists_of_files(folder):
    for name in ("b", "a"):
        (folder / f"{name}.json").write_text(json.dumps([{"problem": name, "answer": 1}]))
    assert [r.prompt for r in load(path=str(folder / "*.json"))] == ["a", "b"]
    records = load(path=[str(folder / "b.json"), str(folder / "a.json")])
    assert [r.source for r in records] == [f"{folder}/b.json[0]", f"{folder}/a.json[0]"]


def test_parquet_with_images_as_datasets_stores_them(folder):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [{**QUESTION, "image": {"bytes": png("blue"), "path": None}}, {**QUESTION, "image": {"path": "red.png"}}]
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), folder / "a.parquet")
    records = load(path=str(folder / "a.parquet"), images="image")
    assert [colour(r.images[0]) for r in records] == [BLUE, RED]
    assert records[1].source == f"{folder}/a.parquet[1]"
    assert "image" not in records[0].extra


def test_a_datasets_directory_keeps_images_encoded(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = {"problem": datasets.Value("string"), "answer": datasets.Value("int64"), "image": datasets.Image()}
    rows = {"problem": ["a"], "answer": [1], "image": [Image.new("RGB", (30, 20), "blue")]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(tmp_path / "set" / "train.parquet")
    (record,) = load(hub=str(tmp_path / "set"), images="image")
    assert isinstance(record.images[0].content, bytes)
    assert colour(record.images[0]) == BLUE
    with pytest.raises(ValueError, match=r"data\.d\.hub: .*nope"):
        load(hub=str(tmp_path / "set"), split="nope")


@pytest.mark.parametrize(
    ("package", "config"), [("datasets", {"hub": "x/y"}), ("pyarrow.parquet", {"path": "a.parquet"})]
)
def test_a_missing_package_says_what_to_install(folder, monkeypatch, package, config):
    (folder / "a.parquet").write_bytes(b"")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install .revisual-fast\[data\]"):
        load(**config)


def test_function_of_a_file(folder):
    (folder / "made.py").write_text(
        "from PIL import Image\n"
        "def make(n):\n"
        "    for i in range(n):\n"
        "        yield {'problem': f'{i}?', 'answer': i, 'images': [Image.new('L', (8, 8), 255)] * i}\n"
    )
    records = load(function=f"{folder / 'made.py'}:make", args={"n": 3}, images="images")
    assert [r.prompt for r in records] == ["0?", "<image>1?", "<image><image>2?"]
    assert [r.source for r in records] == ["d[0]", "d[1]", "d[2]"]
    assert colour(records[1].images[0]) == (255, 255, 255)
    assert records[1].extra == {"problem": "1?", "answer": 1}


@pytest.mark.parametrize(
    ("spec", "args", "message"),
    [
        ("made.py:mke", {}, r"data\.d\.function: .*no function 'mke'; did you mean 'make'"),
        ("made.py:make", {"m": 1}, r"data\.d\.args: .*takes \(n\)"),
        ("made.py:NUMBER", {}, "is a int, not a function"),
        ("made.py:make", {"n": 1}, "must return mappings, found int"),
        ("other.py:make", {}, "there is no file .*other.py"),
        ("no_such_package.data:make", {}, "no module named 'no_such_package'"),
        ("made.py", {}, "not of the form"),
    ],
)
def test_functions_that_cannot_be_used(folder, monkeypatch, spec, args, message):
    (folder / "made.py").write_text("NUMBER = 1\ndef make(n):\n    return range(n)\n")
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        load(function=spec, args=args)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", "cannot read this; known: .json, .jsonl"),
        ("a.json", "{", "a.json: not valid JSON"),
        ("a.json", "{}", "expected a list of records, found dict"),
        ("a.parquet", "x", "not a parquet file"),
        ("a.jsonl", "\n", "no usable record"),
    ],
)
def test_files_that_cannot_be_used(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(path=str(folder / name), on_bad_record="skip")


def test_no_file_at_all(folder):
    with pytest.raises(ValueError, match=r"data\.d\.path: no file matches .*nothing\*\.jsonl"):
        load(path=str(folder / "nothing*.jsonl"))


def test_parts_share_no_record_and_do_not_move_where_one_is_bad(folder):
    records = [{"problem": f"{i}?", "answer": i} for i in range(22)]

    def parts(*lines):
        path = write(folder / "parts.jsonl", *lines)
        return [
            [int(r.prompt[:-1]) for r in load(path=path, part=part, on_bad_record="skip")] for part in ("train", "test")
        ]

    train, test = parts(*records)
    assert test == [0, 10, 20]
    assert sorted(train + test) == list(range(22))
    assert parts(*records[:3], "broken", *records[4:]) == [[i for i in train if i != 3], test]


def test_limit_counts_usable_records_and_stops_reading(folder):
    path = write(folder / "a.jsonl", "{", QUESTION, QUESTION, "{")
    bad = BadRecords()
    assert len(load(bad, path=path, limit=2, on_bad_record="skip")) == 2
    assert bad.counts == {BROKEN_JSON: 1}


# ---- templates


def test_templates_options_and_replacements(folder):
    record = one(
        folder,
        {"question": "Which?", "choices": [6, "3 {x}"], "answer": 6, "explanation": "a<<1=1>>b\n#### 6"},
        prompt="{question}\n{options}",
        options="choices",
        response="<think>{explanation}</think>\\boxed{{{answer}}}",
        replace=[("<<.*?>>", ""), (r"\n#### .*?(?=</think>)", "")],
        verifier="choice",
    )
    assert record.prompt == "Which?\nA. 6\nB. 3 {x}"
    assert record.options == ("6", "3 {x}")
    assert record.response == "<think>ab</think>\\boxed{6}"
    assert record.verifier == "choice"


@pytest.mark.parametrize("template", ["\\boxed{}", "{problem", "{problem!r}", "{problem:>3}", "}"])
def test_a_malformed_template_names_its_key(folder, template):
    with pytest.raises(ValueError, match=r"data\.d\.prompt: .*brace"):
        one(folder, QUESTION, prompt=template)


def test_a_malformed_pattern_names_its_key(folder):
    with pytest.raises(ValueError, match=r"data\.d\.replace\[1\]: .*no regular expression"):
        one(folder, QUESTION, response="{answer}", replace=[("a", "b"), ("(", "")])


# ---- images and their placeholders


@pytest.mark.parametrize(
    ("text", "images", "expected", "colours"),
    [
        ("What?", "red.png", "<image>What?", [RED]),
        ("What?", ["red.png", "blue.png"], "<image><image>What?", [RED, BLUE]),
        ("<image> or <image>?", ["red.png", "blue.png"], "<image> or <image>?", [RED, BLUE]),
        ("<image 2> or <image1>?", ["red.png", "blue.png"], "<image> or <image>?", [BLUE, RED]),
        (
            "<image1>, <image2>; is <image1> red?",
            ["red.png", "blue.png"],
            "<image>, <image>; is <image1> red?",
            [RED, BLUE],
        ),
        ("One\n<image1>\nor\n<image2>?", "red.png", "One\n<image>\nor\n<image2>?", [RED]),
        ("Only text", [], "Only text", []),
    ],
)
def test_where_images_go(folder, text, images, expected, colours):
    record = one(folder, {"problem": text, "answer": 1, "image": images}, images="image")
    assert record.prompt == expected
    assert [colour(ref) for ref in record.images] == colours


def test_several_image_fields_of_which_some_are_null(folder):
    (folder / "sub").mkdir()
    fields = {"a": "red.png", "b": None, "c": "blue.png"}
    path = write(folder / "sub" / "a.jsonl", {**QUESTION, **fields})
    (record,) = load(path=path, images=["a", "b", "c"], image_root=str(folder))
    assert [colour(ref) for ref in record.images] == [RED, BLUE]


def test_image_keys_are_of_the_content(folder):
    ref = ImageRef.of("red.png", folder)
    assert ref.key == ImageRef.of((folder / "red.png").read_bytes(), folder).key
    assert ref.key != ImageRef.of("blue.png", folder).key
    assert ImageRef.of(Image.new("RGB", (4, 2)), folder).key != ImageRef.of(Image.new("RGB", (2, 4)), folder).key


def test_opening_gives_rgb_on_white_the_right_way_up(folder):
    assert colour(ImageRef.of(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), folder)) == (255, 255, 255)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=exif)
    assert ImageRef.of(buffer.getvalue(), folder).open().size == (20, 30)


def test_a_truncated_image_is_found_when_it_is_opened(folder):
    (folder / "cut.png").write_bytes(png()[:60])
    with pytest.raises(BadRecordError, match=r"unreadable image: .*cut\.png") as caught:
        ImageRef.of("cut.png", folder).open()
    assert caught.value.reason == UNREADABLE_IMAGE


# ---- bad records


BAD = [
    ("{", {}, BROKEN_JSON, "Expecting"),
    ("[1]", {}, BROKEN_JSON, "expected an object"),
    ({"problm": "a", "answer": 1}, {}, MISSING_FIELD, "no field 'problem'; did you mean 'problm'"),
    ({"problem": " ", "answer": 1}, {}, EMPTY_PROMPT, "prompt gives no text"),
    ({"problem": "a", "answer": None}, {}, EMPTY_ANSWER, "'answer' is null"),
    ({"problem": "a", "answer": ""}, {}, EMPTY_ANSWER, "answer gives no text"),
    ({"problem": ["a"], "answer": 1}, {}, WRONG_TYPE, "'problem' is a list"),
    ({**QUESTION, "why": None}, {"response": "<think>{why}</think>"}, EMPTY_RESPONSE, "'why' is null"),
    ({**QUESTION, "why": "x"}, {"response": "{why}", "replace": [("x", "")]}, EMPTY_RESPONSE, "nothing is left"),
    ({**QUESTION, "o": "A. 1; B. 2"}, {"options": "o"}, WRONG_TYPE, "'o' must be a list"),
    ({**QUESTION, "i": "none.png"}, {"images": "i"}, MISSING_IMAGE, "no file 'none.png'"),
    ({**QUESTION, "i": "x" * 9000}, {"images": "i"}, MISSING_IMAGE, "no file 'xxx"),
    ({**QUESTION, "i": None}, {"images": "i"}, MISSING_IMAGE, "'i': null"),
    ({**QUESTION, "i": "https://x/y.png"}, {"images": "i"}, MISSING_IMAGE, "is a URL; nothing is downloaded"),
    ({**QUESTION, "i": "text.png"}, {"images": "i"}, UNREADABLE_IMAGE, "text.png: not an image"),
    ({**QUESTION, "i": 3}, {"images": "i"}, UNREADABLE_IMAGE, "found int"),
    ({"problem": "<image>?", "answer": 1}, {}, PLACEHOLDERS, "0 images, .* say images"),
    ({**QUESTION, "problem": "<image><image>", "i": "red.png"}, {"images": "i"}, PLACEHOLDERS, "1 images, but"),
    ({**QUESTION, "problem": "<image1><image3>", "i": ["red.png"] * 2}, {"images": "i"}, PLACEHOLDERS, "<image3>"),
    ({**QUESTION, "problem": "<image><image1>", "i": "red.png"}, {"images": "i"}, PLACEHOLDERS, "<image1>"),
]


@pytest.mark.parametrize(("record", "config", "reason", "detail"), BAD, ids=[f"{b[2]}-{i}" for i, b in enumerate(BAD)])
def test_a_bad_record_is_an_error_with_its_line_or_is_counted(folder, record, config, reason, detail):
    good = {**QUESTION, "why": "because", "o": [1, 2], "i": [], **({"why": "why"} if "replace" in config else {})}
    path = write(folder / "a.jsonl", good, record)
    with pytest.raises(BadRecordError, match=f"(?s)a.jsonl:2: {reason}: .*{detail}.*on_bad_record: skip") as caught:
        load(path=path, **config)
    assert (caught.value.reason, caught.value.source) == (reason, f"{path}:2")

    bad = BadRecords()
    assert [r.source for r in load(bad, path=path, on_bad_record="skip", **config)] == [f"{path}:1"]
    assert bad.counts == {reason: 1}


def test_bad_records_count_a_source_once_also_after_a_restart(caplog):
    bad = BadRecords()
    for source in ["a:1", "a:2", "a:1"]:
        bad.handle("skip", source, BROKEN_JSON, "detail")
    bad.handle("skip", "a:3", EMPTY_ANSWER, "detail")
    assert bad.counts == {BROKEN_JSON: 2, EMPTY_ANSWER: 1}
    assert "a:1: skipped: broken JSON: detail" in caplog.text

    again = BadRecords()
    again.load_state_dict(json.loads(json.dumps(bad.state_dict())))
    again.handle("skip", "a:1", BROKEN_JSON, "detail")
    assert again.counts == bad.counts


# ---- the sampler


def test_every_epoch_is_another_permutation_and_any_position_can_be_asked_first():
    sampler = Sampler(50, seed=7)
    order = [sampler.index(i) for i in range(150)]
    epochs = [order[i : i + 50] for i in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [Sampler(50, seed=7).index(i) for i in reversed(range(150))] == order[::-1]
    assert [Sampler(50, seed=8).index(i) for i in range(50)] != epochs[0]


def test_nothing_to_draw_from():
    with pytest.raises(ValueError, match="at least one record"):
        Sampler(0, seed=0)
