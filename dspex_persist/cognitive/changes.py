"""Changes: what a watch tells about a variable, and how a burst of them becomes one."""

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar

from dspex_persist.cognitive import typed
from dspex_persist.cognitive.errors import MigrationError, TypedValueError
from dspex_persist.cognitive.records import decode
from dspex_persist.cognitive.steps import Work, run_work
from dspex_persist.state import arguments, values
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.globs import compile_glob
from dspex_persist.state.model import ChangeKind, Update, UpdateKind, Value, Variable

T = TypeVar("T")


class Change(Generic[T]):
    """What a watch tells about one variable: a new version, an initial value, or that it depends on what changed.

    With `debounce_s` or `throttle_s`, one change may stand for several.
    """

    __slots__ = ("_previous", "_read", "count", "update")

    def __init__(
        self,
        update: Update,
        previous: Value | None = None,
        count: int = 1,
        read: Callable[[Variable], T] = decode,
    ) -> None:
        self.update = update
        self._previous = update.previous if count == 1 else previous
        self._read = read
        self.count = count
        """How many changes it stands for: more than 1 after a burst that was debounced or throttled."""

    def after(self, earlier: "Change[T]") -> "Change[T]":
        """Return one change for this one and an earlier one of the same variable."""
        return Change(self.update, earlier._previous, earlier.count + self.count, self._read)

    @property
    def name(self) -> str:
        """The name of the variable."""
        return self.update.variable.name

    @property
    def kind(self) -> ChangeKind | UpdateKind:
        """What happened: the kind of the version, "initial_value", or "dependency_changed"."""
        version = self.update.version
        return self.update.kind if version is None else version.kind

    @property
    def value(self) -> T:
        """The value now, as a new Python object or as an instance of its model; None for a deletion."""
        version = self.update.version
        if version is not None and version.value is None:
            return None  # type: ignore[return-value]
        return self._read(self.update.variable)

    @property
    def old(self) -> T | None:
        """The value before, as `value` is; None for a new variable, and where it is not known.

        A value that does not fit the model any more is returned as plain objects.

        It is known for each new version, with two exceptions: the version before was pruned; or the watch is on a
        server, the old value is binary or larger than 64 KiB, and the watch has not had it itself.
        """
        if self._previous is None:
            return None
        record = self.update.variable._replace(value=self._previous)
        try:
            return self._read(record)
        except (TypedValueError, MigrationError):
            plain: T = decode(record)
            return plain

    @property
    def is_initial(self) -> bool:
        """Whether it is the value with which the watch began."""
        return self.update.kind is UpdateKind.INITIAL_VALUE

    @property
    def is_deletion(self) -> bool:
        """Whether the variable was deleted."""
        return self.update.kind is UpdateKind.DELETED

    @property
    def version(self) -> int:
        """The number of the variable's version."""
        return self.update.variable.version

    @property
    def type(self) -> str:
        """The name of the variable's value type."""
        return self.update.variable.type

    @property
    def variable(self) -> Variable:
        """The variable as it is after the change."""
        return self.update.variable

    @property
    def dependency(self) -> str:
        """If only something that it depends on has changed: the names of that, separated by ", "."""
        return self.update.dependency

    @property
    def actor(self) -> str:
        """Who made the change, such as `user:alice`; "" for an initial value."""
        return self.update.actor

    @property
    def reason(self) -> str | None:
        """Why, if the writer gave a reason."""
        return None if self.update.version is None else self.update.version.reason

    @property
    def cause(self) -> str:
        """The operation, or the id of the execution, that made the change; "" for an initial value."""
        return self.update.cause

    @property
    def execution_id(self) -> str | None:
        """The id of the execution that made the change; None if it was made outside of tools."""
        return self.update.execution_id

    @property
    def commit(self) -> int:
        """The number of the commit in the backend; for an initial value, of the last one before the watch."""
        return self.update.sequence

    @property
    def at(self) -> datetime:
        """When the change was made (UTC)."""
        return self.update.created_at

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Change):
            return NotImplemented
        return (self.update, self._previous, self.count) == (other.update, other._previous, other.count)

    def __hash__(self) -> int:
        return hash((self.update.variable.id, self.update.sequence, self.update.part))

    def __repr__(self) -> str:
        by = f" by {self.actor}" if self.actor else ""
        return f"<change of {self.name!r}: {self.kind}, version {self.version}, commit {self.commit}{by}>"


def read_value(session_id: str, record: Variable) -> Any:
    """Return the value of a variable as an instance of its model, if this process knows one; nothing is written.

    Raises:
        TypedValueError: It does not fit the model.
        MigrationError: It is of an older version, and its migration fails.
    """
    known = typed.find(session_id, record.name) if record.name in typed.names else None
    if known is None:
        return decode(record)
    version, value = values.schema_version(record.constraints), record.value
    if version is not None and version != known.version:
        steps, result = typed.migrated(record, known, version), None
        try:
            while True:
                step = steps.send(result)
                assert isinstance(step, Work), "a migration asks for nothing"
                result = run_work(step)
        except StopIteration as end:
            value = end.value
    return known.read(record.name, value)


