"""What interleaved executions should see and how they should end, worked out a second time, in plain Python.

The oracle keeps every version that was ever written, in order. What an execution stands on is a list of questions and
the answers they got; at its end each is asked again of what is there by then. It knows no unit of work, no steps and no
overlay: what an execution has done is a table of its own, of which its children have copies.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

Answer = tuple[str, int] | None
"""The id and version of a variable, or that there is none."""


class RefusedError(Exception):
    """The command has to fail with the error of this name."""


@dataclass(slots=True)
class Version:
    """One version as the history has to have it."""

    variable_id: str
    name: str
    version: int
    kind: str
    value: str | None
    cause: str
    sequence: int

    def row(self) -> tuple[Any, ...]:
        """What the file has of it."""
        return (self.variable_id, self.version, self.kind, self.value, self.cause, self.sequence)


@dataclass(slots=True)
class Var:
    """A variable that is there."""

    id: str
    name: str
    type: str
    value: str
    version: int = 0


Table = dict[str, Var]
"""Variables by name."""


def find(table: Table, identifier: str) -> Var | None:
    """By name or id."""
    return table.get(identifier) or next((each for each in table.values() if each.id == identifier), None)


def check_value(variable: Var, value: str) -> None:
    """An integer takes no text, a text no number."""
    if (variable.type == "string") != value.startswith('"'):
        raise RefusedError("InvalidValueError")


def written(table: Table, identifier: str, value: str, expected: int | None = None) -> Var:
    """The variable with its next value; the table has it."""
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
    """An execution as the journal has to have it."""

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
        """What the file has of it."""
        return (self.id, self.tool, self.parent_id, self.key, self.began, self.status, self.ended)


@dataclass(slots=True)
class Exec:
    """An execution under way. A child works on its parent's table, of which it keeps a copy in case it fails."""

    entry: Entry
    serializable: bool
    base: Table
    """The session as it was when the outermost began, and what has been published since."""
    table: Table
    """The same, with its own writes."""
    root: "Exec | None" = None
    history: list[Version] = field(default_factory=list)
    """What it has written, with no sequence yet."""
    asked: dict[str, Answer] = field(default_factory=dict)
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
        """The outermost, whose transaction it is."""
        return self.root or self

    def ask(self, identifier: str) -> None:
        """Whatever is asked for, it stands on: on what the question would have got before its own writes."""
        found = find(self.top.base, identifier)
        self.top.asked.setdefault(identifier, (found.id, found.version) if found is not None else None)


def fits(pattern: str, name: str) -> bool:
    """The patterns used here are all, one name, or names that begin so."""
    return pattern in ("", name) or (pattern.endswith("*") and name.startswith(pattern[:-1]))


class Oracle:
    """The sessions, their history, and the journal, as they should stand."""

    def __init__(self) -> None:
        self.sequence = 0
        self.sessions: dict[str, Table] = {}
        self.log: list[Version] = []
        self.journal: dict[str, Entry] = {}
        self.causes: list[str] = []

    def commit(self, cause: str) -> int:
        """One more commit."""
        self.sequence += 1
        self.causes.append(cause)
        return self.sequence

    def append(self, variable: Var, kind: str, value: str | None, cause: str, version: int | None = None) -> None:
        """One more version, in the commit that is the last so far."""
        number = variable.version if version is None else version
        self.log.append(Version(variable.id, variable.name, number, kind, value, cause, self.sequence))

    # Beginning

    def known(self, session_id: str, key: str | None, tool: str) -> Entry | None:
        """What a wish to begin under this key finds: an execution that runs, or the one that has committed."""
        if session_id not in self.sessions:
            raise RefusedError("SessionNotFoundError")
        asked = (session_id, key)
        of_key = [e for e in self.journal.values() if key and (e.session_id, e.key) == asked and not e.is_over]
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
        """Begin one that another calls."""
        entry = Entry(execution_id, parent.entry.session_id, tool, parent.entry.id, 1, None, self.commit("begin"))
        self.journal[execution_id] = entry
        top = parent.top
        child = Exec(entry, top.serializable, {}, {}, root=top, saved=(dict(top.table), len(top.history)))
        parent.child = child
        return child

    # Ending

    def publish(self, execution: Exec, name: str, value: str) -> Var:
        """A value ahead of the commit: in the session at once, and in what the execution sees."""
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
        """If they fail, what has been published stays."""
        assert child.saved is not None
        child.saved[0][variable.name] = copy.copy(variable)
        if child.child is not None:
            self._show_to_children(child.child, variable)

    def finish_child(self, parent: Exec, *, well: bool) -> None:
        """A child that fails takes what it wrote along, and those that it called; one that ends well waits."""
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
        """The end of an outermost one; how it ended. A conflict, if it should commit, where an answer has changed."""
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
        """What it wrote is in the session now, and nothing else of its table: others may have written the rest."""
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
        questions = execution.asked if execution.serializable else execution.wrote
        for identifier in questions:
            found = find(now, identifier)
            if not self._is_same(execution, execution.asked[identifier], found):
                return True
        for pattern, answers in execution.patterns.items() if execution.serializable else ():
            matching = {each.id: each for each in now.values() if fits(pattern, each.name)}
            before = {answer[0]: answer for answer in answers if answer is not None}
            if before.keys() != matching.keys():
                return True
            if not all(self._is_same(execution, before[each], found) for each, found in matching.items()):
                return True
        return False

    def _is_same(self, execution: Exec, answer: Answer, found: Var | None) -> bool:
        """Whether the answer is still right; what the execution has published itself it may find."""
        if answer is None or found is None:
            return answer is None and found is None
        variable_id, version = answer
        since = {(each.variable_id, each.version) for each in self.log if each.variable_id == variable_id}
        later = {each for each in since if each[1] > version}
        return found.id == variable_id and later <= execution.own

    def _end(self, executions: list[Exec], status: str, sequence: int) -> None:
        for execution in executions:
            execution.entry.status, execution.entry.ended = status, sequence

    def end_session(self, session_id: str) -> None:
        """The session ends, and with it what runs in it."""
        if self.sessions.pop(session_id, None) is not None:
            self.commit("test")
            self.interrupt(session_id, "end")
            for entry in self.journal.values():
                entry.is_over = entry.is_over or entry.session_id == session_id

    def interrupt(self, session_id: str, cause: str = "recovery") -> None:
        """The process died, or the session ended."""
        running = [each for each in self.journal.values() if (each.session_id, each.status) == (session_id, "running")]
        if running and cause == "recovery":
            self.commit(cause)
        for entry in running:
            entry.status, entry.ended = "interrupted", self.sequence
