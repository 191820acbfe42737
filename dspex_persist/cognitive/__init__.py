"""What people program against: a session as a context, its variables as a mapping. Knows no SQL and no wire."""

from dspex_persist.cognitive.context import Context
from dspex_persist.cognitive.variables import Variables

__all__ = ["Context", "Variables"]
