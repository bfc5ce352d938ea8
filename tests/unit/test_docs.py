"""The pages of docs/: their code runs and does what they say, their tables name what is there."""

import ast
import importlib.util
import re
import shlex
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from revisual_fast import PolicyObjective, TokenBatch, linear_policy_loss, whole_sequences
from revisual_fast.config import RolloutConfig
from revisual_fast.kernels import plan
from revisual_fast.objective_metrics import metric_names
from revisual_fast.policy.attention import BACKENDS
from revisual_fast.policy.families import FAMILIES
from revisual_fast.rollout.messages import EngineSettings
from revisual_fast.rollout.vllm.server_checks import serve_command
from revisual_fast.stages.mismatch import mismatch_metrics
from tests.models import padded_logp

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("fused_loss.md", "method.md", "packing.md", "rollout.md")
FUSED, METHOD, PACKING, ROLLOUT = ((DOCS / name).read_text() for name in PAGES)


def section(page: str, title: str) -> str:
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def run(text: str, names: dict[str, Any]) -> dict[str, Any]:
    """The names after the page's Python blocks, run one after the other."""
    torch.manual_seed(0)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, names)
    return names


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("CHUNK_BYTES", "SUPERCHUNK_BYTES", "SAVED_BYTES"):  # the page sets them
        monkeypatch.setattr(plan, name, dict(getattr(plan, name)))
    return run(FUSED, {})


