"""Commands for variables: register, read, write, delete, query the history, roll back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from dspex_persist.state import values
from dspex_persist.state.arguments import Number, Version
from dspex_persist.state.commands.base import FEW, Command, Reads, check_merged_metadata, check_metadata, check_text
from dspex_persist.state.errors import (
    InvalidArgumentError,
    LimitExceededError,
    StateError,
    VariableExistsError,
    VariableLockedError,
    VariableNotFoundError,
    VariableReplacedError,
    VersionConflictError,
    VersionNotFoundError,
    VersionPrunedError,
    quote,
)
from dspex_persist.state.globs import compile_glob
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    BatchOutcome,
    ChangeKind,
    Source,
    Value,
    Variable,
    VariablesFound,
    VariableVersion,
)
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import Savepoint, UnitOfWork, VersionQuery

DEFAULT_HISTORY = 100
_LONGEST_IDENTIFIER = 4096
_FEW_NAMES = 500
_MOST_HINTS = 10
"""How many errors of a batch suggest a similar name."""
_MOST_ROUNDS = 5
"""How often a batch is tried without the entries that rules refuse; after that, all others are refused, too."""


@dataclass(frozen=True, slots=True)
class RegisterVariable(Command[str]):
    """Register a variable at version 0, and return its id.

    If the name is registered already with the same type and constraints, that variable keeps its value.
    """

    name: str
    type: str
    value: Value
    constraints: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = str

    def apply(self, uow: UnitOfWork) -> str:
        state = uow.session(self.session_id)
        check_facts(self.name, self.constraints, self.metadata, uow.limits)
        constraints = values.compile_constraints(self.name, self.type, self.constraints)
        existing = state.variables.get(self.name)
        if existing is not None:
            return self._resume(existing, constraints)
        if self.name in state.names:
            raise InvalidArgumentError("name", f"{quote(self.name)} is the id of another variable in this session")
        check_room(state, uow.limits)
        variable = Variable(
            id=f"var_{self.name}_{uow.new_token()}",
            name=self.name,
            type=self.type,
            value=_normalised(uow, self.ahead, self, constraints, self.value),
            version=0,
            constraints=constraints.json,
            metadata=self.metadata,
            source=source_of(self.metadata, uow.origin.source),
            updated_at=uow.now,
        )
        uow.add_variable(self.session_id, variable)
        return variable.id

    @property
    def is_small(self) -> bool:
        """See `Command`."""
        return self.value.size_bytes <= values.SHORT_JSON

    @property
    def json_length(self) -> int:
        """See `Command`."""
        return len(self.value.json)

    def _read_values(self, ahead: values.ReadAhead, find: values.Find) -> None:
        # An existing variable keeps its value.
        if find(self.name) is None:
            ahead.read(self, self.value)

    def canonical_form(self, find_type: values.FindType, spell: values.Spell) -> "RegisterVariable":
        """See `Command.canonical_form`: with the value and the constraints in a canonical spelling."""
        try:
            constraints = values.compile_constraints(self.name, self.type, self.constraints).meaning
        except StateError:
            constraints = self.constraints
        return replace(self, value=spell(self.name, self.type, self.value), constraints=constraints)

    def _resume(self, existing: Variable, constraints: values.Constraints) -> str:
        if existing.type != self.type:
            raise VariableExistsError(self.name, f"its type is {existing.type}, not {self.type}")
        known = values.compile_constraints(self.name, self.type, existing.constraints)
        if known.meaning != constraints.meaning:
            difference = f"its constraints are {known.json or 'none'}, not {constraints.json or 'none'}"
            raise VariableExistsError(self.name, difference)
        return existing.id


@dataclass(frozen=True, slots=True)
class RegisterVariables(Command[tuple[str, ...]]):
    """Register several variables in one commit, all or none of them, and return their ids. See `RegisterVariable`."""

    definitions: tuple[RegisterVariable, ...]

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = tuple[str, ...]

    def __post_init__(self) -> None:
        Command.__post_init__(self)
        for definition in self.definitions:
            if self.fault is None and definition.fault is not None:
                object.__setattr__(self, "fault", definition.fault)
            elif self.fault is None and definition.session_id != self.session_id:
                reason = f"{quote(definition.session_id)} is not the session of all, {quote(self.session_id)}"
                object.__setattr__(self, "fault", InvalidArgumentError("session_id", reason))

    def apply(self, uow: UnitOfWork) -> tuple[str, ...]:
        uow.session(self.session_id)
        if len(self.definitions) > uow.limits.batch_entries:
            limit = uow.limits.batch_entries
            raise LimitExceededError("number of definitions", len(self.definitions), limit, "batch_entries")
        return tuple([definition.apply(uow) for definition in self.definitions])

    @property
    def is_small(self) -> bool:
        """See `Command`."""
        sizes = [definition.value.size_bytes for definition in self.definitions]
        return len(sizes) <= FEW and sum(sizes) <= values.SHORT_JSON

    @property
    def json_length(self) -> int:
        """See `Command`."""
        return sum(definition.json_length for definition in self.definitions)

    def _read_values(self, ahead: values.ReadAhead, find: values.Find) -> None:
        for definition in self.definitions:
            definition._read_values(ahead, find)
            object.__setattr__(definition, "ahead", ahead)

    def canonical_form(self, find_type: values.FindType, spell: values.Spell) -> "RegisterVariables":
        """See `Command.canonical_form`."""
        return replace(self, definitions=tuple(each.canonical_form(find_type, spell) for each in self.definitions))


@dataclass(frozen=True, slots=True)
class GetVariable(Command[Variable]):
    """Return a variable by name or id."""

    identifier: str
    bypass_cache: bool = False

    @property
    def reads(self) -> Reads:
        return Reads.FILE if self.bypass_cache else Reads.CURRENT

    def apply(self, uow: UnitOfWork) -> Variable:
        return uow.variable(self.session_id, self.identifier)


@dataclass(frozen=True, slots=True)
class GetVariables(Command[VariablesFound]):
    """Return several variables as of one moment, by name or id."""

    identifiers: Sequence[str]
    bypass_cache: bool = False

    @property
    def reads(self) -> Reads:
        return Reads.FILE if self.bypass_cache else Reads.CURRENT

    def apply(self, uow: UnitOfWork) -> VariablesFound:
        state = uow.session(self.session_id)
        if len(self.identifiers) > uow.limits.batch_entries:
            limit = uow.limits.batch_entries
            raise LimitExceededError("number of variables in the batch", len(self.identifiers), limit, "batch_entries")
        variables: dict[str, Variable] = {}
        missing: dict[str, None] = {}
        for identifier in self.identifiers:
            variable = state.find(identifier)
            if variable is None:
                missing[identifier] = None
            else:
                variables[identifier] = variable if variable.optimization is None else uow.current(variable)
        return VariablesFound(variables, tuple(missing))


@dataclass(frozen=True, slots=True)
class ListVariables(Command[tuple[Variable, ...]]):
    """Return the variables whose whole name matches a glob with `*` and `?`, oldest first; "" matches all."""

    pattern: str = ""

    def takes_long(self, state: SessionState) -> bool:
        """See `Command.takes_long`. A glob is matched with each character of each name."""
        return bool(self.pattern) and len(state.variables) > _FEW_NAMES

    def apply(self, uow: UnitOfWork) -> tuple[Variable, ...]:
        state = uow.session(self.session_id)
        variables: Iterable[Variable] = state.variables.values()
        if self.pattern:
            if len(self.pattern) > uow.limits.name_length:
                limit = uow.limits.name_length
                raise LimitExceededError("length of the pattern", len(self.pattern), limit, "name_length")
            fits = compile_glob(self.pattern)
            variables = [variable for variable in variables if fits(variable.name)]
        return tuple(map(uow.current, variables) if state.has_locks else variables)


@dataclass(frozen=True, slots=True)
class SetVariable(Command[int]):
    """Write a value, and return the new version's number. `expected_version`: only if that is the current version."""

    identifier: str
    value: Value
    metadata: Mapping[str, str] = field(default_factory=dict)
    expected_version: Number | None = None

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = int

    def apply(self, uow: UnitOfWork) -> int:
        variable = uow.variable(self.session_id, self.identifier)
        _check_version(variable, self.expected_version)
        metadata = check_metadata(self.metadata, uow.limits)
        source = source_of(metadata, uow.origin.source)
        return write_value(uow, self, variable, self.value, metadata, source).version

    @property
    def is_small(self) -> bool:
        """See `Command`."""
        return self.value.size_bytes <= values.SHORT_JSON

    @property
    def json_length(self) -> int:
        """See `Command`."""
        return len(self.value.json)

    def _read_values(self, ahead: values.ReadAhead, find: values.Find) -> None:
        read_updates(ahead, find, {self.identifier: self.value})

    def canonical_form(self, find_type: values.FindType, spell: values.Spell) -> "SetVariable":
        """See `Command.canonical_form`: with the value in a canonical spelling."""
        return replace(self, value=spell(self.identifier, find_type(self.identifier), self.value))

    def _request(self) -> dict[str, Any]:
        # Older releases recorded 0 for any version; with this, fingerprints in their files still match.
        expected = self.expected_version
        recorded = {None: 0, 0: "0"}.get(expected, expected)
        return asdict(self) | {"expected_version": recorded}


