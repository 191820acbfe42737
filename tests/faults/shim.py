"""Building the preloaded library that makes writes fail (`fault_shim.c`), and the environment that loads it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("fault_shim.c")


def why_not() -> str | None:
    """Why the shim cannot be used here; None where it can."""
    if sys.platform != "linux":
        return "faults are injected by LD_PRELOAD and /proc, which only Linux has"
    if shutil.which("gcc") is None:
        return "there is no gcc to build the fault injection with"
    return None


def build(folder: Path) -> Path:
    """Compile the shim into `folder`."""
    library = folder / "fault_shim.so"
    argv = ["gcc", "-Wall", "-Werror", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(argv, check=True, capture_output=True)
    return library


def environment(library: Path, **faults: str) -> dict[str, str]:
    """This process's environment, with the shim and its settings (`fault_shim.c` names them)."""
    return {**os.environ, "LD_PRELOAD": str(library), **faults}
