"""Builds the libraries that are preloaded into the tested processes, and the environments that load them.

`fault_shim.c` makes operations on files fail; `io_recorder.c` records them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

FAULTS, RECORDER = "fault_shim.c", "io_recorder.c"


def why_not() -> str | None:
    """Return the reason why the shims cannot be used here, or None."""
    if sys.platform != "linux":
        return "the fault injection needs LD_PRELOAD and /proc, which only Linux has"
    if shutil.which("gcc") is None:
        return "the fault injection needs gcc"
    return None


def build(folder: Path, source: str = FAULTS) -> Path:
    """Compile a shim into `folder`; returns the library."""
    path = Path(__file__).with_name(source)
    library = folder / f"{path.stem}.so"
    argv = ["gcc", "-Wall", "-Werror", "-O1", "-shared", "-fPIC", "-o", str(library), str(path), "-ldl"]
    subprocess.run(argv, check=True, capture_output=True)
    return library


def environment(library: Path, **settings: str) -> dict[str, str]:
    """Return this process's environment with a shim and its settings, which its source lists."""
    return {**os.environ, "LD_PRELOAD": str(library), **settings}
