"""Around: the base of wrappers around a provider, which have the abilities of the provider that they wrap."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from types import new_class
from typing import Any, Final, Self, TypeVar, Unpack, cast

from dspex_persist.state.abilities import (
    Ability,
    Auditable,
    Derives,
    Durable,
    ExecutesTools,
    Forkable,
    Holdable,
    Importable,
    KeepsOrder,
    Prunable,
    Recordable,
    Restorable,
    SessionHold,
    SessionImport,
    StreamsTools,
    Transaction,
    Transacts,
)
from dspex_persist.state.audit import AuditSource
from dspex_persist.state.commands import Command, Derivation
from dspex_persist.state.model import (
    RECORDING,
    Isolation,
    Origin,
    PrunePolicy,
    PruneReport,
    RestoredSession,
    SessionView,
    ToolSpec,
)
from dspex_persist.state.provider import TOOL_TIMEOUT_S, Progress, StateProvider, Who, silent
from dspex_persist.state.recording import Header, RecordedCommit
from dspex_persist.state.watch import Watch

R = TypeVar("R")


_WHERE: Final = frozenset({"remote", "distributed"})


class Around(StateProvider):
    """A wrapper that passes everything to `provider` that a subclass does not override. Commands come by `submit`.

    A wrapper whose first argument is the provider has the abilities of its class and those of the provider: `__new__`
    creates a class with both. A wrapper with other arguments has to inherit explicitly from the classes below for
    the abilities that it passes on.
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        provider: object = arguments[0] if arguments else options.get("provider")
        parts = _missing(cls, type(provider))
        return cast(Self, super().__new__(_with(cls, parts) if parts else cls))

    def __init__(self, provider: StateProvider) -> None:
        self.provider = provider

    @property
    def capabilities(self) -> frozenset[str]:
        """See `StateProvider.capabilities`: what is not an ability of a class is that of the provider."""
        return super().capabilities | (self.provider.capabilities & _WHERE)

    @property
    def url(self) -> str:
        """See `StateProvider.url`."""
        return self.provider.url

    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """See `StateProvider.submit`."""
        return self.provider.submit(command, origin)

    def read_ahead(self, command: Command[Any], origin: Origin | None = None) -> bool:
        """See `StateProvider.read_ahead`."""
        return self.provider.read_ahead(command, origin)

    def watch(self, session_id: str, identifiers: Sequence[str] = (), *, after_sequence: int | None = None) -> Watch:
        """See `StateProvider.watch`."""
        return self.provider.watch(session_id, identifiers, after_sequence=after_sequence)

    def close(self) -> None:
        """Close the provider."""
        self.provider.close()

    def discard(self) -> None:
        """See `StateProvider.discard`."""
        self.provider.discard()

    def check_open(self) -> None:
        """See `StateProvider.check_open`."""
        self.provider.check_open()

    def default_origin(self, cause: str, idempotency_key: str | None = None) -> Origin:
        """See `StateProvider.default_origin`."""
        return self.provider.default_origin(cause, idempotency_key)


class HandedOn:
    """Passes an ability of `provider` on: the other base of the subclass."""

    provider: StateProvider


class DurableAround(HandedOn, Durable):
    """Passes on that `provider` is durable."""


class OrderAround(HandedOn, KeepsOrder):
    """Passes on that `provider` keeps the order of commands."""


class AuditsAround(HandedOn, Auditable):
    """Passes audits on to `provider`."""

    def audit(self, *, reveal: bool = False) -> AuditSource:
        """See `Auditable.audit`."""
        return Auditable.of(self.provider).audit(reveal=reveal)


class RecordsAround(HandedOn, Recordable):
    """Passes recordings on to `provider`."""

    def record(
        self, session_id: str, *, started: int | None = None, reveal: bool = False, after: int = 0
    ) -> tuple[Header, Iterator[RecordedCommit]]:
        """See `Recordable.record`."""
        return Recordable.of(self.provider).record(session_id, started=started, reveal=reveal, after=after)

    def content_hash(self, session_id: str, *, started: int | None = None) -> str:
        """See `Recordable.content_hash`."""
        return Recordable.of(self.provider).content_hash(session_id, started=started)


class ImportsAround(HandedOn, Importable):
    """Passes imports on to `provider`."""

    def begin_import(self, header: Header, session_id: str | None = None) -> SessionImport:
        """See `Importable.begin_import`."""
        return Importable.of(self.provider).begin_import(header, session_id)


class HoldsAround(HandedOn, Holdable):
    """Passes holds on to `provider`."""

    def hold_session(self, session_id: str, *, timeout_s: float = 30.0, origin: Origin | None = None) -> SessionHold:
        """See `Holdable.hold_session`."""
        return Holdable.of(self.provider).hold_session(session_id, timeout_s=timeout_s, origin=origin)


