"""Interleaved executions compared with an independent oracle: their views, their ends, and the journal.

It runs one step at a time, without threads, with a server's executions on a real store. `STORE_MODEL_EXAMPLES`,
`STORE_MODEL_STEPS` and `STORE_MODEL_SHRINK` apply as in the store's model.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dspex_persist.state.anchor import Head, parse
from dspex_persist.state.commands import (
    BeginExecution,
    CleanupSession,
    Command,
    DeleteVariable,
    FinishExecution,
    GetVariable,
    GetVariableHistory,
    GetVariables,
    InitializeSession,
    ListVariables,
    PublishVariable,
    RegisterVariable,
    RollbackVariable,
    SetVariable,
    SetVariables,
)
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.errors import OutcomeUnknownError, StateError, StorageError
from dspex_persist.state.groups import Groups, Job, Outcome
from dspex_persist.state.model import ExecutionStatus, Isolation, Origin, Value
from dspex_persist.state.store import sessions as stored_sessions
from dspex_persist.state.store.engine import open_readers, snapshot
from dspex_persist.state.store.session_store import FileGroups, open_groups
from dspex_persist.state.store.verify import iter_problems
from dspex_persist.state.tools.execution import Execution
from dspex_persist.state.tools.overlay import Overlay
from tests.property.execution_oracle import (
    Entry,
    Exec,
    Oracle,
    RefusedError,
    Table,
    Var,
    Version,
    check_value,
    fits,
    written,
)
from tests.property.execution_oracle import find as find_in
from tests.property.test_store_model import (
    PHASES,
    StatementFaults,
    _empty_database,
    busy,
    copy_files,
    disk_full,
    io_error,
    reading,
)

EXAMPLES = int(os.environ.get("STORE_MODEL_EXAMPLES", "60"))
STEPS = int(os.environ.get("STORE_MODEL_STEPS", "30"))
MOST_RUNNING = 4

SESSIONS = ("alpha", "beta")
SESSION = st.sampled_from(["alpha", "alpha", "alpha", "beta"])
NAMES = st.sampled_from(["a", "b", "ab"])
IDENTIFIERS = st.sampled_from(["a", "b", "a", "b", "a", "b", "ab", "#a", "#b", "#a", "ghost"])
"""`#a` stands for the id of the variable named a."""
VALUES = st.sampled_from(["1", "7", "49", "-3", "5", "12", "0", "8", "9", '"hi"']).map(Value)
TYPES = st.sampled_from(["integer", "integer", "integer", "string"])
ANN, TEST = Origin("ann", "begin"), Origin("bob", "test")


def _register(name: str, type_name: str, value: Value) -> Command[Any]:
    return RegisterVariable("", name, type_name, value)


_SET = st.builds(SetVariable, st.just(""), IDENTIFIERS, VALUES, st.just({}), st.sampled_from([None] * 4 + [0, 1]))
_WRITES: list[st.SearchStrategy[Any]] = [
    _SET,
    _SET,
    _SET,
    st.builds(SetVariables, st.just(""), st.dictionaries(IDENTIFIERS, VALUES, max_size=3), st.just({}), st.booleans()),
    st.builds(_register, NAMES, TYPES, VALUES),
    st.builds(DeleteVariable, st.just(""), IDENTIFIERS),
]
_READS: list[st.SearchStrategy[Any]] = [
    st.builds(GetVariable, st.just(""), IDENTIFIERS),
    st.builds(GetVariable, st.just(""), IDENTIFIERS),
    st.builds(GetVariables, st.just(""), st.lists(IDENTIFIERS, max_size=3, unique=True).map(tuple)),
    st.builds(ListVariables, st.just(""), st.sampled_from(["", "a*", "b", "ab*"])),
    st.builds(RollbackVariable, st.just(""), IDENTIFIERS, st.sampled_from([0, 0, 1, 1, 2, 3, -1])),
    st.builds(GetVariableHistory, st.just(""), IDENTIFIERS, st.integers(1, 4)),
]
INSIDE: st.SearchStrategy[Any] = st.one_of(*_WRITES, *_READS)
OUTSIDE: st.SearchStrategy[Any] = st.one_of(*_WRITES)
PICK = st.integers(0, 7)
OTHERS = st.lists(OUTSIDE, min_size=1, max_size=2)
_PUBLISH = st.builds(PublishVariable, st.just(""), st.just(""), IDENTIFIERS, VALUES)
ACTIONS: st.SearchStrategy[Any] = st.one_of(
    INSIDE,
    INSIDE,
    INSIDE,
    INSIDE,
    _PUBLISH,
    st.sampled_from(["call", "call", "well", "badly"]),
    OTHERS,
    st.just("commit"),
)
STRETCH = st.lists(st.tuples(PICK, ACTIONS), min_size=5, max_size=12)
FAULTS = st.sampled_from([None] * 12 + [disk_full, busy, io_error, "die before", "die after"])


@dataclass(slots=True)
class Running:
    """An execution in the product and in the oracle."""

    real: Execution
    model: Exec
    children: list["Running"]
    """Its child, if it waits for one."""

    @property
    def innermost(self) -> "Running":
        return self.children[0].innermost if self.children else self


class ExecutionModel(RuleBasedStateMachine):
    """A store with its running executions, and an oracle, which have to agree after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="execution-model-"))
        self.oracle = Oracle()
        self.running: list[Running] = []
        self.generation = 0
        self.store: FileGroups | None = None

    @initialize()
    def open_first(self) -> None:
        path = self.folder / "store.db"
        shutil.copyfile(_empty_database(), path)
        self.store = open_groups(path)
        for session_id in SESSIONS:
            self._begin_session(session_id)

    def teardown(self) -> None:
        try:
            if self.store is not None:
                self.store.close()
                check_file(self.store.log.path, self.oracle)
        finally:
            shutil.rmtree(self.folder)

    # Rules

    @rule(session_id=SESSION, key=st.sampled_from(["k1", "k2"]), tool=st.sampled_from(["tool", "other"]))
    def ask_again(self, session_id: str, key: str, tool: str) -> None:
        """A request with a known key: it returns the running or the committed execution, or an error."""
        if len(self.running) < MOST_RUNNING:
            self._begin(session_id, Isolation.SERIALIZABLE, key, tool)

    @rule(session_id=SESSION, isolations=st.lists(st.sampled_from(Isolation), min_size=2, max_size=3), stretch=STRETCH)
    def work(self, session_id: str, isolations: list[Isolation], stretch: list[tuple[int, Any]]) -> None:
        """Executions, those that they call, and other writers take turns; a few executions begin for this."""
        missing = [name for name in ("a", "b") if name not in self.oracle.sessions[session_id]]
        self.others_write(session_id, [_register(name, "integer", Value("0")) for name in missing])
        for isolation in isolations[: 3 - len(self.running)]:
            self._begin(session_id, isolation, None, "tool")
        for pick, action in stretch:
            if not self.running:
                return
            running = self.running[pick % len(self.running)]
            if isinstance(action, Command):
                self._inside(running.innermost, action)
            elif isinstance(action, list):
                self.others_write(running.model.entry.session_id, action)
            elif action == "call":
                self._call(running.innermost)
            elif action == "commit":
                self.finish(pick, "committed", None, 1)
            else:
                self._call_ends(running, well=action == "well")

    def _inside(self, running: Running, command: Command[Any]) -> None:
        if isinstance(command, PublishVariable):
            self._publish(running, command.identifier, command.value)
        else:
            self._work(running, command)

    def _call(self, caller: Running) -> None:
        entry = caller.model.entry
        if caller.real.depth >= 2 or entry.status != "running":
            return
        begun = self._one(BeginExecution(entry.session_id, "called", parent_id=entry.id), ANN)
        assert begun.error is None
        model = self.oracle.begin_child(begun.result.execution_id, caller.model, "called")
        caller.children = [Running(caller.real.begin_child(begun.result, "called"), model, [])]

    def _call_ends(self, running: Running, *, well: bool) -> None:
        callers = list(_callers(running))
        if not callers:
            return
        caller = callers[-1]
        child = caller.children.pop()
        if well:
            child.real.close("committed")
            verdict = Verdict(child.real.id, ExecutionStatus.COMMITTED, Value("1"))
            caller.real.children.extend([verdict, *child.real.children])
        else:
            child.real.undo()
            child.real.close("failed")
            self._one(child.real.finish(Verdict(child.real.id, ExecutionStatus.FAILED)), _origin_of(child))
        self.oracle.finish_child(caller.model, well=well)

    @rule(
        pick=PICK,
        status=st.sampled_from(["committed", "committed", "committed", "failed", "cancelled", "timed_out"]),
        fault=FAULTS,
        nth=st.integers(1, 10),
    )
    def finish(self, pick: int, status: str, fault: Any, nth: int) -> None:
        """An execution ends; at the n-th statement the disk may be full, or the process may die."""
        if not self.running:
            return
        running = self.running[pick % len(self.running)]
        while running.children and status == "committed":
            self._call_ends(running, well=True)
        command = self._closing(running, status)
        if fault is None:
            self._accept_end(running, status, self._one(command, _origin_of(running)))
        elif fault == "die after":
            self._die_after(running, status, command)
        else:
            self._die_or_fail_inside(running, status, command, fault, nth)

    @rule(picks=st.lists(PICK, min_size=1, max_size=3))
    def finish_well(self, picks: list[int]) -> None:
        """Several executions commit one after the other."""
        for pick in picks:
            self.finish(pick, "committed", None, 1)

    @rule(session_id=SESSION, group=OTHERS)
    def others_write(self, session_id: str, group: list[Command[Any]]) -> None:
        """Clients write without an execution, in one group."""
        jobs = [Job(self._resolve(command, session_id, None), TEST) for command in group]
        for job, outcome in zip(jobs, self._live().write_group(jobs), strict=True):
            self._check(lambda job=job, outcome=outcome: self._outside(job.command, outcome), outcome)

    @rule(pick=st.integers(0, 9))
    def end_session(self, pick: int) -> None:
        """Rarely: a session with running executions ends, and another one with its id begins."""
        # Not zero, which is drawn most often.
        if pick == 7:
            self._one(CleanupSession("beta"), TEST)
            self.oracle.end_session("beta")
            self._begin_session("beta")

    @rule(pick=st.integers(0, 9), kill=st.booleans())
    def start_again(self, pick: int, kill: bool) -> None:
        """Rarely: the store is closed, or its process is killed, and it is opened again."""
        if pick == 7:
            path = self._copy() if kill else self._live().log.path
            self._reopen(path)

    # Invariants after every step

    @invariant()
    def agrees(self) -> None:
        if self.store is None:
            return
        for session_id in SESSIONS:
            state = self.store.find_loaded(session_id) or _loaded(self.store, session_id)
            assert _seen_in(state) == _plain(self.oracle.sessions[session_id])
        for running in self.running:
            overlay = running.real.overlay
            assert _seen_in(overlay._drafts.find(overlay.session_id)) == _plain(running.model.table)
        assert self.store.log.head.sequence == self.oracle.sequence
        check_journal(self.store.log.path, self.oracle)

    # Implementation of the rules

    def _live(self) -> FileGroups:
        assert self.store is not None
        return self.store

    def _one(self, command: Command[Any], origin: Origin) -> Outcome:
        [outcome] = self._live().write_group([Job(command, origin)])
        return outcome

    def _begin_session(self, session_id: str) -> None:
        self._one(InitializeSession(session_id), TEST)
        self.oracle.commit("test")
        table = self.oracle.sessions[session_id] = {}
        for name in ("a", "b"):
            outcome = self._one(RegisterVariable(session_id, name, "integer", Value("0")), TEST)
            self._register_outside(table, RegisterVariable(session_id, name, "integer", Value("0")), outcome.result)

    def _begin(self, session_id: str, isolation: Isolation, key: str | None, tool: str) -> None:
        command = BeginExecution(session_id, tool, isolation=isolation, idempotency_key=key)
        outcome = self._one(command, ANN)

        def expected() -> Any:
            known = self.oracle.known(session_id, key, tool)
            return None if known is None else (known.id, known.status)

        def actual(begun: Any) -> Any:
            if begun.recorded is not None:
                assert begun.recorded.sequence == self.oracle.journal[begun.recorded.id].ended
                return begun.recorded.id, "committed"
            return (begun.running.id, "running") if begun.running is not None else None

        if self._check(expected, outcome, actual) and outcome.result.snapshot is not None:
            serializable = isolation is Isolation.SERIALIZABLE
            model = self.oracle.begin(outcome.result.execution_id, session_id, tool, key, serializable)
            real = Execution.begin(session_id, tool, isolation, outcome.result, ANN, self._read)
            self.running.append(Running(real, model, []))

    def _read(self, command: Command[Any]) -> Any:
        return self._live().read_stored(command, TEST)

    def _check(self, expected: Callable[[], Any], outcome: Outcome, plain: Callable[[Any], Any] = lambda r: r) -> bool:
        """Whether it succeeded; checks that the oracle agrees."""
        try:
            wanted: Any = expected()
        except RefusedError as refused:
            assert type(outcome.error).__name__ == str(refused), f"{outcome}, expected {refused}"  # noqa: PT017
            return False
        assert outcome.error is None, f"{outcome}, expected {wanted}"
        assert plain(outcome.result) == wanted
        return True

    def _work(self, running: Running, command: Any) -> None:
        model = running.model
        is_past = isinstance(command, GetVariableHistory | RollbackVariable)
        if is_past and model.top.entry.status != "running":
            # Its session has ended, so there is no history to check.
            return
        command = self._resolve(command, model.entry.session_id, model.top.table)
        if isinstance(command, GetVariableHistory) and find_in(model.top.table, command.identifier) is None:
            return
        try:
            outcome = Outcome(running.real.run(command, _origin_of(running)))
        except StateError as error:
            outcome = Outcome(error=error)
        rules = Inside(self.oracle, model, outcome.result)
        self._check(lambda: rules.run(command), outcome, rules.plain)

    def _publish(self, running: Running, identifier: str, value: Value) -> None:
        model = running.model
        command = PublishVariable(model.entry.session_id, model.entry.id, identifier, value)
        command = self._resolve(command, model.entry.session_id, model.top.table)
        try:
            running.real.check_can_publish(command.identifier)
            outcome = self._one(command, _origin_of(running))
        except StateError as error:
            outcome = Outcome(error=error)
        if outcome.error is None:
            running.real.take_published(outcome.result)
        wanted = lambda: [_row(self.oracle.publish(model, command.identifier, value.json))]  # noqa: E731
        self._check(wanted, outcome, lambda made: [(each.id, each.version, each.value.json) for each in made])

    def _closing(self, running: Running, status: str) -> FinishExecution:
        """End an execution as a runner does: together with the running ones that it called."""
        real = running.real
        for caller in _callers(running):
            child = caller.children[0].real
            real.children.append(Verdict(child.id, ExecutionStatus(status)))
            real.children.extend(child.children)
        return real.finish(Verdict(real.id, ExecutionStatus(status), Value("1") if status == "committed" else None))

    def _accept_end(self, running: Running, status: str, outcome: Outcome) -> None:
        self.running.remove(running)
        running.real.close(status)
        wanted = lambda: self.oracle.finish(running.model, status)  # noqa: E731
        if self._check(wanted, outcome, lambda finished: finished.status.value):
            assert outcome.result.sequence == self.oracle.sequence

    def _die_after(self, running: Running, status: str, command: FinishExecution) -> None:
        """The process dies after COMMIT: the execution has ended, though its caller got no answer."""
        live = self._live()
        remember, copies = live.log._anchor.write, []

        def copy_first(head: Head) -> None:
            copies.append(self._copy())
            remember(head)

        with patch.object(live.log._anchor, "write", copy_first):
            outcome = self._one(command, _origin_of(running))
        self._accept_end(running, status, outcome)
        if copies:
            self._reopen(copies[0])

    def _die_or_fail_inside(
        self, running: Running, status: str, command: FinishExecution, fault: Any, nth: int
    ) -> None:
        copies: list[Path] = []
        act = (lambda _: copies.append(self._copy())) if fault == "die before" else fault
        faults = StatementFaults(self._live(), nth, act, commits=fault is not busy)
        try:
            with faults.installed():
                outcome = self._one(command, _origin_of(running))
        except OutcomeUnknownError:
            self._reopen(self._copy())
            return
        if copies:
            self._reopen(copies[0])
            return
        if faults.happened:
            # Nothing was written, so it still runs, and can be ended once there is room.
            assert isinstance(outcome.error, StorageError)
            outcome = self._one(command, _origin_of(running))
        self._accept_end(running, status, outcome)

    def _copy(self) -> Path:
        self.generation += 1
        folder = self.folder / str(self.generation)
        folder.mkdir()
        return copy_files(self._live().log.path, folder)

    def _reopen(self, path: Path) -> None:
        """Continue with the file, without the old process's memory and with its executions interrupted."""
        self._live().close()
        self.store = open_groups(path)
        self._take_in_interruptions(path)
        for running in self.running:
            # The end of an execution of the old process is refused.
            late = self._one(running.real.finish(Verdict(running.real.id, ExecutionStatus.COMMITTED)), ANN)
            assert type(late.error).__name__ == "ExecutionEndedError"
        self.running.clear()

    def _take_in_interruptions(self, path: Path) -> None:
        """Interruptions are one commit for each session, in any order of sessions."""
        with reading(path) as connection:
            rows = connection.execute("SELECT execution_id, ended_sequence FROM executions").fetchall()
        ended = dict(rows)
        with_running = {entry.session_id: ended[entry.id] or 0 for entry in _running_in(self.oracle)}
        for session_id in sorted(with_running, key=lambda each: with_running[each]):
            self.oracle.interrupt(session_id)

    def _resolve(self, command: Any, session_id: str, table: Table | None) -> Any:
        """The command on this session, with `#a` replaced by the id of the variable a."""

        def of(identifier: str) -> str:
            for known in (table, self.oracle.sessions.get(session_id)):
                if identifier.startswith("#") and known is not None and identifier[1:] in known:
                    return known[identifier[1:]].id
            return identifier

        changes: dict[str, Any] = {"session_id": session_id}
        if hasattr(command, "identifier"):
            changes["identifier"] = of(command.identifier)
        if hasattr(command, "identifiers"):
            changes["identifiers"] = tuple(dict.fromkeys(map(of, command.identifiers)))
        if hasattr(command, "updates"):
            changes["updates"] = {of(identifier): value for identifier, value in command.updates.items()}
        return replace(command, **changes)

    # The effects of other writers' commands

    def _outside(self, command: Any, outcome: Outcome) -> Any:
        table = self.oracle.sessions[command.session_id]
        before, made = dict(table), list[tuple[Var, str, str | None, int]]()
        result = change(table, command, outcome.result, made)
        if made:
            self.oracle.commit("test")
            for variable, kind, value, version in made:
                self.oracle.append(variable, kind, value, "test", version)
        else:
            assert table == before
        return _same_if_batch(result, outcome.result)

    def _register_outside(self, table: Table, command: Any, new_id: str) -> None:
        table[command.name] = Var(new_id, command.name, command.type, command.value.json)
        self.oracle.commit("test")
        self.oracle.append(table[command.name], "registered", command.value.json, "test")


