"""An oracle for interleaved executions: what they should see and how they should end, implemented independently.

The oracle keeps every version that was ever written, in order. The dependencies of an execution are a list of queries
and their answers; at its end each query is repeated on the state at that time. It has no units of work, steps or
overlays: the writes of an execution are a separate table, of which its children get copies.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

Answer = tuple[str, int] | None
"""The id and version of a variable, or that there is none."""


class RefusedError(Exception):
    """The command has to fail with the error with this name."""


@dataclass(slots=True)
class Version:
    """One version as it should be in the history."""

    variable_id: str
    name: str
    version: int
    kind: str
    value: str | None
    cause: str
    sequence: int

    def row(self) -> tuple[Any, ...]:
        """Its row in the file."""
        return (self.variable_id, self.version, self.kind, self.value, self.cause, self.sequence)


@dataclass(slots=True)
class Var:
    """A live variable."""

    id: str
    name: str
    type: str
    value: str
    version: int = 0


Table = dict[str, Var]
"""Variables by name."""


def find(table: Table, identifier: str) -> Var | None:
    """Find a variable by name or id."""
    return table.get(identifier) or next((each for each in table.values() if each.id == identifier), None)


def check_value(variable: Var, value: str) -> None:
    """Refuse a text for an integer, and a number for a text."""
    if (variable.type == "string") != value.startswith('"'):
        raise RefusedError("InvalidValueError")


def written(table: Table, identifier: str, value: str, expected: int | None = None) -> Var:
    """Write the next value of a variable to the table; return the variable."""
    variable = find(table, identifier)
    if variable is None:
        raise RefusedError("VariableNotFoundError")
    if expected not in (None, variable.version):
        raise RefusedError("VersionConflictError")
    check_value(variable, value)
    table[variable.name] = after = Var(variable.id, variable.name, variable.type, value, variable.version + 1)
    return after


@dataclass(slots=True)
class Entry:
    """An execution as it should be in the journal."""

    id: str
    session_id: str
    tool: str
    parent_id: str | None
    attempt: int
    key: str | None
    began: int
    status: str = "running"
    ended: int | None = None
    is_over: bool = False
    """Its session is, and with it the key."""

    def row(self) -> tuple[Any, ...]:
        """Its row in the file."""
        return (self.id, self.tool, self.parent_id, self.key, self.began, self.status, self.ended)


@dataclass(slots=True)
class Exec:
    """A running execution. A child works on its parent's table, and keeps a copy of it in case it fails."""

    entry: Entry
    serializable: bool
    base: Table
    """The session as it was when the outermost began, and what has been published since."""
    table: Table
    """The same, with its own writes."""
    root: "Exec | None" = None
    history: list[Version] = field(default_factory=list)
    """What it has written, with no sequence yet."""
    queries: dict[str, Answer] = field(default_factory=dict)
    patterns: dict[str, set[Answer]] = field(default_factory=dict)
    wrote: set[str] = field(default_factory=set)
    own: set[Answer] = field(default_factory=set)
    """What it has published."""
    saved: tuple[Table, int] | None = None
    children: list["Exec"] = field(default_factory=list)
    """Those that have ended well, and wait for its end."""
    child: "Exec | None" = None

    @property
    def top(self) -> "Exec":
        """The outermost execution, whose transaction it is."""
        return self.root or self

    def ask(self, identifier: str) -> None:
        """Record a dependency: a query with the answer that it would have had before its own writes."""
        variable = find(self.top.base, identifier)
        self.top.queries.setdefault(identifier, (variable.id, variable.version) if variable is not None else None)


def fits(pattern: str, name: str) -> bool:
    """Whether a name matches a pattern. Patterns here mean all names, one name, or names with a prefix."""
    return pattern in ("", name) or (pattern.endswith("*") and name.startswith(pattern[:-1]))