@dataclass(frozen=True, slots=True)
class ConstrainVariable(Command[int]):
    """Give a variable other constraints and a value that satisfies them, in one commit; return the new version.

    If the constraints have another `schema_version`, the commit's cause is that migration, such as
    `migration profile 1->2`. If neither the constraints nor the value change, nothing is written.

    Attributes:
        identifier: The variable's name or id.
        constraints: The new constraints, as JSON.
        value: The new value; None keeps the current one, which then has to satisfy them.
        metadata: Texts to store with the version.
        expected_version: Only if that is the current version.
    """

    identifier: str
    constraints: str
    value: Value | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    expected_version: Number | None = None

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = int

    def apply(self, uow: UnitOfWork) -> int:
        variable = uow.variable(self.session_id, self.identifier)
        _check_version(variable, self.expected_version)
        check_facts(variable.name, self.constraints, {}, uow.limits)
        metadata = check_metadata(self.metadata, uow.limits)
        source = source_of(metadata, uow.origin.source)
        check_lock(variable, metadata)
        constraints = values.compile_constraints(variable.name, variable.type, self.constraints)
        constrained = variable._replace(constraints=constraints.json)
        value = variable.value if self.value is None else self.value
        if constraints.program_size:
            uow.count_matching(variable.name, constraints.program_size * len(value.json))
        normalised = _normalised(uow, self.ahead, constrained, constraints, value)
        if constraints.json == variable.constraints and normalised == variable.value and not metadata:
            return variable.version
        if metadata:
            check_merged_metadata({**variable.metadata, **metadata}, metadata, uow.limits)
        _name_migration(uow, variable, constraints.json)
        if constraints.json != variable.constraints:
            variable = uow.constrain(self.session_id, variable, constraints.json)
        return uow.write(self.session_id, variable, normalised, metadata, source).version

    @property
    def json_length(self) -> int:
        """See `Command`."""
        return len(self.constraints) + (len(self.value.json) if self.value is not None else 0)

    def _read_values(self, ahead: values.ReadAhead, find: values.Find) -> None:
        variable = find(self.identifier)
        if variable is None or self.value is None:
            return
        try:
            constraints = values.compile_constraints(variable.name, variable.type, self.constraints)
        except StateError:
            return
        ahead.read(_Constrained(variable.name, variable.type, constraints.json), self.value)

    def canonical_form(self, find_type: values.FindType, spell: values.Spell) -> "ConstrainVariable":
        """See `Command.canonical_form`: with the value in a canonical spelling."""
        if self.value is None:
            return self
        return replace(self, value=spell(self.identifier, find_type(self.identifier), self.value))


