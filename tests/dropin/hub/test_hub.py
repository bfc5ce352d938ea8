"""The kernel that ``make hub`` lays out: what is in it, and what it computes once HuggingFace's ``kernels`` loaded it.

That package is imported in a process of its own only, outside the repository, whose folder ``kernels/`` is another.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import revisual_fast
from revisual_fast.ops import OPS

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "revisual_fast"
PAGES = ("docs/integrations/hub.md", "hub/README.md")
EXAMPLE = ROOT / "examples" / "hub_kernel.py"
VARIANT = Path("build/torch-universal")
ALLOWED = {"torch", "triton", "nvtx"}  # nvtx where ranges are asked for


def installed(package: str) -> str | None:
    """The version. ``find_spec("kernels")`` would find the repository's folder."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


needs_kernels = pytest.mark.skipif(
    not (installed("kernels") and installed("triton")), reason="needs pip install kernels==0.17.2 triton"
)


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_hub", ROOT / "hub" / "make_hub.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_hub = load_script()


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def run(*arguments: object, cwd: Path | str = "/", **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process that finds installed packages only, neither the repository nor the folder it runs in."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LOCAL_KERNELS")}
    clean |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-P", *map(str, arguments)]
    return subprocess.run(command, env=clean, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "build/hub/revisual-fast"
    make_hub.lay_out(out)
    return out


def test_a_second_run_gives_the_same_tree(directory: Path) -> None:
    before = tree(directory)
    (directory / VARIANT / "kernels" / "left_over.py").touch()
    make_hub.lay_out(directory)
    assert tree(directory) == before
    assert {"README.md", "LICENSE", f"{VARIANT}/metadata.json", f"{VARIANT}/__init__.py"} < set(before)


def test_the_script_removes_nothing_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    done = run(ROOT / "hub" / "make_hub.py", "--out", tmp_path)
    assert done.returncode == 1
    assert "is not empty and no kernel made by this script" in done.stderr
    assert tree(tmp_path) == {"thesis.tex": b""}


def test_no_file_imports_the_package_and_relative_imports_arrive(directory: Path) -> None:
    variant = directory / VARIANT
    for path in variant.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
                names = [base / alias.name for alias in node.names]
                modules = [base] if base.with_suffix(".py").exists() or (base / "__init__.py").exists() else names
                assert all(m.with_suffix(".py").exists() or m.is_dir() for m in modules), (path, ast.unparse(node))
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                tops = {str(name).partition(".")[0] for name in found}
                assert tops <= ALLOWED | sys.stdlib_module_names, (path, ast.unparse(node))


def test_only_what_the_ops_need_is_in_it(directory: Path) -> None:
    there = {path.partition(f"{VARIANT}/")[2] for path in tree(directory)}
    assert {"ops.py", "library.py", "modules.py", "losses/tokens.py", "kernels/rows_triton.py"} < there
    assert not {
        path for path in there if path.startswith(("policy/", "stages/", "rollout/", "config", "kernels/shared_"))
    }
    assert not {path for path in there if path.endswith((".so", ".cu", ".pyc"))}


def test_the_copies_are_the_originals_but_for_their_imports(directory: Path) -> None:
    """And for one sentence, which says how the CUDA kernels are had."""
    variant, different = directory / VARIANT, []
    for path in sorted(variant.rglob("*.py")):
        inside = path.relative_to(variant)
        if str(inside) not in ("__init__.py", "layers.py"):
            pairs = zip(path.read_text().splitlines(), (PACKAGE / inside).read_text().splitlines(), strict=True)
            different += [(copied, original) for copied, original in pairs if copied != original]
    assert len(different) > 50
    others = [pair for pair in different if not all(line.lstrip().startswith("from ") for line in pair)]
    assert [original.partition(" = ")[0] for _, original in others] == ["BUILD"]


def test_an_import_that_cannot_be_made_relative_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"kernels/new\.py:2: write this as from revisual_fast"):
        make_hub.own_imports(Path("kernels/new.py"), "import torch\nimport revisual_fast.ops\n")


def test_another_content_gets_another_name() -> None:
    files = make_hub.collect()
    other = make_hub.metadata({**files, "ops.py": files["ops.py"] + "\n"})
    assert other["id"] != make_hub.metadata(files)["id"]
    assert str(other["id"]).isidentifier()


def test_the_card_names_what_is_public(directory: Path) -> None:
    card = (directory / "README.md").read_text()
    missing = [name for name in [*revisual_fast.__all__, "layers.LinearLogprob"] if f"`{name}`" not in card]
    assert not missing


# Loaded by the package


@pytest.fixture(scope="module")
def report(directory: Path) -> dict[str, Any]:
    environment = {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = run(Path(__file__).parent / "drive.py", directory, ROOT, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_kernels
def test_the_package_loads_it_by_path_and_by_name(report: dict[str, Any]) -> None:
    assert report["version"] == installed("kernels")
    assert report["name"] == report["id"]
    assert report["by_repository_name"]
    assert report["public"] == dict.fromkeys([*revisual_fast.__all__, "layers"], True)


@needs_kernels
def test_the_cuda_kernels_say_that_they_are_absent(report: dict[str, Any]) -> None:
    assert report["backends"].pop("cuda").startswith("not built: this kernel comes without the CUDA kernels")
    assert report["backends"] == {"triton": "yes", "torch": "yes"}


@needs_kernels
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", ["linear_logprob", "linear_policy_loss", "policy_loss_from_logits", "gather_rows"])
def test_errors_are_those_of_plain_torch(report: dict[str, Any], op: str, backend: str) -> None:
    """Of results and gradients in fp32, to float64."""
    ours, plain = report["errors"][backend][op], report["plain"][op]
    assert max(plain) < 2e-6
    assert all(a <= 2 * b for a, b in zip(ours, plain, strict=True)), (ours, plain)


@needs_kernels
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_results_are_those_of_the_package_to_the_last_bit(report: dict[str, Any], backend: str) -> None:
    assert report["differences"][backend] == []


@needs_kernels
def test_both_live_in_one_process(report: dict[str, Any]) -> None:
    """The ops that a compiled graph calls are each package's own, and a second look finds the first results."""
    ops = {f"{name}.default" for name in ("linear_logprob", "linear_logprob_backward", *OPS[1:])}
    assert set(report["own_ops"]) == {f"revisual_fast.{op}" for op in ops}
    assert set(report["compiled"]["torch"]["ops"]) == {f"{report['id']}.{op}" for op in ops}
    assert report["changed"] == []


@needs_kernels
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_it_compiles_without_a_graph_break(report: dict[str, Any], backend: str) -> None:
    assert report["compiled"][backend]["errors"]
    assert max(report["compiled"][backend]["errors"]) < 1e-6


@needs_kernels
def test_its_layer_replaces_the_forward_of_a_models_own(report: dict[str, Any]) -> None:
    assert len(report["kernelized"]) == 4
    assert max(report["kernelized"]) < 1e-6


# The pages and the example


@needs_kernels
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(directory: Path, page: str, tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert code
    (tmp_path / "page.py").write_text("\n".join(code))
    done = run(tmp_path / "page.py", cwd=directory.parents[2])
    assert done.returncode == 0, done.stderr


@needs_kernels
def test_the_example_runs(directory: Path) -> None:
    done = run(EXAMPLE, directory)
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout
    assert "cuda: not built" in done.stdout


def test_the_example_says_what_is_missing(directory: Path, tmp_path: Path) -> None:
    nothing = run(EXAMPLE, tmp_path)
    assert nothing.returncode == 1
    assert ("make hub" if installed("kernels") else "pip install kernels==0.17.2") in nothing.stderr
