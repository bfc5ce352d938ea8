"""Makes an environment usable whose torchvision, torchaudio or torchcodec were built for another torch than is in it.

vLLM's CPU build asks for all three, and where only their CUDA builds are offered they cannot be imported beside a CPU
build of torch. Nothing is touched that works. Run by ``make test-vllm``, with the environment's own interpreter.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SHIM = Path(__file__).with_name("torchvision_shim.py")


def why_not(package: str) -> str:
    """The last line of the error with which ``package`` cannot be imported; empty if it can, or is not there."""
    code = f"import importlib.util as u\nif u.find_spec({package!r}): import {package}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def main() -> None:
    for package in ("torchaudio", "torchcodec"):
        if error := why_not(package):
            print(f"removing {package}, which cannot be imported and is not needed: {error}")
            subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", package], check=True)
    if error := why_not("torchvision"):
        print(f"installing a shim for torchvision: {error}")
        site = Path(sysconfig.get_path("purelib"))
        shutil.copy(SHIM, site)
        (site / f"{SHIM.stem}.pth").write_text(f"import {SHIM.stem}\n")
        if error := why_not("torchvision"):
            raise SystemExit(f"torchvision cannot be imported: {error}")


if __name__ == "__main__":
    main()
