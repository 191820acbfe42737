"""A folder for files that are written and thrown away by the thousand."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A folder in memory, where there is one (a sync costs nothing there); kept if something goes wrong."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=memory if usable else None))
    yield folder
    shutil.rmtree(folder)
