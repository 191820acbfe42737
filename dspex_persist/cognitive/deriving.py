"""Derived variables: computed from others by a function of this process, in the same commit."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from dspex_persist.cognitive.backends import Backend
from dspex_persist.cognitive.records import decode
from dspex_persist.infra.logs import get_logger
from dspex_persist.state import values
from dspex_persist.state.abilities import Derives
from dspex_persist.state.commands import Derivation
from dspex_persist.state.errors import StateError
from dspex_persist.state.model import Value, Variable

_logger: Final = get_logger(__name__)


class Derived:
    """A derived variable of a context. It goes along when the session moves, as long as it stays in this process."""

    def __init__(
        self, backend: Backend, session_id: str, target: Variable, inputs: tuple[str, ...], function: Callable[..., Any]
    ) -> None:
        self._backend = backend
        self._session_id = session_id
        self._type = target.type
        self._inputs = inputs
        self._function = function
        self._derivation = Derivation(target.name, inputs, self._compute)
        self._remove = Derives.of(backend.provider).add_derivation(session_id, self._derivation)
        backend.followers.add(self)

    @property
    def target(self) -> str:
        """The name of the variable."""
        return self._derivation.target

    def _compute(self, variables: Mapping[str, Variable]) -> Value:
        result = self._function(*(decode(variables[name]) for name in self._inputs))
        return values.encode_for(result, lambda: self._type, name=self._derivation.target)

    def follow(self) -> None:
        """See `Follower`."""
        self._remove()
        try:
            state = Derives.of(self._backend.provider)
            self._remove = state.add_derivation(self._session_id, self._derivation)
        except StateError as error:
            _logger.warning("variable is not derived any more", name=self._derivation.target, reason=str(error))

    def close(self) -> None:
        """Do not compute it any more. It keeps its value."""
        self._backend.followers.discard(self)
        self._remove()
