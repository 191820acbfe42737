"""Who holds a lock, as the holder writes it beside the lock and as others may take it.

A number alone names nobody: it may be of another container, or have been given to another process since.
"""

import os
import re
import socket
from pathlib import Path

TEXT_MAX_BYTES = 256
_FORM = re.compile(rb"([0-9]{1,10}) ([0-9]*) (\S*) ([^\0\n]*)\n?")


def written() -> bytes:
    """What this process writes: its number, when it began, its namespace of numbers and its host."""
    return _written(os.getpid())


def named(text: bytes) -> int | None:
    """The number of the process that wrote `text`; None unless it is certain whom that number means here and now."""
    match = _FORM.fullmatch(text)
    if match is None:
        return None
    pid = int(match[1])
    return pid if _is_there(pid) and _written(pid).strip() == text.strip() else None


def _written(pid: int) -> bytes:
    host = socket.gethostname().encode(errors="replace")[:128]
    return f"{pid} {_began(pid)} {_namespace()} ".encode() + host + b"\n"


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did; "" where the system does not tell."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    # The name, in parentheses, may contain anything.
    return content.rpartition(b")")[2].split()[19].decode()


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