@dataclass(frozen=True, slots=True)
class _Constrained:
    """What reading a value ahead requires of a variable; see `values.Described`."""

    name: str
    type: str
    constraints: str


def _check_version(variable: Variable, expected: int | None) -> None:
    if expected not in (None, variable.version):
        if expected < 0:
            raise InvalidArgumentError("expected_version", f"{expected} is below 0: versions count from 0")
        raise VersionConflictError(variable.name, expected, variable.version)


def _name_migration(uow: UnitOfWork, variable: Variable, constraints: str) -> None:
    """Set the cause of the commit if it changes the version of the variable's schema; an execution's stays."""
    before, after = values.schema_version(variable.constraints), values.schema_version(constraints)
    if before != after and uow.origin.cause == ConstrainVariable.__name__:
        cause = f"migration {variable.name} {before or 0}->{after or 0}"
        uow.origin = replace(uow.origin, cause=cause)


@dataclass(frozen=True, slots=True)
class SetVariables(Command[BatchOutcome]):
    """Write several values in one commit: all or none if `atomic`, else the valid ones.

    Attributes:
        updates: The values by name or id.
        metadata: Metadata for each version.
        atomic: Whether to write nothing if one of them is refused.
        refused: Error messages by identifier for entries that could not even be decoded.
        raises: Whether an atomic batch fails with the error of an entry that is refused, as SetVariable does. Otherwise
            its outcome has the messages of all.
    """

    updates: Mapping[str, Value]
    metadata: Mapping[str, str] = field(default_factory=dict)
    atomic: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    raises: bool = False

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = BatchOutcome

    def apply(self, uow: UnitOfWork) -> BatchOutcome:
        uow.session(self.session_id)
        if len(self.updates) > uow.limits.batch_entries:
            limit = uow.limits.batch_entries
            raise LimitExceededError("number of updates in the batch", len(self.updates), limit, "batch_entries")
        metadata = check_metadata(self.metadata, uow.limits)
        source = source_of(metadata, uow.origin.source)
        start = uow.savepoint()
        versions: dict[str, int] = {}
        errors = dict(self.refused)
        left = dict(self.updates)
        for round_number in range(_MOST_ROUNDS):
            versions = self._stage(uow, left, metadata, source, errors)
            if self.atomic and (errors or self.raises):
                break
            refused = self._refused_by_rules(uow, versions, start, every=round_number == _MOST_ROUNDS - 1)
            if not refused:
                break
            # What a rule refuses is left out, and the rest is tried again: rules see it without those entries.
            errors |= refused
            uow.rollback_to(start)
            left = {identifier: value for identifier, value in left.items() if identifier not in errors}
            versions = {}
        if self.atomic and errors:
            uow.rollback_to(start)
            return BatchOutcome(success=False, versions={}, errors=errors)
        return BatchOutcome(success=bool(versions) or not errors, versions=versions, errors=errors)

    def _stage(
        self,
        uow: UnitOfWork,
        updates: Mapping[str, Value],
        metadata: Mapping[str, str],
        source: Source,
        errors: dict[str, str],
    ) -> dict[str, int]:
        """Write the updates that are valid, and return their versions; add the errors of the others to `errors`."""
        start, versions, refusals = uow.savepoint(), dict[str, int](), dict[str, StateError]()
        for identifier, value in updates.items():
            before = uow.savepoint()
            try:
                variable = uow.variable(self.session_id, identifier, hint=len(refusals) < _MOST_HINTS)
                versions[identifier] = write_value(uow, self, variable, value, metadata, source).version
            except VariableReplacedError:
                uow.rollback_to(start)
                raise
            except StateError as error:
                uow.rollback_to(before)
                refusals[identifier] = error
        if refusals and self.atomic and self.raises:
            # By name, as a request over gRPC has no order.
            raise refusals[min(refusals)]
        # Without the advice, which is worded differently at each interface: this is stored as the outcome.
        errors |= {identifier: error.sentence for identifier, error in refusals.items()}
        return versions

    def _refused_by_rules(
        self, uow: UnitOfWork, versions: Mapping[str, int], start: Savepoint, *, every: bool
    ) -> dict[str, str]:
        """Return the errors of the entries that rules refuse, by identifier; of all entries if `every`."""
        violations = [] if uow.rules_deferred else uow.violations(start)
        refused: dict[str, str] = {}
        for error, names in violations:
            for identifier in versions:
                if every or not names or uow.variable(self.session_id, identifier).name in names:
                    refused.setdefault(identifier, error.sentence)
        return refused

    @property
    def is_small(self) -> bool:
        """See `Command`."""
        return len(self.updates) <= FEW and sum(each.size_bytes for each in self.updates.values()) <= values.SHORT_JSON

    @property
    def json_length(self) -> int:
        """See `Command`."""
        return sum(len(value.json) for value in self.updates.values())

    def _read_values(self, ahead: values.ReadAhead, find: values.Find) -> None:
        read_updates(ahead, find, self.updates)

    def canonical_form(self, find_type: values.FindType, spell: values.Spell) -> "SetVariables":
        """See `Command.canonical_form`: with the values in a canonical spelling."""
        spelled = {name: spell(name, find_type(name), value) for name, value in self.updates.items()}
        return replace(self, updates=spelled)

    def _request(self) -> dict[str, Any]:
        # It changes how a refusal is reported, and refusals that are raised are not recorded.
        request = asdict(self)
        del request["raises"]
        return request


