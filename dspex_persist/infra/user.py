"""Who runs this process."""

import getpass
import os
from typing import Final

_LONGEST: Final = 100


def user_name() -> str:
    """The name of this process's user as text that can be kept and sent, or the number where there is no name.

    A container's user may have no entry in the system's list, and what the environment says may be anything.
    """
    try:
        name = os.fsencode(getpass.getuser()).decode("utf-8", "backslashreplace")
    except (ImportError, KeyError, OSError):
        name = ""
    printable = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)
    return printable[:_LONGEST] or str(os.getuid())