def change(table: Table, command: Any, actual: Any, made: list[tuple[Var, str, str | None, int]]) -> Any:
    """Apply a writing command to a table; append its versions to `made`, and return its result with `actual`'s ids."""
    match command:
        case SetVariable():
            variable = written(table, command.identifier, command.value.json, command.expected_version)
            made.append((variable, "set", variable.value, variable.version))
            return variable.version
        case SetVariables():
            return _change_several(table, command, made)
        case DeleteVariable():
            gone = find_in(table, command.identifier)
            if gone is None:
                raise RefusedError("VariableNotFoundError")
            del table[gone.name]
            made.append((gone, "deleted", None, gone.version + 1))
            return None
        case RegisterVariable():
            existing = table.get(command.name)
            if existing is not None:
                if existing.type != command.type:
                    raise RefusedError("VariableExistsError")
                return existing.id
            variable = Var(str(actual), command.name, command.type, command.value.json)
            check_value(variable, command.value.json)
            table[command.name] = variable
            made.append((variable, "registered", variable.value, 0))
            return variable.id
    raise AssertionError(command)


def _change_several(table: Table, command: Any, made: list[Any]) -> Any:
    trial, done, versions, bad = dict(table), list[Any](), dict[str, int](), list[str]()
    for identifier, value in command.updates.items():
        try:
            variable = written(trial, identifier, value.json)
        except RefusedError:
            bad.append(identifier)
        else:
            versions[identifier] = variable.version
            done.append((variable, "set", variable.value, variable.version))
    if command.atomic and bad:
        return (False, {}, sorted(bad))
    table.update(trial)
    made.extend(done)
    return (bool(versions) or not bad, versions, sorted(bad))