@dataclass(frozen=True, slots=True)
class DeleteVariable(Command[None]):
    """Delete a variable. Its history stays, and ends with the deletion."""

    identifier: str

    writes: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> None:
        variable = uow.variable(self.session_id, self.identifier)
        if variable.optimization is not None:
            raise VariableLockedError(variable.name, variable.optimization.optimizer_id)
        uow.delete_variable(self.session_id, uow.drop_ended_lock(self.session_id, variable))


@dataclass(frozen=True, slots=True)
class GetVariableHistory(Command[list[VariableVersion]]):
    """Return the newest versions of a variable, live or deleted, newest first.

    Attributes:
        identifier: The variable's name or id.
        limit: How many versions to return at most; 0 means 100.
        before: Only versions with lower numbers.
        most_bytes: Stop once the versions reach this size. Query the rest with `before`.
        as_of: A commit; a name means the variable that had it at that commit, or had it last before.
    """

    identifier: str
    limit: Number = 0
    before: Version | None = None
    most_bytes: int | None = None
    as_of: int | None = None

    @property
    def reads(self) -> Reads:
        return Reads.HISTORY

    def apply(self, uow: UnitOfWork) -> list[VariableVersion]:
        most = uow.limits.history_entries
        if self.limit < 0:
            raise InvalidArgumentError("limit", f"{self.limit} is below 0; 0 means {DEFAULT_HISTORY}")
        if self.limit > most:
            raise LimitExceededError("limit of the history", self.limit, most, "history_entries")
        if len(self.identifier) > max(_LONGEST_IDENTIFIER, 2 * uow.limits.name_length):
            # No name is that long, and SQLAlchemy would hold megabytes of it until the next garbage collection.
            uow.session(self.session_id)
            raise VariableNotFoundError(self.session_id, self.identifier)
        limit = self.limit or DEFAULT_HISTORY
        query = VersionQuery(self.identifier, limit, self.before, self.most_bytes, self.as_of)
        return uow.history(self.session_id, query)


