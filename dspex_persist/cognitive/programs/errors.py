"""Errors about saved programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dspex_persist.errors import DspexError
from dspex_persist.spelling import quote

_MOST_SHOWN: Final = 20


@dataclass(eq=False)
class ProgramError(DspexError):
    """Something is wrong with a saved program, or with saving or loading it.

    Attributes:
        name: The name of the program.
    """

    name: str


@dataclass(eq=False)
class ProgramNotFoundError(ProgramError, KeyError):
    """There is no such program, version or tag.

    Attributes:
        reason: What is missing, and what there is instead.
    """

    reason: str

    def __str__(self) -> str:
        return f"program {quote(self.name)}: {self.reason}"


@dataclass(eq=False)
class ProgramNotSavedError(ProgramError):
    """A module has something that cannot be stored as data; nothing was written.

    Attributes:
        reason: What it is, and what to do.
    """

    reason: str

    def __str__(self) -> str:
        return f"program {quote(self.name)} cannot be saved: {self.reason}"


@dataclass(eq=False)
class DamagedProgramError(ProgramError):
    """What the variable of a program contains is not a program that this release can read.

    Attributes:
        version: The version of the variable.
        reason: What is wrong with it.
    """

    version: int
    reason: str

    def __str__(self) -> str:
        return f"version {self.version} of program {quote(self.name)} cannot be read: {self.reason}"


@dataclass(eq=False)
class ProgramMismatchError(ProgramError):
    """A saved program does not fit the module that it is loaded into; the module is unchanged.

    Attributes:
        version: The version of the program.
        differences: What does not fit, one sentence each.
    """

    version: int
    differences: Sequence[str]

    def __str__(self) -> str:
        listed = "".join(f"\n- {difference}" for difference in self.differences[:_MOST_SHOWN])
        more = len(self.differences) - _MOST_SHOWN
        listed += f"\n- and {more} more: see .differences" if more > 0 else ""
        return (
            f"version {self.version} of program {quote(self.name)} does not fit the module, which is unchanged; load "
            f"it into a module like the saved one, or what fits of it with strict=False:{listed}"
        )
