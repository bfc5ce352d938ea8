"""The layout: who may import whom, and names that must not be taken."""

import ast
from pathlib import Path

import pytest

from tests.processes import run_code

ROOT = Path(__file__).parents[2]
SOURCES = [p for p in [*ROOT.glob("revisual_fast/**/*.py"), *ROOT.glob("kernels/*.py")] if p.is_file()]
ORDER = ["kernels", "library", "ops", "policy", "stages", "curriculum", "cli"]
LEAVES = {"config", "packing", "losses", "advantages", "distributed", "ranges"}
HEAVY = {"transformers": {"policy", "data", "integrations"}, "vllm": {"rollout/vllm"}}


def room(path: Path) -> str:
    """The first part of a module's place in the package: ``stages/grpo.py`` -> ``stages``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "revisual_fast" else parts[0]


def place(path: Path) -> Path:
    """``revisual_fast/rollout/hf.py`` -> ``rollout/hf.py``."""
    return path.relative_to(ROOT / "revisual_fast" if path.is_relative_to(ROOT / "revisual_fast") else ROOT)


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
        inside = homes & {str(p) for p in (place(path), *place(path).parents)}
        uses = any(name == library or name.startswith(f"{library}.") for name in imports(path))
        assert not uses or inside, f"{library} belongs in {sorted(homes)}"
    names = {name.split(".")[0] for name in imports(path)}
    assert "kernels" not in names, "`kernels` is another package on PyPI; import revisual_fast.kernels"
    assert not names & {"bench", "tests"}


def test_the_configuration_needs_no_torch():
    for path in (ROOT / "revisual_fast/config").glob("*.py"):
        assert not {n.split(".")[0] for n in imports(path)} & {"torch", "transformers", "numpy"}


def test_the_trainer_does_not_import_vllm(tmp_path):
    """It takes seconds and a device's memory: vllm runs in a process of its own."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()  # there to be found
    modules = ["curriculum", "rollout.build", *(f"rollout.vllm.{name}" for name in ("process", "server", "transfer"))]
    code = "".join(f"import revisual_fast.{name}\n" for name in modules)
    code += "import importlib.util, sys\nassert importlib.util.find_spec('vllm')\nassert 'vllm' not in sys.modules"
    run_code(code, PYTHONPATH=f"{tmp_path}:{ROOT}")


def test_kernels_are_found_through_the_package_and_only_there():
    link = ROOT / "revisual_fast" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
