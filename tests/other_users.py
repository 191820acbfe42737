"""Commands as another user of this machine, for tests that run as root."""

import sys
from typing import Final

_PROGRAM: Final = """
import os, sys
user = int(sys.argv[1])
os.setgroups([]); os.setgid(user); os.setuid(user)
os.execv(sys.argv[2], sys.argv[2:])
"""


def as_user(user: int, *command: str) -> tuple[str, ...]:
    """Return the command that runs a command as a user.

    Not by `user=` of `subprocess`: in a process with gRPC that has threads begin between fork and exec. Now and then
    gRPC then ends the child, as its descriptors are closed there.
    """
    return (sys.executable, "-c", _PROGRAM, str(user), *command)
