"""Identifies the process that holds a lock, by a text that the holder writes next to the lock.

A process number alone is not enough: it may come from another container, or belong to a newer process by now.
"""

import os
import re
import socket
from pathlib import Path

TEXT_MAX_BYTES = 512
_ADDRESS_MAX = 200
_FORM = re.compile(rb"([0-9]{1,10}) ([0-9]*) (\S*) ([^\0\n]*)\n?")


def own_text(address: str = "") -> bytes:
    """Return the text for this process: its number, its start time, its PID namespace and its host.

    Args:
        address: Where it can be reached, if it is a server; the second line.
    """
    line = f"{address}\n" if address.isprintable() and 0 < len(address) <= _ADDRESS_MAX else ""
    return _text_of(os.getpid()) + line.encode()


def address_of(text: bytes) -> str:
    """Return the address in `text`, or "" if the process that wrote it gave none, or does not run here any more."""
    first, _, rest = text.partition(b"\n")
    return rest.decode(errors="replace").strip() if pid_of(first) is not None else ""


def pid_of(text: bytes) -> int | None:
    """Return the number of the process that wrote `text`, or None unless that process certainly still runs here."""
    text = text.partition(b"\n")[0]
    match = _FORM.fullmatch(text)
    if match is None:
        return None
    pid = int(match[1])
    return pid if _is_running(pid) and _text_of(pid).strip() == text.strip() else None


def has_ended(text: bytes) -> bool:
    """Return whether the process that wrote `text` certainly ran in this PID namespace, and does so no more."""
    match = _FORM.fullmatch(text.partition(b"\n")[0])
    if match is None or not match[2] or match[3].decode(errors="replace") != _namespace():
        return False
    state, started = _state(int(match[1])), _start_time(int(match[1]))
    # One that its parent has not reaped yet does nothing any more.
    return started != match[2].decode() or state in ("Z", "X")


def _text_of(pid: int) -> bytes:
    host = socket.gethostname().encode(errors="replace")[:128]
    return f"{pid} {_start_time(pid)} {_namespace()} ".encode() + host + b"\n"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _start_time(pid: int) -> str:
    """The start time of a process, in clock ticks since boot; "" if the system does not report it."""
    fields = fields_of(pid)
    return fields[19] if fields else ""


def _state(pid: int) -> str:
    fields = fields_of(pid)
    return fields[0] if fields else ""


def fields_of(pid: int) -> list[str]:
    """Return what the system says of a process after its name: its state, its parent, ...; [] if it says nothing."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return []
    # The name, in parentheses, may contain anything.
    return content.rpartition(b")")[2].decode().split()


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
