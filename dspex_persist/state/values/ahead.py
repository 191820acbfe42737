"""Parse the values of a command in advance, so that the thread that carries it out only looks up the results."""

from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from dspex_persist.state.errors import StateError, VariableReplacedError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.values.constraints import compile_constraints, count_matching
from dspex_persist.state.values.normalisation import normalise, spell

SHORT_JSON: Final = 1024
"""Up to this many characters of JSON in a command, parsing in advance is not worth its overhead."""
LONG_JSON: Final = 16 * 1024
"""From this many characters of JSON on, parsing would block an event loop too long."""


class Described(Protocol):
    """The facts about a variable that parsing a value for it requires."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def constraints(self) -> str: ...


Find: TypeAlias = Callable[[str], Described | None]
"""Returns the variable with a name or id, or None."""
FindType: TypeAlias = Callable[[str], str | None]
"""Returns the type of the variable that has a name or id, or had it last; None if none ever had it."""
Spell: TypeAlias = Callable[[str, str | None, Value], Value]
"""Takes a name or id, a type and a value, and returns the value in the canonical spelling; see `values.spell`."""


class ReadAhead:
    """The results of parsing the values of one command, each for the variable that its name meant at that time.

    When the command's turn comes, the name may mean another variable. Then the value is parsed again at once; or, if
    `strict`, `VariableReplacedError` is raised, so that the caller can parse it again and retry.
    """

    __slots__ = ("_matching", "_outcomes", "_spellings", "_strict", "canonical_form", "fingerprint", "limits")

    def __init__(self, limits: Limits, *, strict: bool = False) -> None:
        self.limits = limits
        self._strict = strict
        self._matching = 0
        self._outcomes: dict[_Place, tuple[str, Value | StateError]] = {}
        self._spellings: dict[tuple[int, str | None], Value] = {}
        self.canonical_form: object = None
        self.fingerprint = ""
        """The fingerprint of `canonical_form`, the command in canonical spelling."""

    def read(self, variable: Described, value: Value) -> None:
        """Parse `value` for the variable, and store the result or the error."""
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
            # The error is kept until the command's turn; without this it would keep its frames alive.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            outcome = error
        self._outcomes[place] = name, outcome

    def spell(self, _name: str, type_name: str | None, value: Value) -> Value:
        """Return the value in the canonical spelling of its type, which is cached."""
        place = (id(value), type_name)
        if place not in self._spellings:
            self._spellings[place] = spell(type_name, value, self.limits)
        return self._spellings[place]

    def find(self, variable: Described, value: Value, limits: Limits) -> Value | None:
        """Return the parsed value for this variable; None if it has to be parsed now.

        Raises:
            StateError: The error that parsing it raised.
            VariableReplacedError: It was parsed for another variable, and this object is strict.
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
        """Return the canonical spelling; see `find`."""
        if limits is not self.limits:
            return None
        spelled = self._spellings.get((id(value), type_name))
        if spelled is None and self._strict:
            raise VariableReplacedError(identifier)
        return spelled


_Place: TypeAlias = tuple[int, str, str]


def _place(variable: Described, value: Value) -> _Place:
    # The command keeps the value alive, so no other object can get its id.
    return id(value), variable.type, variable.constraints
