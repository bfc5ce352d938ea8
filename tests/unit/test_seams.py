"""Places in other packages: checked by shape, replaced and restored. The table of supported versions."""

import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from revisual_fast.integrations import seams
from revisual_fast.integrations.seams import (
    SUPPORTED,
    SeamError,
    check_version,
    on_unpatch,
    patched,
    placed,
    replace,
    seam,
    warn_once,
)
from revisual_fast.integrations.seams import unpatch as unpatch_all
from tests.processes import run_code

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "integrations"


@pytest.fixture
def module(monkeypatch):
    made = ModuleType("fake_trainer")
    exec("class Head:\n    def forward(ctx, hidden, weight, bias=None): ...\n\ndef loss(logp, old): ...", made.__dict__)
    monkeypatch.setitem(sys.modules, "fake_trainer", made)
    yield made
    unpatch_all("trl")


def test_a_seam_is_found_and_its_parameters_are_checked(module):
    assert seam("fake_trainer") is module
    assert seam("fake_trainer:Head.forward", ("hidden", "weight")) is module.Head.forward
    assert seam("fake_trainer:loss", ("logp", "old")) is module.loss


@pytest.mark.parametrize(
    ("place", "parameters", "said"),
    [
        ("fake_trainer:Head.backward", (), "fake_trainer:Head.backward is not there"),
        ("fake_trainer:losses", (), "fake_trainer:losses is not there"),
        ("no_such_package.at_all:x", (), "no_such_package.at_all:x is not there"),
        (
            "fake_trainer:Head.forward",
            ("weight", "hidden"),
            r"takes \(ctx, hidden, weight, bias\); expected weight, hid",
        ),
        ("fake_trainer:loss", ("logp", "ref"), r"fake_trainer:loss takes \(logp, old\)"),
    ],
)
def test_one_that_has_moved_is_named(module, place, parameters, said):
    with pytest.raises(SeamError, match=said):
        seam(place, parameters)


def test_the_advice_names_the_version_that_was_tested():
    with pytest.raises(SeamError, match=r"tested with trl 1\.16\.0"):
        seam("trl.no_such_module:x")


def test_replaced_twice_and_restored(module):
    own, table = module.loss, {"grpo": 1}
    assert not patched("trl")
    assert replace("trl", module, "loss", "first") is own
    assert replace("trl", module, "loss", "second") is own
    assert replace("trl", module, "new", 3) is None
    assert replace("trl", table, "grpo", 2) == 1
    assert replace("trl", table, "other", 5) is None
    inherited = type("Derived", (module.Head,), {})
    replace("trl", inherited, "forward", 7)
    assert (module.loss, module.new, table, inherited.forward) == ("second", 3, {"grpo": 2, "other": 5}, 7)
    assert patched("trl")
    unpatch_all("verl")
    assert module.loss == "second"
    unpatch_all()
    assert module.loss is own
    assert not hasattr(module, "new")
    assert table == {"grpo": 1}
    assert "forward" not in vars(inherited)
    assert not patched("trl")
    unpatch_all("trl")  # harmless


def test_what_somebody_else_has_replaced_since_is_left_alone(module):
    own = module.loss
    replace("trl", module, "loss", "ours")
    replace("trl", module, "Head", "ours")
    module.loss = "theirs"
    with pytest.raises(SeamError, match=r"fake_trainer\.loss was replaced by somebody else"):
        unpatch_all("trl")
    assert module.loss == "theirs"
    assert isinstance(module.Head, type)
    module.loss = own


def test_more_that_is_restored():
    done = []

    class Borrower:
        def restore(self) -> None:
            done.append(self)

    kept, dropped = Borrower(), Borrower()
    on_unpatch("trl", kept.restore)
    on_unpatch("trl", dropped.restore)
    del dropped
    unpatch_all("trl")
    unpatch_all("trl")
    assert done == [kept]


def test_placed_for_a_while(module):
    own, head = module.loss, module.Head()

    def fail() -> None:
        with placed(module, "loss", 1), placed(head, "forward", 2):
            assert (module.loss, head.forward) == (1, 2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert module.loss is own
    assert "forward" not in vars(head)


def test_warned_once_whatever_the_numbers():
    def leaves(reason: str, said: set[str]) -> None:
        warn_once(reason, said)

    first: set[str] = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for reason in ("2 rows", "30 rows", "a head that is gone", "2 rows"):
            leaves(reason, first)
        leaves("4 rows", set())
    assert [str(w.message) for w in caught] == ["2 rows", "a head that is gone", "4 rows"]
    assert {(w.category, w.filename) for w in caught} == {(RuntimeWarning, __file__)}


def test_versions(monkeypatch):
    with pytest.raises(ValueError, match="there is no integration 'tlr'"):
        unpatch_all("tlr")
    monkeypatch.setattr(seams.metadata, "version", lambda name: "1.15.9")
    with pytest.raises(SeamError, match=r"for trl >=1\.16,<2; 1\.15\.9 is installed"):
        check_version("trl")

    def missing(name: str) -> str:
        raise seams.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(seams.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"pip install 'trl>=1\.16,<2'"):
        check_version("trl")


def test_the_table_of_versions_is_the_one_that_is_checked():
    rows = re.findall(
        r"^\| \[(\w+)\]\((.*?)\) \| (.*?) \| (.*?) \| (.*?) \|$", (ROOT / "docs/integrations.md").read_text(), re.M
    )
    assert [row[0] for row in rows] == list(SUPPORTED)
    for name, page, package, versions, tested in rows:
        assert (ROOT / "docs" / page).is_file()
        wanted = SUPPORTED[name]
        found = (package, versions, tested) if wanted.package else ("", "", "")
        assert found == (wanted.package, wanted.versions, wanted.tested), name


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_integration_has_a_page_and_a_short_example(name):
    page = (DOCS / f"{name}.md").read_text()
    assert "## What you gain" in page
    assert "## What is not covered" in page
    named = re.findall(r"examples/(\w+\.py)", page)
    assert named, "the page names its example"
    for example in named:
        lines = (ROOT / "examples" / example).read_text().splitlines()
        assert len(lines) <= 40, example


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (DOCS / target).exists(), target


def test_importing_the_package_loads_no_other_trainer():
    code = "import revisual_fast, revisual_fast.integrations, sys\n"
    code += "assert not {'trl', 'verl', 'openrlhf', 'swift', 'liger_kernel', 'transformers'} & sys.modules.keys()"
    run_code(code)
