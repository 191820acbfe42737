"""What is read of values before their turn: whoever carries a command out, and holds up others, only looks it up."""

from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from dspex_persist.state.errors import StateError, VariableReplacedError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.values.constraints import compile_constraints, count_matching
from dspex_persist.state.values.normalisation import normalise, spell

LITTLE: Final = 1024
"""Characters of JSON, all values of a command together, that are read faster than anything is prepared for it."""
MUCH: Final = 16 * 1024
"""Characters of JSON that an event loop does not read itself."""


class Described(Protocol):
    """What has to be known of a variable to read a value for it."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def constraints(self) -> str: ...


Find: TypeAlias = Callable[[str], Described | None]
"""The variable of a name or id; None if there is none."""
FindType: TypeAlias = Callable[[str], str | None]
"""The type of the variable that has a name or id, or had it last; None if none ever had."""
Spell: TypeAlias = Callable[[str, str | None, Value], Value]
"""The value, for a variable of a name or id, in the one spelling of its type; see `values.spell`."""


class ReadAhead:
    """What came of reading the values of one command, each as a value of the variable that it was for at that time.

    By the time of its turn that may be another variable. Then its value is read at once; if `strict`, it is not, but
    `VariableReplacedError`, so that the caller has it read again and comes back.
    """

    __slots__ = ("_matching", "_outcomes", "_spellings", "_strict", "fingerprint", "limits", "meant")

    def __init__(self, limits: Limits, *, strict: bool = False) -> None:
        self.limits = limits
        self._strict = strict
        self._matching = 0
        self._outcomes: dict[_Place, tuple[str, Value | StateError]] = {}
        self._spellings: dict[tuple[int, str | None], Value] = {}
        self.meant: object = None
        self.fingerprint = ""
        """That of `meant`, the command in one spelling of the many that mean the same."""

    def read(self, variable: Described, value: Value) -> None:
        """Read `value` as one of the variable, whatever comes of it."""
        place = _place(variable, value)
        if place in self._outcomes:
            return
        name, type_name = variable.name, variable.type
        outcome: Value | StateError
        try:
            constraints = compile_constraints(name, type_name, variable.constraints)
            self._matching = count_matching(self._matching, name, constraints.program_size * len(value.json))
            outcome = normalise(name, type_name, constraints, value, self.limits)
            self._spellings[id(value), type_name] = outcome
        except StateError as error:
            # It waits for its turn: the frames that it came through would wait with it, and all that they hold.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            outcome = error
        self._outcomes[place] = name, outcome

    def spell(self, _name: str, type_name: str | None, value: Value) -> Value:
        """The value in the one spelling of its type, which is remembered."""
        place = (id(value), type_name)
        if place not in self._spellings:
            self._spellings[place] = spell(type_name, value, self.limits)
        return self._spellings[place]

    def find(self, variable: Described, value: Value, limits: Limits) -> Value | None:
        """What came of it as a value of this variable; None if it has to be read now.

        Raises what reading it raised, and `VariableReplacedError` where it was read for another one.
        """
        if limits is not self.limits:
            return None
        name, outcome = self._outcomes.get(_place(variable, value), ("", None))
        if isinstance(outcome, Value):
            return outcome
        if outcome is not None and name == variable.name:
            raise outcome
        if self._strict:
            raise VariableReplacedError(variable.name)
        return None

    def find_spelling(self, identifier: str, type_name: str | None, value: Value, limits: Limits) -> Value | None:
        """The same for its spelling."""
        if limits is not self.limits:
            return None
        spelled = self._spellings.get((id(value), type_name))
        if spelled is None and self._strict:
            raise VariableReplacedError(identifier)
        return spelled


_Place: TypeAlias = tuple[int, str, str]


def _place(variable: Described, value: Value) -> _Place:
    # The command holds on to the value, so nothing else gets its identity.
    return id(value), variable.type, variable.constraints
