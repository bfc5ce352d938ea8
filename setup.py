"""Builds csrc/ into ``revisual_fast/_C.abi3.so`` where nvcc and torch are at hand; a pure-Python install elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

NVCC = shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin" if os.environ.get("CUDA_HOME") else None)
TORCH = util.find_spec("torch")
ARCHITECTURES = "8.0+PTX;9.0a;10.0"
LATER = "`make cuda` in a checkout, or `pip install --no-build-isolation .` beside torch, with nvcc on PATH"


def architectures(text: str) -> dict[str, list[str]]:
    """The code to make from each virtual architecture, ``{"compute_80": ["sm_80", "compute_80"]}``, for a list as in
    TORCH_CUDA_ARCH_LIST, by semicolons or spaces: ``8.0+PTX;9.0a``. Raises OptionError for one that cannot be built.
    """
    found: dict[str, list[str]] = {}
    for entry in re.split(r"[;,\s]+", text.strip(";, ")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None or int(match[1]) < 8:
            raise OptionError(f"TORCH_CUDA_ARCH_LIST has {entry!r}; wanted: 8.0 or newer, such as '{ARCHITECTURES}'")
        name = match[1] + match[2] + match[3]
        found[f"compute_{name}"] = [f"sm_{name}"] + ([f"compute_{name}"] if match[4] else [])
    return found


class BuildCuda(build_ext):
    """Calls nvcc itself: torch's own builder refuses to compile CUDA beside a torch without CUDA."""

    def build_extension(self, ext: Extension) -> None:
        torch, jobs = Path(TORCH.origin).parent, int(os.environ.get("MAX_JOBS") or os.cpu_count())
        code = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
        names = "+".join(name for made in code.values() for name in made)
        toolkit = subprocess.check_output([NVCC, "--version"], text=True).split("release ")[1].split(",")[0]
        flags = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=--warn-on-spills"]
        flags += [f"-I{torch}/include", "-DTORCH_TARGET_VERSION=0x020b000000000000", "--expt-relaxed-constexpr"]
        flags += [f"-DREVISUAL_ARCHITECTURES={names}", f"--threads={jobs}"]
        flags += [f"-gencode=arch={virtual},code=[{','.join(made)}]" for virtual, made in code.items()]
        objects = Path(self.build_temp, f"cuda-{toolkit}-torch-{metadata.version('torch')}-{names}").absolute()
        with ThreadPoolExecutor(jobs) as pool:
            made = list(pool.map(lambda source: self.compiled(source, objects, flags), ext.sources))
        libraries = [f"-L{torch}/lib", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "--cudart=static"]
        self.nvcc("-shared", "--no-device-link", *made, *libraries, out=Path(self.get_ext_fullpath(ext.name)))

    def compiled(self, source: str, objects: Path, flags: list[str]) -> str:
        """The object of ``source``, compiled unless it is newer than that, than every header and than this file."""
        made, needs = objects / f"{Path(source).name}.o", [source, __file__, *Path("csrc").glob("*.cuh")]
        if self.force or not made.exists() or made.stat().st_mtime < max(os.stat(need).st_mtime for need in needs):
            self.nvcc(*flags, "-c", source, out=made)
        return str(made)

    def nvcc(self, *words: str, out: Path) -> None:
        """Makes ``out``, at once and in full, so that nobody who has the old one open is disturbed."""
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [NVCC, *words, "-o", f"{out}.new"]
        print(" ".join(command), flush=True)
        if subprocess.run(command, check=False).returncode:
            raise CompileError(f"nvcc failed to make {out.name}; its messages stand above")
        os.replace(f"{out}.new", out)


if __name__ == "__main__":
    reason = "" if NVCC else "no nvcc in $CUDA_HOME/bin or, where that is not set, on PATH"
    reason = reason if TORCH else "torch is not visible to the build (pip hides it without --no-build-isolation)"
    if reason and "build_ext" in sys.argv:
        sys.exit(f"error: the CUDA kernels cannot be built: {reason}")
    if reason and {"bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv):
        print(f"installing without CUDA kernels: {reason}. To build them later: {LATER}", flush=True)
    sources = sorted(str(path) for path in Path("csrc").iterdir() if path.suffix in (".cpp", ".cu"))
    cuda = [] if reason else [Extension("revisual_fast._C", sources, py_limited_api=True)]
    setup(ext_modules=cuda, cmdclass={"build_ext": BuildCuda}, options={"bdist_wheel": {"py_limited_api": "cp311"}})