class DerivesAround(HandedOn, Derives):
    """Passes derivations on to `provider`."""

    def add_derivation(self, session_id: str, derivation: Derivation) -> Callable[[], None]:
        """See `Derives.add_derivation`."""
        return Derives.of(self.provider).add_derivation(session_id, derivation)


class ForksAround(HandedOn, Forkable):
    """Passes forks on to `provider`."""

    def fork_session(
        self, session_id: str, new_session_id: str, at: str = "", *, origin: Origin | None = None
    ) -> SessionView:
        """See `Forkable.fork_session`."""
        return Forkable.of(self.provider).fork_session(session_id, new_session_id, at, origin=origin)


class RestoresAround(HandedOn, Restorable):
    """Passes restoring sessions on to `provider`."""

    def restore_session(self, session_id: str, at: str, *, origin: Origin | None = None) -> RestoredSession:
        """See `Restorable.restore_session`."""
        return Restorable.of(self.provider).restore_session(session_id, at, origin=origin)


class PrunesAround(HandedOn, Prunable):
    """Passes pruning on to `provider`."""

    def prune(self, policy: PrunePolicy, *, confirm: bool, progress: Progress = silent) -> PruneReport:
        """See `Prunable.prune`."""
        return Prunable.of(self.provider).prune(policy, confirm=confirm, progress=progress)


class ToolsAround(HandedOn, ExecutesTools):
    """Passes executions of tools on to `provider`."""

    def list_tools(self, session_id: str = "") -> tuple[ToolSpec, ...]:
        """See `ExecutesTools.list_tools`."""
        return ExecutesTools.of(self.provider).list_tools(session_id)


class StreamsAround(ToolsAround, StreamsTools):
    """Passes streams of tools on to `provider`."""

    def stream_tool(
        self,
        session_id: str,
        tool: str,
        parameters: Mapping[str, object] | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        **who: Unpack[Who],
    ) -> Iterator[object]:
        """See `StreamsTools.stream_tool`."""
        return StreamsTools.of(self.provider).stream_tool(session_id, tool, parameters, metadata=metadata, **who)


class TransactsAround(HandedOn, Transacts):
    """Passes transactions on to `provider`."""

    def submit_transaction(
        self,
        session_id: str,
        *,
        isolation: Isolation | str = Isolation.SERIALIZABLE,
        timeout_s: float = TOOL_TIMEOUT_S,
        metadata: Mapping[str, str] | None = None,
        origin: Origin | None = None,
    ) -> Future[Transaction]:
        """See `Transacts.submit_transaction`."""
        return Transacts.of(self.provider).submit_transaction(
            session_id, isolation=isolation, timeout_s=timeout_s, metadata=metadata, origin=origin
        )

    def submit_recording(
        self,
        session_id: str,
        name: str = RECORDING,
        *,
        metadata: Mapping[str, str] | None = None,
        origin: Origin | None = None,
    ) -> Future[Transaction]:
        """See `Transacts.submit_recording`."""
        return Transacts.of(self.provider).submit_recording(session_id, name, metadata=metadata, origin=origin)


_PARTS: Final[Mapping[type[Ability], type[HandedOn]]] = {
    Durable: DurableAround,
    KeepsOrder: OrderAround,
    Auditable: AuditsAround,
    Recordable: RecordsAround,
    Importable: ImportsAround,
    Holdable: HoldsAround,
    Derives: DerivesAround,
    Forkable: ForksAround,
    Restorable: RestoresAround,
    Prunable: PrunesAround,
    Transacts: TransactsAround,
    StreamsTools: StreamsAround,
    ExecutesTools: ToolsAround,
}


def _missing(wrapper: type, provider: type) -> tuple[type[HandedOn], ...]:
    """Return the classes that pass on the abilities of `provider` that `wrapper` lacks."""
    missing = [ability for ability in _PARTS if issubclass(provider, ability) and not issubclass(wrapper, ability)]
    if StreamsTools in missing:
        # `StreamsTools` includes `ExecutesTools`.
        missing = [ability for ability in missing if ability is not ExecutesTools]
    return tuple(_PARTS[ability] for ability in missing)


@cache
def _with(wrapper: "type[Around]", parts: tuple[type[HandedOn], ...]) -> "type[Around]":
    facts = {"__module__": wrapper.__module__, "__qualname__": wrapper.__qualname__, "__doc__": wrapper.__doc__}
    return new_class(wrapper.__name__, (wrapper, *parts), exec_body=lambda body: body.update(facts))