def _same_if_batch(result: Any, actual: Any) -> Any:
    """The result itself, unless it is a batch's, which is compared here."""
    if isinstance(result, tuple):
        assert (actual.success, dict(actual.versions), sorted(actual.errors)) == result
        return actual
    return result


class Inside:
    """Apply a command inside an execution to the oracle's tables."""

    def __init__(self, oracle: Oracle, execution: Exec, actual: Any) -> None:
        self._oracle = oracle
        self._top = execution.top
        self._actual = actual
        self._table = self._top.table

    def run(self, command: Any) -> Any:
        """Return its result in plain form, and record what it reads and writes."""
        match command:
            case GetVariable() | GetVariableHistory():
                self._top.ask(command.identifier)
                variable = self._find(command.identifier)
                return (
                    self._history(variable, command.limit)
                    if isinstance(command, GetVariableHistory)
                    else _row(variable)
                )
            case GetVariables():
                return self._several(command.identifiers)
            case ListVariables():
                return self._list(command.pattern)
            case RollbackVariable():
                self._top.ask(command.identifier)
                return self._roll_back(command)
        names = tuple(command.updates) if isinstance(command, SetVariables) else (_target(command),)
        for name in names:
            self._top.ask(name)
        made: list[Any] = []
        result = change(self._table, command, self._actual, made)
        self._top.wrote.update(names)
        self._remember(made)
        return result

    def plain(self, result: Any) -> Any:
        """A result of the product in plain form."""
        if hasattr(result, "success"):
            return (result.success, dict(result.versions), sorted(result.errors))
        if hasattr(result, "missing"):
            return {name: _real(each) for name, each in result.variables.items()}, sorted(result.missing)
        if hasattr(result, "constraints"):
            return _real(result)
        if isinstance(result, tuple):
            return sorted(map(_real, result))
        if isinstance(result, list):
            return [(each.version, each.kind.value, each.value and each.value.json) for each in result]
        return result

    def _find(self, identifier: str) -> Var:
        variable = find_in(self._table, identifier)
        if variable is None:
            raise RefusedError("VariableNotFoundError")
        return variable

    def _several(self, identifiers: Sequence[str]) -> Any:
        for identifier in identifiers:
            self._top.ask(identifier)
        variables = {each: find_in(self._table, each) for each in identifiers}
        there = {name: _row(each) for name, each in variables.items() if each is not None}
        return there, sorted(variables.keys() - there.keys())

    def _list(self, pattern: str) -> Any:
        base = self._top.base.values()
        answers = {(each.id, each.version) for each in base if fits(pattern, each.name)}
        self._top.patterns.setdefault(pattern, set(answers))
        return sorted(_row(each) for each in self._table.values() if fits(pattern, each.name))

    def _versions_of(self, variable_id: str) -> list[Version]:
        """The history, newest first: its own versions, those from before it began, and those it has published."""
        base = find_in(self._top.base, variable_id)
        last = base.version if base is not None and base.id == variable_id else -1
        own = [each for each in self._top.history if each.variable_id == variable_id]
        there = [e for e in self._oracle.log if e.variable_id == variable_id and e.version <= last]
        return sorted([*own, *there], key=lambda each: -each.version)

    def _history(self, variable: Var, limit: int) -> Any:
        return [(each.version, each.kind, each.value) for each in self._versions_of(variable.id)][:limit]

    def _roll_back(self, command: Any) -> Any:
        variable = self._find(command.identifier)
        if not 0 <= command.target_version <= variable.version:
            raise RefusedError("VersionNotFoundError")
        [target] = [each for each in self._versions_of(variable.id) if each.version == command.target_version]
        after = Var(variable.id, variable.name, variable.type, target.value or "", variable.version + 1)
        self._table[variable.name] = after
        self._top.wrote.add(command.identifier)
        self._remember([(after, "rolled_back", after.value, after.version)])
        return _row(after)

    def _remember(self, made: list[Any]) -> None:
        for variable, kind, value, version in made:
            self._top.history.append(Version(variable.id, variable.name, version, kind, value, "", 0))


