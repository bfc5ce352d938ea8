"""The layout: who may import whom, and names that must not be taken."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [p for p in [*ROOT.glob("revisual_fast/**/*.py"), *ROOT.glob("kernels/*.py")] if p.is_file()]
ORDER = ["kernels", "library", "ops", "policy", "stages", "curriculum", "cli"]
LEAVES = {"config", "packing", "losses", "advantages", "ranges"}
HEAVY = {"transformers": {"policy", "data", "rollout/hf.py"}, "vllm": {"rollout/vllm.py"}}


def room(path: Path) -> str:
    """The first part of a module's place in the package: ``stages/grpo.py`` -> ``stages``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "revisual_fast" else parts[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("revisual_fast.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    here, used = room(path), rooms_imported(path) - {room(path)}
    if here in LEAVES:
        assert not used, f"{here} is a leaf"
    if here in ORDER:
        later = set(ORDER[ORDER.index(here) + 1 :])
        assert not used & later, f"{here} must not import {used & later}"
    for library, homes in HEAVY.items():
        inside = {here, f"{here}/{path.name}"} & homes
        uses = any(name == library or name.startswith(f"{library}.") for name in imports(path))
        assert not uses or inside, f"{library} belongs in {sorted(homes)}"
    names = {name.split(".")[0] for name in imports(path)}
    assert "kernels" not in names, "`kernels` is another package on PyPI; import revisual_fast.kernels"
    assert not names & {"bench", "tests"}


def test_the_configuration_needs_no_torch():
    assert not {n.split(".")[0] for n in imports(ROOT / "revisual_fast/config.py")} & {"torch", "transformers", "numpy"}


def test_kernels_are_found_through_the_package_and_only_there():
    link = ROOT / "revisual_fast" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
