"""The user that runs this process."""

import getpass
import os
from typing import Final

_LONGEST: Final = 100


def user_name() -> str:
    """Return the name of this process's user as printable text of at most 100 characters, or the uid without a name.

    The user of a container may have no entry in the system's list, and the environment may contain any bytes.
    """
    try:
        name = os.fsencode(getpass.getuser()).decode("utf-8", "backslashreplace")
    except (ImportError, KeyError, OSError):
        name = ""
    printable = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)
    return printable[:_LONGEST] or str(os.getuid())