@dataclass(frozen=True, slots=True)
class RollbackVariable(Command[Variable]):
    """Write the value of an earlier version as a new version."""

    identifier: str
    target_version: Number

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = Variable

    def apply(self, uow: UnitOfWork) -> Variable:
        variable = uow.variable(self.session_id, self.identifier)
        metadata = {"rolled_back_to": str(self.target_version)}
        if uow.origin.optimizer_id is not None:
            metadata["optimizer_id"] = uow.origin.optimizer_id
        check_lock(variable, check_metadata(metadata, uow.limits))
        if not 0 <= self.target_version <= variable.version:
            raise VersionNotFoundError(variable.name, self.target_version, variable.version)
        target = uow.find_version(self.session_id, variable, self.target_version)
        if target is None or target.value is None:
            raise VersionPrunedError(variable.name, self.target_version)
        if variable.constraints:
            # They may be others than those that the value had to satisfy.
            constraints = values.compile_constraints(variable.name, variable.type, variable.constraints)
            values.normalise(variable.name, variable.type, constraints, target.value, uow.limits)
        return uow.write(self.session_id, variable, target.value, metadata, uow.origin.source, ChangeKind.ROLLED_BACK)


def check_facts(name: str, constraints: str, metadata: Mapping[str, str], limits: Limits) -> None:
    """Refuse to register a variable whose name, constraints or metadata exceed the limits."""
    check_text("name", name, limits.name_length, "name_length")
    check_metadata(metadata, limits)
    size = len(constraints.encode(errors="replace"))
    if size > limits.constraints_size_bytes:
        what = f"size of the constraints of {quote(name)} in bytes"
        raise LimitExceededError(what, size, limits.constraints_size_bytes, "constraints_size_bytes")