def _target(command: Any) -> str:
    return str(command.name if isinstance(command, RegisterVariable) else command.identifier)


def _origin_of(running: Running) -> Origin:
    return Origin("ann", running.real.id)


def _callers(running: Running) -> Iterator[Running]:
    """An execution and those that it called, as long as they wait for their parents."""
    while running.children:
        yield running
        running = running.children[0]


def _running_in(oracle: Oracle) -> list[Entry]:
    return [entry for entry in oracle.journal.values() if entry.status == "running"]


def _row(variable: Var) -> Any:
    return (variable.id, variable.version, variable.value)


def _real(variable: Any) -> Any:
    return (variable.id, variable.version, variable.value.json)


def _plain(table: Table) -> Any:
    return {each.name: _row(each) for each in table.values()}


def _seen_in(state: Any) -> Any:
    return {each.name: _real(each) for each in state.variables.values()}


def _loaded(store: FileGroups, session_id: str) -> Any:
    with snapshot(store.log.readers) as connection:
        return stored_sessions.load(connection, session_id)


_JOURNAL = (
    "SELECT execution_id, tool, parent_id, idempotency_key, began_sequence, status, ended_sequence FROM executions"
)
_VERSIONS = """
    SELECT variable_id, version, kind, value, cause, sequence FROM versions
    JOIN variables USING (variable_key) JOIN commits USING (sequence)
"""
KINDS = ("registered", "set", "rolled_back", "deleted", "lock_broken", "published")