class Oracle:
    """The sessions, their history and the journal as they should be."""

    def __init__(self) -> None:
        self.sequence = 0
        self.sessions: dict[str, Table] = {}
        self.log: list[Version] = []
        self.journal: dict[str, Entry] = {}
        self.causes: list[str] = []

    def commit(self, cause: str) -> int:
        """Add a commit."""
        self.sequence += 1
        self.causes.append(cause)
        return self.sequence

    def append(self, variable: Var, kind: str, value: str | None, cause: str, version: int | None = None) -> None:
        """Add a version to the last commit."""
        number = variable.version if version is None else version
        self.log.append(Version(variable.id, variable.name, number, kind, value, cause, self.sequence))

    # Beginning

    def known(self, session_id: str, key: str | None, tool: str) -> Entry | None:
        """The execution that a begin with this key finds: a running one, or one that has committed."""
        if session_id not in self.sessions:
            raise RefusedError("SessionNotFoundError")
        place = (session_id, key)
        of_key = [e for e in self.journal.values() if key and (e.session_id, e.key) == place and not e.is_over]
        last = of_key[-1] if of_key else None
        if last is not None and last.tool != tool:
            raise RefusedError("IdempotencyConflictError")
        return last if last is not None and last.status in ("running", "committed") else None

    def begin(self, execution_id: str, session_id: str, tool: str, key: str | None, serializable: bool) -> Exec:
        """Begin an execution."""
        entry = Entry(execution_id, session_id, tool, None, 1, key, self.commit("begin"))
        self.journal[execution_id] = entry
        base = copy.deepcopy(self.sessions[session_id])
        return Exec(entry, serializable, base, dict(base))

    def begin_child(self, execution_id: str, parent: Exec, tool: str) -> Exec:
        """Begin an execution that another one calls."""
        entry = Entry(execution_id, parent.entry.session_id, tool, parent.entry.id, 1, None, self.commit("begin"))
        self.journal[execution_id] = entry
        top = parent.top
        child = Exec(entry, top.serializable, {}, {}, root=top, saved=(dict(top.table), len(top.history)))
        parent.child = child
        return child

    # Ending

    def publish(self, execution: Exec, name: str, value: str) -> Var:
        """Publish a value before the commit: to the session at once, and to the view of the execution."""
        top = execution.top
        if any(name in (each.name, each.variable_id) for each in top.history):
            raise RefusedError("InvalidArgumentError")
        table = self.sessions.get(execution.entry.session_id)
        if table is None:
            raise RefusedError("SessionNotFoundError")
        if self.journal[execution.entry.id].status != "running":
            raise RefusedError("ExecutionNotFoundError")
        variable = written(table, name, value)
        self.commit(execution.entry.id)
        self.append(variable, "published", variable.value, execution.entry.id)
        top.base[variable.name] = copy.copy(variable)
        top.table[variable.name] = copy.copy(variable)
        top.own.add((variable.id, variable.version))
        if top.child is not None:
            self._show_to_children(top.child, variable)
        return variable

    def _show_to_children(self, child: Exec, variable: Var) -> None:
        """If it fails, published values stay."""
        assert child.saved is not None
        child.saved[0][variable.name] = copy.copy(variable)
        if child.child is not None:
            self._show_to_children(child.child, variable)

    def finish_child(self, parent: Exec, *, well: bool) -> None:
        """End a child. If it fails, its writes and its children are undone; if it succeeds, it waits for its parent."""
        child, parent.child = parent.child, None
        assert child is not None
        assert child.saved is not None
        if well:
            parent.children += [child, *child.children]
            child.children = []
            return
        top = parent.top
        top.table, kept = dict(child.saved[0]), child.saved[1]
        del top.history[kept:]
        if child.entry.status == "running":
            self._end([*child.children], "aborted", self.commit(child.entry.id))
            self._end([child], "failed", self.sequence)

    def finish(self, execution: Exec, status: str) -> str:
        """End an outermost execution, and return how it ended: as a conflict if an answer has changed."""
        entry = execution.entry
        if entry.session_id not in self.sessions:
            raise RefusedError("SessionNotFoundError")
        if entry.status != "running":
            raise RefusedError("ExecutionEndedError")
        if status == "committed" and self._has_changed(execution):
            status = "conflict"
        sequence = self.commit(entry.id)
        self._end(execution.children, "committed" if status == "committed" else "aborted", sequence)
        unfinished = execution.child
        while unfinished is not None:
            self._end(unfinished.children, "aborted", sequence)
            self._end([unfinished], status, sequence)
            unfinished = unfinished.child
        self._end([execution], status, sequence)
        if status == "committed":
            self._write(execution)
        return status

    def _write(self, execution: Exec) -> None:
        """Copy only its writes to the session: others may have changed the rest of its table."""
        now = self.sessions[execution.entry.session_id]
        for each in execution.history:
            each.sequence, each.cause = self.sequence, execution.entry.id
            self.log.append(each)
            now.pop(each.name, None)
        for each in execution.history:
            if (variable := execution.table.get(each.name)) is not None:
                now[each.name] = copy.copy(variable)

    def _has_changed(self, execution: Exec) -> bool:
        now = self.sessions[execution.entry.session_id]
        questions = execution.queries if execution.serializable else execution.wrote
        for identifier in questions:
            variable = find(now, identifier)
            if not self._is_same(execution, execution.queries[identifier], variable):
                return True
        for pattern, answers in execution.patterns.items() if execution.serializable else ():
            matching = {each.id: each for each in now.values() if fits(pattern, each.name)}
            before = {answer[0]: answer for answer in answers if answer is not None}
            if before.keys() != matching.keys():
                return True
            if not all(self._is_same(execution, before[each], variable) for each, variable in matching.items()):
                return True
        return False

    def _is_same(self, execution: Exec, answer: Answer, variable: Var | None) -> bool:
        """Whether the answer is still the same. Values that the execution published itself may differ."""
        if answer is None or variable is None:
            return answer is None and variable is None
        variable_id, version = answer
        since = {(each.variable_id, each.version) for each in self.log if each.variable_id == variable_id}
        later = {each for each in since if each[1] > version}
        return variable.id == variable_id and later <= execution.own

    def _end(self, executions: list[Exec], status: str, sequence: int) -> None:
        for execution in executions:
            execution.entry.status, execution.entry.ended = status, sequence

    def end_session(self, session_id: str) -> None:
        """End the session, and interrupt its executions."""
        if self.sessions.pop(session_id, None) is not None:
            self.commit("test")
            self.interrupt(session_id, "end")
            for entry in self.journal.values():
                entry.is_over = entry.is_over or entry.session_id == session_id

    def interrupt(self, session_id: str, cause: str = "recovery") -> None:
        """Interrupt executions because the process died, or the session ended."""
        running = [each for each in self.journal.values() if (each.session_id, each.status) == (session_id, "running")]
        if running and cause == "recovery":
            self.commit(cause)
        for entry in running:
            entry.status, entry.ended = "interrupted", self.sequence
