"""The server as it is, but for its reader of JSON, which notes on what thread it reads large texts:
`python -m tests.end_to_end.noting_server FOLDER serve ...`. Where FOLDER has a file `hold`, it waits at that gate.
Its tool is found with `--tools tests.end_to_end.noting_server`.
"""

import sys
import threading
from pathlib import Path
from typing import Final

from dspex_persist import ToolContext, tool
from dspex_persist.cli import main
from dspex_persist.state.values import json_text
from tests.end_to_end.gates import wait_at

LARGE: Final = 64 * 1024
"""Characters of what is noted."""


def plant(folder: Path) -> None:
    """Have each reading of a large text noted in `folder`, a line with its thread."""
    read, lock = json_text.read, threading.Lock()

    def noting(text: str) -> object:
        if len(text) > LARGE:
            with lock, (folder / "notes").open("a") as notes:
                notes.write(f"{threading.current_thread().name}\n")
            if (folder / "hold").exists():
                wait_at(str(folder))
        return read(text)

    json_text.read = noting


@tool
def stay(ctx: ToolContext, gate: str) -> None:
    """Says in a file what its execution is called, and runs until it may end."""
    Path(gate, "id").write_text(ctx.execution_id)
    wait_at(gate, ctx, name="inside", until="end")


if __name__ == "__main__":
    plant(Path(sys.argv.pop(1)))
    main()