def check_room(state: SessionState, limits: Limits) -> None:
    """Refuse another variable if the session has as many as it may have."""
    count, most = len(state.variables) + 1, limits.variables_per_session
    if count > most:
        raise LimitExceededError("number of variables", count, most, "variables_per_session")


def source_of(metadata: Mapping[str, str], default: Source) -> Source:
    """Return which side writes: `metadata["source"]` if it names one, else the default."""
    name = metadata.get("source", "").lower()
    return Source(name) if name in ("python", "elixir") else default


def check_lock(variable: Variable, metadata: Mapping[str, str]) -> None:
    """Refuse a write to a variable that another optimizer has locked."""
    lock = variable.optimization
    if lock is not None and metadata.get("optimizer_id") != lock.optimizer_id:
        raise VariableLockedError(variable.name, lock.optimizer_id)


def read_updates(ahead: values.ReadAhead, find: values.Find, updates: Mapping[str, Value]) -> None:
    """Read the values of a command ahead; `find` returns the variable that an identifier means."""
    for identifier, value in updates.items():
        variable = find(identifier)
        if variable is not None:
            ahead.read(variable, value)


def _normalised(
    uow: UnitOfWork,
    ahead: values.ReadAhead | None,
    variable: values.Described,
    constraints: values.Constraints,
    value: Value,
) -> Value:
    if ahead is not None and (parsed := ahead.find(variable, value, uow.limits)) is not None:
        return parsed
    return values.normalise(variable.name, variable.type, constraints, value, uow.limits)


def write_value(
    uow: UnitOfWork,
    command: Command[Any],
    variable: Variable,
    value: Value,
    metadata: Mapping[str, str],
    source: Source,
    kind: ChangeKind = ChangeKind.SET,
) -> Variable:
    """Check a value that a command writes, and stage it; return the variable after it."""
    check_lock(variable, metadata)
    constraints = values.compile_constraints(variable.name, variable.type, variable.constraints)
    if constraints.program_size:
        uow.count_matching(variable.name, constraints.program_size * len(value.json))
    normalised = _normalised(uow, command.ahead, variable, constraints, value)
    if metadata:
        check_merged_metadata({**variable.metadata, **metadata}, metadata, uow.limits)
    return uow.write(command.session_id, variable, normalised, metadata, source, kind)
