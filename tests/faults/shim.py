"""Building the libraries that are preloaded into what is tested, and the environments that load them.

`fault_shim.c` makes operations on files fail, `io_recorder.c` writes down what they are.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

FAULTS, RECORDER = "fault_shim.c", "io_recorder.c"


def why_not() -> str | None:
    """Why the shims cannot be used here; None where they can."""
    if sys.platform != "linux":
        return "faults are injected by LD_PRELOAD and /proc, which only Linux has"
    if shutil.which("gcc") is None:
        return "there is no gcc to build the fault injection with"
    return None


def build(folder: Path, source: str = FAULTS) -> Path:
    """Compile the shim into `folder`."""
    path = Path(__file__).with_name(source)
    library = folder / f"{path.stem}.so"
    argv = ["gcc", "-Wall", "-Werror", "-O1", "-shared", "-fPIC", "-o", str(library), str(path), "-ldl"]
    subprocess.run(argv, check=True, capture_output=True)
    return library


def environment(library: Path, **settings: str) -> dict[str, str]:
    """This process's environment, with a shim and its settings (its source names them)."""
    return {**os.environ, "LD_PRELOAD": str(library), **settings}