def check_journal(path: Path, oracle: Oracle) -> None:
    """Check that the journal and the versions in the file are the oracle's, without uncommitted writes."""
    with reading(path) as connection:
        assert sorted(connection.execute(_JOURNAL)) == sorted(entry.row() for entry in oracle.journal.values())
        rows = sorted((*row[:2], KINDS[row[2]], *row[3:]) for row in connection.execute(_VERSIONS))
        assert rows == sorted(version.row() for version in oracle.log)


def check_file(path: Path, oracle: Oracle) -> None:
    """Check the closed file at the end."""
    anchor = parse(path.with_name(path.name + ".anchor").read_bytes())
    readers = open_readers(path, 1)
    try:
        assert [str(problem) for problem in iter_problems(readers, anchor)] == []
    finally:
        readers.dispose()
    check_journal(path, oracle)
    with reading(path) as connection:
        causes = [row[0] for row in connection.execute("SELECT cause FROM commits ORDER BY sequence")]
    assert causes == oracle.causes


def run_model(examples: int, **more: Any) -> None:
    run_state_machine_as_test(
        ExecutionModel,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            phases=PHASES,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
            **more,
        ),
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_executions_agree_with_the_oracle() -> None:
    run_model(EXAMPLES)


# A model that never finds a bug proves nothing


