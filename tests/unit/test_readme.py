"""The README says what is there: its code runs, its tree names every module, its links lead somewhere."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {
        "hidden": torch.randn(6, 8, requires_grad=True),
        "head": torch.nn.Linear(8, 11, bias=False),
        "targets": torch.randint(11, (6,)),
        "advantages": torch.tensor([1.0, -1.0]),
        "old_logp": torch.full((6,), -2.4),
        "cu_seqlens": torch.tensor([0, 4, 6], dtype=torch.int32),
    }
    exec(code, names)
    assert names["hidden"].grad.abs().sum() > 0
    assert names["head"].weight.grad.abs().sum() > 0


def test_the_tree_names_every_module():
    tree = README.rpartition("## The tree")[2]
    for path in sorted((ROOT / "revisual_fast").glob("*.py")):
        assert path.name in tree or path.name.startswith("__"), f"{path.name} is missing in README's tree"
    for folder in ("stages", "policy", "rollout", "data", "rewards", "telemetry"):
        assert f"{folder}/" in tree


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://arxiv.org/") or (ROOT / target).exists(), target
