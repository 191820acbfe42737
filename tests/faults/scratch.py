"""A folder for thousands of temporary files."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """Make a folder, if possible in memory, where a sync costs nothing; it is kept after a failure."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=memory if usable else None))
    yield folder
    shutil.rmtree(folder)