_finish = Execution.finish


def check_nothing(self: FinishExecution, state: Any) -> Iterator[Any]:
    """Commit whatever others have changed."""
    yield from ()


def forget_patterns(self: Execution, verdict: Verdict) -> FinishExecution:
    """Do not check listed variables again, which allows phantoms."""
    return replace(_finish(self, verdict), matched={})


def drop_steps(self: Execution, verdict: Verdict) -> FinishExecution:
    """Lose the last write."""
    command = _finish(self, verdict)
    return replace(command, steps=command.steps[:-1])


def do_nothing(*_: Any) -> None:
    """Undo nothing; interrupt nothing."""


def keep_seen(self: Overlay, variable: Any) -> None:
    """Treat its own published values as conflicts."""
    self.published[variable.name] = variable
    self._show_published()


def read_committed(self: BeginExecution, uow: Any) -> Any:
    """Let executions share the session with other writers."""
    return replace(_apply(self, uow), snapshot=uow.session(self.session_id))


_apply = BeginExecution.apply


@contextmanager
def planted(owner: type, name: str, bug: Callable[..., Any]) -> Iterator[None]:
    with patch.object(owner, name, bug):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "bug"),
    [
        (FinishExecution, "_changed", check_nothing),
        pytest.param(Execution, "finish", forget_patterns, marks=pytest.mark.thorough),
        (Execution, "finish", drop_steps),
        pytest.param(Execution, "undo", do_nothing, marks=pytest.mark.thorough),
        (Groups, "_interrupt_stale", do_nothing),
        pytest.param(Overlay, "rebase", keep_seen, marks=pytest.mark.thorough),
        (BeginExecution, "apply", read_committed),
    ],
)
def test_planted_bugs_are_found(owner: type, name: str, bug: Callable[..., Any]) -> None:
    # The same examples each time, so that finding the bug does not depend on luck.
    with planted(owner, name, bug), pytest.raises((AssertionError, ExceptionGroup)):
        run_model(900, database=None, derandomize=True)
