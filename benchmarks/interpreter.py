"""How a Python was built, which decides how fast everything here is: `python benchmarks/interpreter.py`

Prints it in a line. Exit code: 0 for an optimized Python that fits, 3 for another one that fits, 1 for one that does
not fit, because it is too old or cannot make environments. Old ones have to read this file, hence its plain syntax.
"""

import sys
import sysconfig
from typing import NamedTuple


class Build(NamedTuple):
    """`optimized`: its records, or its distributor's, say that a profile guided its compiler (PGO)."""

    optimized: bool
    how: str


def describe_build() -> Build:
    """How this interpreter was built, by its own records."""
    options = sysconfig.get_config_var("CONFIG_ARGS") or ""
    if sysconfig.get_config_var("Py_DEBUG"):
        return Build(False, "a debug build")
    if "deb_system" in sysconfig.get_scheme_names():
        # Debian optimizes the interpreter that it ships, but its records are those of the shared library, which it
        # does not optimize.
        return Build(True, "PGO and LTO, by Debian")
    if "--enable-optimizations" in options:
        return Build(True, "PGO and LTO" if "--with-lto" in options else "PGO, without LTO")
    if not options:
        return Build(False, "unknown build options")
    return Build(False, "built without PGO")


def _is_fit() -> bool:
    """Return whether the package runs on it; on Debian, the module that creates environments is a separate package."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return False
    return sys.version_info >= (3, 11)


def main() -> int:
    """Print how this Python was built; the exit code says whether it fits."""
    build = describe_build()
    print("Python {} ({})".format(sys.version.split()[0], build.how))  # noqa: UP032
    if not _is_fit():
        return 1
    return 0 if build.optimized else 3


if __name__ == "__main__":
    sys.exit(main())