class Taken(NamedTuple):
    """A change that is to be delivered. `first`: the number of the first commit for which it stands."""

    first: int
    change: Change[Any]


class _Waiting(NamedTuple):
    due_s: float
    taken: Taken


class Choice:
    """Which variables to watch: names, and globs with `*` and `?`; none for all.

    Args:
        names: The names and globs.

    Attributes:
        identifiers: What to ask the backend for; none for all variables.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        arguments.texts("names", names)
        globs = [name for name in names if "*" in name or "?" in name]
        self.identifiers: tuple[str, ...] = () if globs else names
        self._exact = frozenset(names).difference(globs)
        self._globs = tuple(map(compile_glob, globs))

    def includes(self, name: str) -> bool:
        """Whether the variable with this name is chosen, of those that the backend tells about."""
        if not self._globs:
            return True
        return name in self._exact or any(fits(name) for fits in self._globs)


class Pace:
    """Decides when to deliver the changes of a watch. It knows no clock: its callers say what time it is.

    Args:
        debounce_s: Deliver the last of several changes of a variable once it has not changed for this long, in seconds.
        throttle_s: Deliver at most one change of a variable in this time, in seconds: the first at once, then the last.

    Raises:
        InvalidArgumentError: One of them is not a positive number, or both are given.
    """

    def __init__(self, debounce_s: float | None, throttle_s: float | None) -> None:
        if debounce_s is not None and throttle_s is not None:
            raise InvalidArgumentError("throttle_s", "give debounce_s or throttle_s, not both")
        self._debounce_s = None if debounce_s is None else arguments.timeout("debounce_s", debounce_s)
        self._throttle_s = None if throttle_s is None else arguments.timeout("throttle_s", throttle_s)
        # By the variable's id. What waits is one change for each variable, however many there were.
        self._waiting: dict[str, _Waiting] = {}
        self._free_at: dict[str, float] = {}

    @property
    def is_used(self) -> bool:
        """Whether it holds back anything."""
        return self._debounce_s is not None or self._throttle_s is not None

    def offer(self, change: Change[Any], now_s: float, commit: int | None = None) -> Iterator[Taken]:
        """Take a change that comes now; yields it if it is to be delivered at once.

        Args:
            change: The change.
            now_s: The time, in seconds.
            commit: The number of its commit, if that is another one by now because the session has moved.
        """
        # The position of a watch that has delivered nothing yet is that of its initial values.
        taken = Taken((change.commit if commit is None else commit) + change.is_initial, change)
        if not self.is_used or change.is_initial:
            yield taken
            return
        key = change.variable.id
        waiting = self._waiting.get(key)
        if waiting is not None:
            taken = Taken(waiting.taken.first, change.after(waiting.taken.change))
        if self._debounce_s is not None:
            self._waiting[key] = _Waiting(now_s + self._debounce_s, taken)
        elif self._throttle_s is not None:
            free_at_s = self._free_at.get(key, now_s)
            if waiting is None and free_at_s <= now_s:
                self._free_at[key] = now_s + self._throttle_s
                yield taken
            else:
                self._waiting[key] = _Waiting(free_at_s, taken)

    def due(self, now_s: float) -> list[Taken]:
        """Return what is to be delivered by now, in the order in which it is due."""
        keys = [key for key, waiting in self._waiting.items() if waiting.due_s <= now_s]
        if self._throttle_s is not None:
            self._free_at = {key: at_s for key, at_s in self._free_at.items() if at_s > now_s or key in self._waiting}
            self._free_at.update((key, now_s + self._throttle_s) for key in keys)
        return self._pop(keys)

    def next_due_s(self) -> float | None:
        """Return when the next change is due, or None."""
        return min((waiting.due_s for waiting in self._waiting.values()), default=None)

    def flush(self) -> list[Taken]:
        """Return everything that waits, because the watch ends."""
        return self._pop(list(self._waiting))

    def _pop(self, keys: list[str]) -> list[Taken]:
        popped = [self._waiting.pop(key) for key in keys]
        popped.sort(key=lambda waiting: (waiting.due_s, waiting.taken.change.commit))
        return [waiting.taken for waiting in popped]

    def waiting(self) -> Iterator[Taken]:
        """Return what waits."""
        return (waiting.taken for waiting in self._waiting.values())

    def renumber(self, number_of: Callable[[int], int]) -> None:
        """Change the numbers of commits: the session is on another backend now."""
        for key, (due_s, taken) in self._waiting.items():
            self._waiting[key] = _Waiting(due_s, Taken(number_of(taken.first), taken.change))