def padded_gradients(x: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of the page's first example, on padded float64 tensors, from the formula."""
    table, head = (p.detach().double().requires_grad_() for p in (x["body"].weight, x["head"].weight))
    logp = (table[x["input_ids"]] @ head.T).log_softmax(-1)[:, :-1]
    logp = logp.gather(2, x["input_ids"][:, 1:, None])[..., 0]
    mask, advantages = x["completion_mask"][:, 1:], x["advantages"].double()[:, None]
    rows = -torch.exp(logp - logp.detach()) * advantages * mask
    loss = (rows.sum(1) / mask.sum(1)).mean()
    return loss.detach(), list(torch.autograd.grad(loss, [table, head]))


def test_the_example_is_the_padded_loss_also_in_micro_batches(page: dict[str, Any]) -> None:
    loss, gradients = padded_gradients(page)
    torch.testing.assert_close(page["out"].loss.double(), loss, rtol=1e-5, atol=1e-6)
    found = [page["body"].weight.grad, page["head"].weight.grad]  # of the micro-batches: zeroed before them
    torch.testing.assert_close([g.double() for g in found], gradients, rtol=1e-4, atol=1e-6)
    first = run(section(FUSED, "From a padded batch to a gradient"), {})
    assert torch.equal(first["input_ids"], page["input_ids"])
    found = [first["body"].weight.grad, first["head"].weight.grad]
    torch.testing.assert_close([g.double() for g in found], gradients, rtol=1e-4, atol=1e-6)


def test_the_other_examples_do_what_the_page_says(page: dict[str, Any]) -> None:
    torch.testing.assert_close(page["old_logp"], page["out"].logp)
    assert page["own"].loss.requires_grad
    every = page["replay"].logp, page["out"].logp
    assert (every[0] > every[1]).all()  # renormalised over fewer ids
    torch.testing.assert_close((page["padded"].loss, page["padded"].metrics), (page["out"].loss, page["out"].metrics))
    counts = page["labels"].flatten() != -100
    torch.testing.assert_close(page["padded"].logp[counts], page["out"].logp)
    assert not page["padded"].logp[~counts].any()
    assert page["packed"].grad[:, 0].tolist() == [0, 0, 0, 0, 2, 1, 1, 1, 1]
    assert page["chosen"].keep.sum() == 2
    assert plan.SAVED_BYTES["cuda"] == 0


def test_the_table_of_fields() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", section(FUSED, "What the loss is told: TokenBatch"), re.MULTILINE)
    assert rows == [f.name for f in fields(TokenBatch)]


def test_the_table_of_metrics() -> None:
    objectives = [
        PolicyObjective(rollout_correction="mask", off_policy_mask=mask, surrogate=surrogate)
        for mask, surrogate in product((None, 0.1), ("clip", "sapo"))
    ]
    v = torch.zeros(1)
    names = {name for o in objectives for name in metric_names(o, TokenBatch(v, ref_logp=v))}
    table = re.findall(r"^\| (`.*?`) \|", section(FUSED, "What comes back"), re.MULTILINE)
    assert set(re.findall(r"`(.*?)`", " ".join(table))) == names


def test_a_given_importance_is_used_as_it_is() -> None:
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    tokens = TokenBatch(torch.ones(3), importance=torch.tensor([1.0, 30.0, 0.0]))
    o = PolicyObjective(rollout_correction="truncate", rollout_cap=2.0)
    loss = linear_policy_loss(hidden, weight, targets, tokens, o).loss
    torch.testing.assert_close(loss, torch.tensor(-31 / 3))


def source_names(package: str, path: str) -> set[str]:
    """Every name, argument and annotated field of a file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(spec.origin).parent / path).read_text())
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)
    }


@pytest.mark.parametrize(
    ("column", "package", "path"),
    [(1, "trl", "trainer/grpo_config.py"), (2, "liger_kernel", "chunked_loss/grpo_loss.py")],
)
def test_the_peers_have_the_arguments_that_the_table_names(column: int, package: str, path: str) -> None:
    table = section(FUSED, "Coming from TRL, Liger or verl").partition("`loss_type` says")[0]
    cells = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell[column].replace("→", "|").split("|")[0])}
    values = {"token_mean", "sequence_mask"}
    assert len(named) >= 8
    assert named - values <= source_names(package, path)


def test_our_side_of_the_table_is_there() -> None:
    text = section(FUSED, "Coming from TRL, Liger or verl")
    first = [row.strip("| ").split(" | ")[0] for row in text.splitlines() if row.startswith("| `")]
    ours = {name for cell in first[:14] for name in re.findall(r"`(\w+)`", cell)}
    assert ours <= {f.name for f in fields(PolicyObjective)}
    for preset in re.findall(r'`preset\("(\w+)"', text):
        PolicyObjective.preset(preset)


def test_the_objectives_of_the_method_page_run() -> None:
    names: dict[str, Any] = {"PolicyObjective": PolicyObjective, "whole_sequences": whole_sequences}
    run(section(METHOD, "Objectives"), names)
    hidden, weight, targets = torch.randn(6, 4), torch.randn(9, 4, requires_grad=True), torch.arange(6)
    sampled = torch.full((6,), -2.0)
    tokens = TokenBatch(torch.tensor([1.0, -1.0]), sampled, sampled, cu_seqlens=torch.tensor([0, 4, 6]).int())
    for o in (names["mine"], PolicyObjective(surrogate=names["geometric"])):
        out = linear_policy_loss(hidden, weight, targets, tokens, o)
        assert torch.autograd.grad(out.loss, weight)[0].abs().sum() > 0


def test_the_page_on_packing() -> None:
    x = run(PACKING, {})
    policy, advantages = x["policy"], [1.0, -1.0]
    gradients = {n: p.grad for n, p in policy.model.named_parameters()}
    policy.model.zero_grad(set_to_none=True)
    logp = padded_logp(policy, [x["Group"](x["prompt"], x["completions"])]).split([3, 2])
    (-sum(a * (p - p.detach()).exp().mean() for a, p in zip(advantages, logp, strict=True)) / 2).backward()
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_tables_on_packing_name_what_there_is() -> None:
    def named(title: str) -> list[str]:
        rows = [line for line in section(PACKING, title).splitlines() if line.startswith("| `")]
        return [name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]

    assert named("Attention") == list(BACKENDS)
    assert sorted(named("Families")) == sorted(FAMILIES)


def test_the_table_of_rollout_settings_with_their_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", section(ROLLOUT, "Settings"), re.MULTILINE)
    found = {name: yaml.safe_load(value) for name, value in rows}
    defaults = RolloutConfig().model_dump(by_alias=True)
    assert found == {name: {"off": False}.get(value, value) for name, value in defaults.items()}  # off is no in YAML
    assert list(found) == list(defaults)


def test_the_page_on_rollouts_names_what_there_is() -> None:
    command = section(ROLLOUT, "A server").split("```")[1].replace("\\\n", " ")
    settings = EngineSettings("MODEL", "bfloat16", "cuda:0", 16384, 1024, 2, transfer="nccl", images=1)
    assert shlex.split(command) == shlex.split(serve_command(settings, "http://localhost:8000"))
    sources = "".join(path.read_text() for path in (DOCS.parent / "revisual_fast" / "stages").glob("*.py"))
    counts = {f"engine/{name}" for name in ("restarts", "retried_requests", "regenerated_groups")}
    assert set(re.findall(r"`(\w+/\w+)`", ROLLOUT)) <= set(re.findall(r'"(\w+/\w+)"', sources)) | counts
    named = re.findall(r"`(?:mismatch/)?(\w+)`", section(ROLLOUT, "The engine is not the trainer").split("\n|")[0])
    assert named == [name.removeprefix("mismatch/") for name in mismatch_metrics([torch.zeros(1)])]


@pytest.mark.parametrize("page", [FUSED, METHOD, PACKING, ROLLOUT], ids=PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page):
        file = DOCS / target
        assert file.is_file(), target
        titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, anchor


def test_the_page_on_packed_rows() -> None:
    x = run((DOCS / "packed_rows.md").read_text(), {})
    rows = torch.where((x["feature_index"] < 0)[:, None], x["table"][x["ids"]], x["features"][x["feature_index"]])
    assert torch.equal(x["x"], rows)
    assert torch.equal(x["keys"], x["k"][x["segments"]])
    assert torch.equal(x["values"], x["v"][x["segments"]])
    gathered = 2 * x["x"].detach()
    wanted = torch.zeros(50, 16).index_add(0, x["ids"][4:9], gathered[4:9] * torch.tensor([2, 1, 1, 0, 1])[:, None])
    torch.testing.assert_close(x["table"].grad, wanted)
    assert not x["features"].grad.any()
    assert x["q"].shape == (10, 4, 8)
    assert x["axis"].tolist() == [0, 0, 1, 2]
