"""``make hub``: lays out the fused ops as a kernel for HuggingFace's package ``kernels``; see docs/integrations/hub.md.

The public names of ``revisual_fast`` and every module they import, lazily or not, are copied; their imports become
relative, because the loader imports a kernel under a name of its own, the ``id`` of its metadata. That name is also the
namespace of the ops in ``torch.ops``. It contains a hash of the files, so that two versions fit into one process.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "revisual_fast"
NAME = "revisual-fast"
VARIANT = Path("build/torch-universal")
TESTED_WITH = "0.17.2"

EDITS = {
    "kernels/cuda_library.py": (
        "run `make cuda` in a checkout, or `pip install --no-build-isolation .`, with nvcc on PATH",
        "this kernel comes without the CUDA kernels, which the package revisual-fast has",
    )
}
"""What a file says of the package and not of its copy: old text, new text."""


def module_path(name: str) -> Path | None:
    """The file of ``revisual_fast.a.b``, relative to the package, or None if there is no such module."""
    stem = Path(*name.split(".")[1:])
    found = [path for path in (stem.with_suffix(".py"), stem / "__init__.py") if (PACKAGE / path).is_file()]
    return found[0] if found else None


def own_imports(path: Path, source: str) -> list[ast.ImportFrom]:
    """The imports from the package, lazy ones included. Raises ValueError for one that cannot be made relative."""
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE.name for alias in node.names):
            raise ValueError(f"{path}:{node.lineno}: write this as from {PACKAGE.name}... import ...")
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    return [node for node in found if (node.module or "").split(".")[0] == PACKAGE.name]


def modules_imported(node: ast.ImportFrom) -> set[str]:
    """The modules that the statement loads: the one it names, its parents, and the names in it that are modules."""
    parts = str(node.module).split(".")
    parents = {".".join(parts[: i + 1]) for i in range(1, len(parts))}
    return parents | {name for name in (f"{node.module}.{alias.name}" for alias in node.names) if module_path(name)}


def relative(path: Path, source: str) -> str:
    """The source with relative imports, as a file of the copied package."""
    lines = source.splitlines()
    for node in own_imports(path, source):
        old, inside = f"from {node.module} import", str(node.module).partition(".")[2]
        line = lines[node.lineno - 1]
        assert old in line, f"{path}:{node.lineno}"
        lines[node.lineno - 1] = line.replace(old, f"from {'.' * len(path.parts)}{inside} import", 1)
    return "\n".join(lines) + "\n"


def public_imports() -> tuple[list[ast.ImportFrom], list[str]]:
    """Where the public names come from, and the names, as ``revisual_fast/__init__.py`` has them."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return imports, sorted(alias.name for node in imports for alias in node.names)


def init_source() -> str:
    imports, names = public_imports()
    lines = [f'"""The fused ops of {NAME}. Made by hub/make_hub.py; edit the originals."""', "", "from . import layers"]
    lines += [ast.unparse(ast.ImportFrom(str(n.module).partition(".")[2], n.names, level=1)) for n in imports]
    return "\n".join([*lines, "", f"__all__ = {json.dumps([*names, 'layers'], indent=4)}"]) + "\n"


def collect() -> dict[str, str]:
    """Path in the variant's folder -> text, for everything but the metadata."""
    files = {"__init__.py": init_source(), "layers.py": (HERE / "layers.py").read_text()}
    wanted, seen = [name for node in public_imports()[0] for name in modules_imported(node)], set[str]()
    while wanted:
        name = wanted.pop()
        path = module_path(name)
        if name in seen or path is None:  # None: a folder without __init__.py, which holds modules only
            continue
        seen.add(name)
        source = (PACKAGE / path).read_text()
        wanted += [module for node in own_imports(path, source) for module in modules_imported(node)]
        text = relative(path, source)
        if str(path) in EDITS:
            assert text.count(EDITS[str(path)][0]) == 1, f"{path}: EDITS is out of date"
            text = text.replace(*EDITS[str(path)])
        files[str(path)] = text
    return dict(sorted(files.items()))


def metadata(files: dict[str, str]) -> dict[str, object]:
    """Of the variant. Triton's kernels are made for CUDA; that torch itself runs the ops elsewhere has no field."""
    digests = {path: hashlib.sha256(text.encode()).digest() for path, text in files.items()}
    unique = hashlib.sha256(b"".join(path.encode() + digests[path] for path in files)).hexdigest()[:8]
    return {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{unique}",
        "version": 0,  # by the loader's convention, an interface that may still change
        "kernels-minver": TESTED_WITH,
        "license": "Apache-2.0",
        "python-depends": [],  # of the loader's own short list; torch and triton are not on it
        "backend": {"type": "cuda"},
        "digest": {
            "algorithm": "sha256",
            "files": {path: base64.b64encode(digest).decode() for path, digest in digests.items()},
        },
    }


def lay_out(out: Path) -> None:
    """Writes the kernel's directory. Raises ValueError if ``out`` holds something else."""
    if out.exists() and any(out.iterdir()) and not (out / VARIANT / "metadata.json").is_file():
        raise ValueError(f"{out} is not empty and no kernel made by this script: give another --out, or remove it")
    shutil.rmtree(out, ignore_errors=True)
    files = collect()
    texts = {str(VARIANT / path): text for path, text in files.items()}
    texts[str(VARIANT / "metadata.json")] = json.dumps(metadata(files), indent=2) + "\n"
    texts |= {"README.md": (HERE / "README.md").read_text(), "LICENSE": (HERE.parent / "LICENSE").read_text()}
    for path, text in texts.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(text)
    print(f"{out}: {len(files)} files, {metadata(files)['id']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "build/hub" / NAME, help="the kernel's directory")
    try:
        lay_out(parser.parse_args().out)
    except ValueError as error:
        sys.exit(str(error))
