"""The rules of every command, over a unit of work and an in-memory backing: no file, no threads."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest

from dspex_persist.spelling import closest
from dspex_persist.state import errors
from dspex_persist.state.commands import (
    CleanupSession,
    Command,
    DeleteVariable,
    ExpireSession,
    GetSession,
    GetVariable,
    GetVariableHistory,
    GetVariables,
    Heartbeat,
    InitializeSession,
    ListVariables,
    RegisterVariable,
    RollbackVariable,
    SetVariable,
    SetVariables,
    StartOptimization,
    StopOptimization,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ChangeKind, EventKind, Origin, Source, Value, Variable
from dspex_persist.state.unit_of_work import START, Drafts, RecordedOutcome
from tests.deadline import cpu_s_below
from tests.memory import MemoryGroups


class Clock:
    """A clock that only moves when the test moves it."""

    def __init__(self) -> None:
        self.time = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def forward(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def memory(clock: Clock) -> MemoryGroups:
    """A backing with a session `s`."""
    backing = MemoryGroups(now=clock)
    backing.run(InitializeSession("s"))
    return backing


def register(memory: MemoryGroups, name: str = "x", value: str = "1", **options: Any) -> str:
    return memory.run(RegisterVariable("s", name, options.pop("type", "integer"), Value(value), **options))


def get(memory: MemoryGroups, identifier: str = "x") -> Variable:
    return memory.run(GetVariable("s", identifier))


def write(memory: MemoryGroups, name: str, value: str, **metadata: str) -> int:
    return memory.run(SetVariable("s", name, Value(value), metadata))


def asked_by(actor: str, optimizer_id: str | None = None) -> Origin:
    return Origin(actor, "test", Source.ELIXIR, None, optimizer_id)


class TestSessions:
    def test_begins_with_its_metadata_and_time(self, memory: MemoryGroups, clock: Clock) -> None:
        view = memory.run(InitializeSession("new", {"user": "ada"}))
        assert not view.resumed
        assert view.variables == ()
        summary = memory.run(GetSession("new"))
        assert (summary.id, summary.metadata, summary.created_at) == ("new", {"user": "ada"}, clock.time)

    def test_resuming_returns_the_variables_and_makes_no_commit(self, memory: MemoryGroups) -> None:
        register(memory, "b")
        register(memory, "a")
        commits = memory.sequence
        view = memory.run(InitializeSession("s"))
        assert view.resumed
        assert [variable.name for variable in view.variables] == ["b", "a"]
        assert memory.sequence == commits

    def test_resuming_merges_metadata(self, memory: MemoryGroups) -> None:
        memory.run(InitializeSession("s", {"a": "1", "b": "1"}))
        memory.run(InitializeSession("s", {"b": "2"}))
        assert memory.run(GetSession("s")).metadata == {"a": "1", "b": "2"}
        assert memory.commits[-1].events[0].kind is EventKind.SESSION_UPDATED

    def test_metadata_may_not_grow_past_the_limit_by_merging(self) -> None:
        memory = MemoryGroups(Limits(metadata_entries=3))
        memory.run(InitializeSession("s", {"a": "", "b": ""}))
        with pytest.raises(errors.LimitExceededError, match="metadata_entries"):
            memory.run(InitializeSession("s", {"c": "", "d": ""}))
        assert memory.run(GetSession("s")).metadata == {"a": "", "b": ""}

    @pytest.mark.parametrize("session_id", ["", "a\0b", "a\nb", "\x7f", "\ud800"])
    def test_an_invalid_id(self, memory: MemoryGroups, session_id: str) -> None:
        with pytest.raises(errors.InvalidArgumentError, match="session_id"):
            memory.run(InitializeSession(session_id))

    def test_unknown_everywhere(self, memory: MemoryGroups) -> None:
        commands: list[Command[Any]] = [
            GetSession("missing"),
            GetVariable("missing", "x"),
            SetVariables("missing", {}),
            ListVariables("missing"),
            GetVariableHistory("missing", "x"),
        ]
        for command in commands:
            with pytest.raises(errors.SessionNotFoundError, match="not found"):
                memory.run(command)
        assert memory.run(Heartbeat("missing")) is False
        assert memory.run(CleanupSession("missing")) == 0
        assert memory.sequence == 1

    def test_cleaning_up_counts_the_variables_and_frees_the_id(self, memory: MemoryGroups) -> None:
        register(memory, "x")
        register(memory, "y")
        assert memory.run(CleanupSession("s")) == 2
        assert memory.run(Heartbeat("s")) is False
        assert not memory.run(InitializeSession("s")).resumed
        with pytest.raises(errors.VariableNotFoundError):
            memory.run(GetVariableHistory("s", "x"))

    def test_expires_when_its_ttl_is_over_and_not_before(self, memory: MemoryGroups, clock: Clock) -> None:
        memory.run(InitializeSession("t", {"ttl_seconds": "10"}))
        clock.forward(9.999)
        assert memory.run(Heartbeat("t"))
        clock.forward(9.999)
        assert memory.run(Heartbeat("t")), "each call restarts the TTL"
        assert memory.run(ExpireSession("t")) is False
        clock.forward(10)
        assert memory.run(Heartbeat("t")) is False
        with pytest.raises(errors.SessionNotFoundError):
            memory.run(GetSession("t"))

    def test_an_expired_session_is_ended_before_its_id_is_reused(self, memory: MemoryGroups, clock: Clock) -> None:
        memory.run(InitializeSession("t", {"ttl_seconds": "10"}))
        clock.forward(11)
        assert not memory.run(InitializeSession("t")).resumed
        assert memory.run(GetSession("t")).metadata == {}
        ended = memory.commits[-2]
        assert [event.kind for event in ended.events] == [EventKind.SESSION_ENDED]
        assert memory.commits[-1].events[0].kind is EventKind.SESSION_STARTED

    def test_a_ttl_can_be_changed_and_removed(self, memory: MemoryGroups, clock: Clock) -> None:
        memory.run(InitializeSession("t", {"ttl_seconds": "10"}))
        memory.run(InitializeSession("t", {"ttl_seconds": "100"}))
        clock.forward(50)
        assert memory.run(Heartbeat("t"))
        memory.run(InitializeSession("t", {"ttl_seconds": "0"}))
        clock.forward(10**6)
        assert memory.run(Heartbeat("t"))

    def test_the_default_ttl(self, clock: Clock) -> None:
        memory = MemoryGroups(session_ttl_s=5, now=clock)
        memory.run(InitializeSession("default"))
        memory.run(InitializeSession("own", {"ttl_seconds": "50"}))
        memory.run(InitializeSession("ever", {"ttl_seconds": "0"}))
        clock.forward(6)
        assert [memory.run(Heartbeat(name)) for name in ("default", "own", "ever")] == [False, True, True]

    @pytest.mark.parametrize("text", ["", "soon", "nan", "-1", "inf", "1e11", "0x10", "\u0661\u0660\u0660 s"])
    def test_an_invalid_ttl(self, memory: MemoryGroups, text: str) -> None:
        with pytest.raises(errors.InvalidArgumentError, match="ttl_seconds"):
            memory.run(InitializeSession("t", {"ttl_seconds": text}))
        assert memory.run(Heartbeat("t")) is False


class TestRegisterVariable:
    def test_the_id_the_version_and_the_log(self, memory: MemoryGroups, clock: Clock) -> None:
        variable_id = register(memory, "temperature", "0.5", type="float", metadata={"unit": "none"})
        assert variable_id.startswith("var_temperature_")
        variable = get(memory, variable_id)
        assert variable == get(memory, "temperature")
        assert (variable.version, variable.value, variable.metadata) == (0, Value("0.5"), {"unit": "none"})
        assert variable.updated_at == clock.time
        assert [event.kind for event in memory.commits[-1].events] == [EventKind.VARIABLE_REGISTERED]
        assert memory.commits[-1].changes[0].version.kind is ChangeKind.REGISTERED

    def test_registering_the_same_again_keeps_the_current_value(self, memory: MemoryGroups) -> None:
        first = register(memory, constraints='{"min": 0, "max": 9}')
        write(memory, "x", "7")
        commits = memory.sequence
        assert register(memory, value="1", constraints='{"max":9,"min":0}') == first
        assert get(memory).value == Value("7")
        assert memory.sequence == commits

    @pytest.mark.parametrize(
        ("again", "difference"),
        [
            ({"type": "float"}, "its type is integer, not float"),
            ({"constraints": '{"max":8}'}, 'its constraints are {"max":9}, not {"max":8}'),
            ({"constraints": ""}, 'its constraints are {"max":9}, not none'),
        ],
    )
    def test_registering_something_else_says_what_differs(
        self, memory: MemoryGroups, again: Mapping[str, str], difference: str
    ) -> None:
        register(memory, constraints='{"max":9}')
        with pytest.raises(errors.VariableExistsError) as refused:
            register(memory, **{"constraints": '{"max":9}', **again})
        assert difference in str(refused.value)

    def test_after_a_deletion_it_is_a_new_variable(self, memory: MemoryGroups) -> None:
        first = register(memory, value="1")
        write(memory, "x", "2")
        memory.run(DeleteVariable("s", "x"))
        second = register(memory, value='"text"', type="string")
        assert second != first
        assert get(memory).version == 0
        with pytest.raises(errors.VariableNotFoundError):
            get(memory, first)

    def test_a_name_that_is_the_id_of_another_is_refused(self, memory: MemoryGroups) -> None:
        other = register(memory, "x")
        with pytest.raises(errors.InvalidArgumentError, match="id of another variable"):
            register(memory, other)

    def test_one_more_than_the_limit_allows(self) -> None:
        memory = MemoryGroups(Limits(variables_per_session=2))
        memory.run(InitializeSession("s"))
        register(memory, "a")
        register(memory, "b")
        with pytest.raises(errors.LimitExceededError, match=r"is 3, above the limit of 2 .*variables_per_session"):
            register(memory, "c")
        register(memory, "a")
        memory.run(DeleteVariable("s", "a"))
        register(memory, "c")

    @pytest.mark.parametrize("name", ["", "a\0", "tab\t", "\udfff"])
    def test_an_invalid_name(self, memory: MemoryGroups, name: str) -> None:
        with pytest.raises(errors.InvalidArgumentError, match="name"):
            register(memory, name)

    def test_a_refused_registration_leaves_nothing_behind(self, memory: MemoryGroups) -> None:
        wrong: list[tuple[type[errors.StateError], dict[str, Any]]] = [
            (errors.UnknownTypeError, {"type": "number"}),
            (errors.InvalidValueError, {"value": '"one"'}),
            (errors.InvalidValueError, {"value": "9", "constraints": '{"max":8}'}),
            (errors.InvalidConstraintsError, {"constraints": "{"}),
            (errors.InvalidConstraintsError, {"constraints": '{"max":"8"}'}),
            (errors.InvalidArgumentError, {"metadata": {"dspex.own": "x"}}),
            (errors.InvalidArgumentError, {"metadata": {"commit_sequence": "1"}}),
            (errors.LimitExceededError, {"constraints": '{"max":1}' + " " * 65_536}),
        ]
        for kind, options in wrong:
            with pytest.raises(kind):
                register(memory, **options)
        assert memory.sequence == 1
        assert memory.states["s"].variables == {}
        assert memory.states["s"].names == {}


class TestSetVariable:
    def test_increments_the_version_even_for_an_equal_value(self, memory: MemoryGroups) -> None:
        register(memory)
        assert [write(memory, "x", "1") for _ in range(3)] == [1, 2, 3]

    def test_the_current_version_may_be_expected(self, memory: MemoryGroups) -> None:
        register(memory)
        write(memory, "x", "2")
        assert memory.run(SetVariable("s", "x", Value("3"), expected_version=1)) == 2
        with pytest.raises(errors.VersionConflictError) as refused:
            memory.run(SetVariable("s", "x", Value("4"), expected_version=1))
        assert (refused.value.expected, refused.value.actual) == (1, 2)
        assert "expected version 1" in str(refused.value)
        assert "current version is 2" in str(refused.value)
        assert get(memory).value == Value("3")
        with pytest.raises(errors.InvalidArgumentError, match="expected_version"):
            memory.run(SetVariable("s", "x", Value("4"), expected_version=-1))

    def test_metadata_merges_and_history_keeps_each_part(self, memory: MemoryGroups) -> None:
        register(memory, metadata={"a": "1", "b": "1"})
        write(memory, "x", "2", b="2", c="2")
        assert get(memory).metadata == {"a": "1", "b": "2", "c": "2"}
        assert memory.run(GetVariableHistory("s", "x"))[0].metadata == {"b": "2", "c": "2"}

    def test_metadata_may_not_grow_past_the_limit_by_merging(self) -> None:
        memory = MemoryGroups(Limits(metadata_entries=2))
        memory.run(InitializeSession("s"))
        register(memory, metadata={"a": "1"})
        write(memory, "x", "2", b="1")
        with pytest.raises(errors.LimitExceededError, match="metadata_entries"):
            write(memory, "x", "3", c="1")
        assert write(memory, "x", "3", b="2") == 2

    @pytest.mark.parametrize(
        ("metadata", "recorded"),
        [
            ({}, Source.PYTHON),
            ({"source": "elixir"}, Source.ELIXIR),
            ({"source": "Elixir"}, Source.ELIXIR),
            ({"source": "python"}, Source.PYTHON),
            ({"source": "cobol"}, Source.PYTHON),
        ],
    )
    def test_the_source_is_from_the_metadata_or_else_the_origin(
        self, memory: MemoryGroups, metadata: dict[str, str], recorded: Source
    ) -> None:
        register(memory, metadata={"source": "elixir"})
        assert get(memory).source is Source.ELIXIR
        write(memory, "x", "2", **metadata)
        assert get(memory).source is recorded

    def test_the_version_has_actor_time_and_cause(self, memory: MemoryGroups, clock: Clock) -> None:
        register(memory)
        clock.forward(5)
        memory.run(SetVariable("s", "x", Value("2")), Origin("ada", "SetVariable", Source.ELIXIR))
        (version,) = memory.run(GetVariableHistory("s", "x", 1))
        assert (version.actor, version.cause, version.source) == ("ada", "SetVariable", Source.ELIXIR)
        assert (version.created_at, version.sequence) == (clock.time, memory.sequence)

    def test_a_value_is_coerced_to_its_type(self, memory: MemoryGroups) -> None:
        register(memory)
        write(memory, "x", "5.0")
        assert get(memory).value == Value("5")
        with pytest.raises(errors.InvalidValueError):
            write(memory, "x", "5.5")
        assert get(memory).version == 1


class TestSetVariables:
    @pytest.fixture(autouse=True)
    def two_variables(self, memory: MemoryGroups) -> None:
        register(memory, "x", constraints='{"max":9}')
        register(memory, "y")

    def batch(self, memory: MemoryGroups, atomic: bool, **updates: str) -> Any:
        values = {name: Value(text) for name, text in updates.items()}
        return memory.run(SetVariables("s", values, {"by": "batch"}, atomic))

    @pytest.mark.parametrize("atomic", [True, False])
    def test_is_one_commit(self, memory: MemoryGroups, atomic: bool) -> None:
        commits = memory.sequence
        outcome = self.batch(memory, atomic, x="2", y="3")
        assert (outcome.success, outcome.versions, outcome.errors) == (True, {"x": 1, "y": 1}, {})
        assert memory.sequence == commits + 1
        assert len(memory.commits[-1].changes) == 2

    def test_atomic_is_all_or_nothing(self, memory: MemoryGroups) -> None:
        before, commits = memory.states["s"], memory.sequence
        outcome = self.batch(memory, True, y="3", x="10", missing="1")
        assert (outcome.success, outcome.versions) == (False, {})
        assert "above maximum 9" in outcome.errors["x"]
        assert "not found" in outcome.errors["missing"]
        assert set(outcome.errors) == {"x", "missing"}
        assert memory.states["s"] == before
        assert memory.sequence == commits

    def test_otherwise_the_valid_entries_are_applied(self, memory: MemoryGroups) -> None:
        outcome = self.batch(memory, False, x="10", y="3", missing="1")
        assert (outcome.success, outcome.versions) == (True, {"y": 1})
        assert set(outcome.errors) == {"x", "missing"}
        assert (get(memory, "x").version, get(memory, "y").version) == (0, 1)
        outcome = self.batch(memory, False, x="10", missing="1")
        assert (outcome.success, outcome.versions) == (False, {})

    @pytest.mark.parametrize("atomic", [True, False])
    def test_entries_that_could_not_be_read_are_failures(self, memory: MemoryGroups, atomic: bool) -> None:
        command = SetVariables("s", {"y": Value("3")}, atomic=atomic, refused={"x": "it is no UTF-8"})
        outcome = memory.run(command)
        assert outcome.errors == {"x": "it is no UTF-8"}
        assert outcome.success is not atomic
        assert get(memory, "y").version == int(not atomic)

    def test_by_name_and_by_id_in_one_batch_are_two_versions(self, memory: MemoryGroups) -> None:
        outcome = memory.run(SetVariables("s", {"x": Value("2"), get(memory).id: Value("3")}))
        assert sorted(outcome.versions.values()) == [1, 2]
        assert get(memory).value == Value("3")

    def test_an_empty_batch_succeeds(self, memory: MemoryGroups) -> None:
        commits = memory.sequence
        assert memory.run(SetVariables("s", {})).success
        assert memory.sequence == commits

    def test_too_many_entries_name_the_setting(self) -> None:
        memory = MemoryGroups(Limits(batch_entries=1))
        memory.run(InitializeSession("s"))
        register(memory, "x")
        with pytest.raises(errors.LimitExceededError, match="batch_entries"):
            self.batch(memory, False, x="1", y="1")

    def test_thousands_of_unknown_names_are_reported_without_comparing_them_all(self, memory: MemoryGroups) -> None:
        """The writer would block all others, so it suggests similar names only for the first few."""
        for number in range(1_000):
            memory.run(RegisterVariable("s", f"{number:03}{'ab' * 26}xx", "integer", Value("1")))
        updates = {f"{number:05}{'ab' * 26}xx": Value("1") for number in range(5_000)}
        with cpu_s_below(3):
            outcome = memory.run(SetVariables("s", updates))
        assert outcome.errors.keys() == updates.keys()
        hints = [error for error in outcome.errors.values() if "did you mean" in error]
        assert 0 < len(hints) < 20


class TestSuggestions:
    @pytest.mark.parametrize("count", [3, 20, 1_000])
    def test_is_found(self, count: int) -> None:
        names = ["temperature", *(f"other {number}" for number in range(count))]
        assert closest("temprature", names) == "temperature"
        assert closest("nothing like it", names) is None

    @pytest.mark.parametrize(
        ("name", "names", "meant"),
        [
            ("yb", ["by", "amount"], "by"),
            ("by", ["byte", "bye"], "bye"),
            ("ID", ["id", "name"], "id"),
            ("id", ["ids", "name"], "ids"),
            ("bx", ["by", "amount"], None),
            ("xy", ["xyz", "xya"], None),
            ("no", ["none of these"], None),
            ("x", ["xy", "X"], None),
        ],
    )
    def test_of_two_letters_only_a_plain_one_is_found(self, name: str, names: list[str], meant: str | None) -> None:
        assert closest(name, names) == meant
        assert closest(name, [*names, *(f"other {number}" for number in range(2_000))]) == meant

    def test_megabytes_get_no_suggestion(self) -> None:
        names = [f"{'x' * 250}{number}" for number in range(2_000)]
        with cpu_s_below(1):
            for name in ("x" * 10_000_000, "x" * 61, "x" * 60, "x" * 250):
                assert closest(name, names) is None


class TestTexts:
    def test_megabytes_are_checked_at_once(self, memory: MemoryGroups) -> None:
        """This runs on the event loop of a server, where all others wait."""
        text = "\u20ac" * 40_000_000
        with cpu_s_below(1), pytest.raises(errors.SessionNotFoundError):
            memory.run(GetSession(text))

    @pytest.mark.parametrize("wrong", ["a\0b", "\u20ac\0", "\ud800", "\u20ac\udfff", "a\ud83d\ude00"])
    def test_arguments_that_no_backend_can_store_are_refused(self, memory: MemoryGroups, wrong: str) -> None:
        with pytest.raises(errors.InvalidArgumentError, match=r"NUL|lone surrogate \(U\+D"):
            memory.run(GetSession(wrong))


class TestPatternsOfABatch:
    def test_matching_in_one_batch_is_bounded(self, memory: MemoryGroups) -> None:
        """Some patterns take RE2 long, and in the writer all others wait."""
        drawn = Random(1)
        for number in range(40):
            hostile = '{"pattern":"[ab]*a[ab]{300}x"}'
            memory.run(RegisterVariable("s", f"v{number}", "string", Value(f'"{"a" * 301}x"'), hostile))
        updates = {f"v{number}": Value(f'"{"".join(drawn.choices("ab", k=100_000))}"') for number in range(40)}
        with cpu_s_below(6):
            outcome = memory.run(SetVariables("s", updates))
        assert "does not match" in outcome.errors["v0"]
        assert "too much to match in one call" in outcome.errors["v39"]

    def test_an_ordinary_batch_is_accepted(self, memory: MemoryGroups) -> None:
        for number in range(1_000):
            memory.run(RegisterVariable("s", f"v{number}", "string", Value('"a@b.c"'), '{"pattern":"^[^@]+@[^@]+$"}'))
        outcome = memory.run(SetVariables("s", {f"v{number}": Value('"d@e.f"') for number in range(1_000)}))
        assert outcome.errors == {}


class TestReads:
    def test_a_batch_is_keyed_by_identifier_and_lists_the_missing_ones(self, memory: MemoryGroups) -> None:
        register(memory, "x")
        register(memory, "y")
        variable_id = get(memory, "y").id
        found = memory.run(GetVariables("s", ("none", variable_id, "x", "nil", "none")))
        assert list(found.variables) == [variable_id, "x"]
        assert found.variables[variable_id].name == "y"
        assert found.missing == ("none", "nil")

    def test_listed_oldest_first_whatever_was_written_last(self, memory: MemoryGroups) -> None:
        for name in ("b", "a", "c"):
            register(memory, name)
        write(memory, "b", "2")
        assert [variable.name for variable in memory.run(ListVariables("s"))] == ["b", "a", "c"]
        memory.run(DeleteVariable("s", "b"))
        register(memory, "b")
        assert [variable.name for variable in memory.run(ListVariables("s"))] == ["a", "c", "b"]
        assert [variable.name for variable in memory.run(ListVariables("s", "?"))] == ["a", "c", "b"]
        assert memory.run(ListVariables("s", "B")) == ()

    def test_a_pattern_longer_than_a_name_names_the_setting(self, memory: MemoryGroups) -> None:
        with pytest.raises(errors.LimitExceededError, match="name_length"):
            memory.run(ListVariables("s", "*" * 256))


class TestHistory:
    def test_newest_first_with_a_limit_and_a_start(self, memory: MemoryGroups) -> None:
        register(memory)
        for value in range(1, 121):
            write(memory, "x", str(value))
        history = memory.run(GetVariableHistory("s", "x"))
        assert [version.version for version in history] == list(range(120, 20, -1))
        assert [version.version for version in memory.run(GetVariableHistory("s", "x", 2))] == [120, 119]
        older = memory.run(GetVariableHistory("s", "x", 3, before=2))
        assert [version.version for version in older] == [1, 0]

    def test_of_a_deleted_variable_ends_with_the_deletion(self, memory: MemoryGroups) -> None:
        variable_id = register(memory)
        write(memory, "x", "2")
        memory.run(DeleteVariable("s", "x"))
        for identifier in ("x", variable_id):
            history = memory.run(GetVariableHistory("s", identifier))
            kinds = [version.kind for version in history]
            assert kinds == [ChangeKind.DELETED, ChangeKind.SET, ChangeKind.REGISTERED]
            assert history[0].value is None

    @pytest.mark.parametrize(
        ("limit", "kind"), [(-1, errors.InvalidArgumentError), (10_001, errors.LimitExceededError)]
    )
    def test_an_invalid_limit(self, memory: MemoryGroups, limit: int, kind: type[errors.StateError]) -> None:
        register(memory)
        with pytest.raises(kind, match="limit"):
            memory.run(GetVariableHistory("s", "x", limit))


class TestRollback:
    def test_is_a_new_version_with_the_old_value(self, memory: MemoryGroups) -> None:
        register(memory, value="1", metadata={"a": "1"})
        write(memory, "x", "2", a="2")
        rolled = memory.run(RollbackVariable("s", "x", 0))
        assert (rolled.version, rolled.value, rolled.metadata) == (2, Value("1"), {"a": "2"})
        newest = memory.run(GetVariableHistory("s", "x"))[0]
        assert newest.kind is ChangeKind.ROLLED_BACK
        assert newest.metadata == {"rolled_back_to": "0"}

    @pytest.mark.parametrize("target", [-1, 2, 2**31 - 1])
    def test_to_a_version_that_does_not_exist(self, memory: MemoryGroups, target: int) -> None:
        register(memory)
        write(memory, "x", "2")
        with pytest.raises(errors.VersionNotFoundError, match=f"{target} of variable 'x'; it has versions 0 to 1"):
            memory.run(RollbackVariable("s", "x", target))

    def test_past_a_broken_lock(self, memory: MemoryGroups) -> None:
        register(memory)
        memory.run(StartOptimization("s", "x", "opt"), asked_by("ada"))
        memory.run(StopOptimization("s", "x", force=True), asked_by("bob"))
        assert memory.run(RollbackVariable("s", "x", 1)).version == 2


class TestDelete:
    def test_removes_the_variable_and_its_weight(self, memory: MemoryGroups) -> None:
        before = memory.states["s"].weight_bytes
        variable_id = register(memory, value='"' + "x" * 1000 + '"', type="string")
        memory.run(DeleteVariable("s", variable_id))
        assert memory.states["s"].weight_bytes == before
        assert memory.states["s"].names == {}
        for identifier in ("x", variable_id):
            with pytest.raises(errors.VariableNotFoundError):
                memory.run(DeleteVariable("s", identifier))


class TestOptimization:
    @pytest.fixture(autouse=True)
    def locked(self, memory: MemoryGroups) -> str:
        """Lock `x` for `opt`, as the user `ada`; return the optimization's id."""
        register(memory)
        return memory.run(StartOptimization("s", "x", "opt", {"trials": "5"}), asked_by("ada"))

    def lock_of(self, memory: MemoryGroups) -> str | None:
        lock = get(memory).optimization
        return lock.optimizer_id if lock is not None else None

    def test_only_its_holder_writes(self, memory: MemoryGroups) -> None:
        refused: list[Command[Any]] = [
            SetVariable("s", "x", Value("2")),
            SetVariable("s", "x", Value("2"), {"optimizer_id": "other"}),
            RollbackVariable("s", "x", 0),
            DeleteVariable("s", "x"),
            StartOptimization("s", "x", "other"),
        ]
        for command in refused:
            with pytest.raises(errors.VariableLockedError, match="'opt'") as error:
                memory.run(command)
            assert error.value.holder == "opt"
        outcome = memory.run(SetVariables("s", {"x": Value("2")}))
        assert "'opt'" in outcome.errors["x"]
        assert write(memory, "x", "2", optimizer_id="opt") == 1
        assert memory.run(RollbackVariable("s", "x", 0), asked_by("ada", "opt")).version == 2

    def test_its_holder_renews_it_by_repeating_the_request(
        self, memory: MemoryGroups, clock: Clock, locked: str
    ) -> None:
        clock.forward(200)
        assert memory.run(StartOptimization("s", "x", "opt")) == locked
        clock.forward(200)
        lock = get(memory).optimization
        assert lock is not None
        assert (lock.optimizer_id, lock.config) == ("opt", {"trials": "5"})

    def test_ends_with_its_lease_unless_the_holder_writes(self, memory: MemoryGroups, clock: Clock) -> None:
        clock.forward(299)
        write(memory, "x", "2", optimizer_id="opt")
        clock.forward(299)
        assert self.lock_of(memory) == "opt"
        assert [variable.optimization is None for variable in memory.run(ListVariables("s"))] == [False]
        clock.forward(1)
        assert self.lock_of(memory) is None
        assert [variable.optimization is None for variable in memory.run(ListVariables("s"))] == [True]
        with pytest.raises(errors.NotOptimizingError):
            memory.run(StopOptimization("s", "x"))
        assert write(memory, "x", "3") == 2
        assert memory.commits[-1].events[0].to_body()["reason"] == "lease ended"

    def test_an_ended_lock_can_be_replaced(self, memory: MemoryGroups, clock: Clock, locked: str) -> None:
        clock.forward(300)
        assert memory.run(StartOptimization("s", "x", "other")) != locked
        kinds = [event.kind for event in memory.commits[-1].events]
        assert kinds == [EventKind.OPTIMIZATION_STOPPED, EventKind.OPTIMIZATION_STARTED]
        assert self.lock_of(memory) == "other"

    def test_the_actor_that_started_it_stops_it_and_gets_the_value(self, memory: MemoryGroups) -> None:
        write(memory, "x", "7", optimizer_id="opt")
        assert memory.run(StopOptimization("s", "x"), asked_by("ada")) == Value("7")
        assert get(memory).version == 1, "stopping is no change of the value"
        assert write(memory, "x", "8") == 2

    def test_its_optimizer_stops_it(self, memory: MemoryGroups) -> None:
        assert memory.run(StopOptimization("s", "x"), asked_by("machine", "opt")) == Value("1")

    @pytest.mark.parametrize("origin", [asked_by("bob"), asked_by("ada", "other")])
    def test_others_need_force_which_the_history_records(self, memory: MemoryGroups, origin: Origin) -> None:
        with pytest.raises(errors.VariableLockedError, match="'opt'"):
            memory.run(StopOptimization("s", "x"), origin)
        assert memory.run(StopOptimization("s", "x", force=True), origin) == Value("1")
        broken = memory.run(GetVariableHistory("s", "x"))[0]
        assert (broken.kind, broken.version, broken.value) == (ChangeKind.LOCK_BROKEN, 1, Value("1"))
        assert broken.metadata["broken_optimizer_id"] == "opt"
        assert get(memory).metadata == {}, "what explains a change does not become the variable's"

    def test_a_broken_optimizer_notices_by_the_version(self, memory: MemoryGroups) -> None:
        write(memory, "x", "2", optimizer_id="opt")
        memory.run(StopOptimization("s", "x", force=True), asked_by("bob"))
        with pytest.raises(errors.VersionConflictError):
            memory.run(SetVariable("s", "x", Value("3"), {"optimizer_id": "opt"}, expected_version=1))

    def test_force_by_the_holder_leaves_no_version(self, memory: MemoryGroups) -> None:
        memory.run(StopOptimization("s", "x", force=True), asked_by("ada"))
        assert get(memory).version == 0

    def test_deleting_waits_for_it(self, memory: MemoryGroups) -> None:
        with pytest.raises(errors.VariableLockedError):
            memory.run(DeleteVariable("s", "x"))
        memory.run(StopOptimization("s", "x"), asked_by("ada"))
        memory.run(DeleteVariable("s", "x"))


class TestGroups:
    """Units that share their drafts, as in one group of the writer."""

    def test_each_sees_the_changes_staged_before_it(self, memory: MemoryGroups) -> None:
        register(memory)
        drafts = Drafts(memory)
        units = [memory.unit(drafts, asked_by("ada"), staged) for staged in range(3)]
        assert SetVariable("s", "x", Value("2")).apply(units[0]) == 1
        assert SetVariable("s", "x", Value("3"), expected_version=1).apply(units[1]) == 2
        assert RollbackVariable("s", "x", 1).apply(units[2]).value == Value("2")
        assert get(memory).version == 0, "nothing is kept yet"
        memory.keep(drafts, *units)
        assert get(memory).version == 3
        assert [version.value for version in memory.run(GetVariableHistory("s", "x"))] == [
            Value("2"),
            Value("3"),
            Value("2"),
            Value("1"),
        ]

    def test_a_failure_does_not_affect_the_others(self, memory: MemoryGroups) -> None:
        register(memory, "x")
        drafts = Drafts(memory)
        first, failing = (memory.unit(drafts, asked_by("ada"), staged) for staged in range(2))
        SetVariable("s", "x", Value("2")).apply(first)
        staged = replace(drafts.states["s"] or memory.states["s"])
        staged = staged.copy()
        RegisterVariable("s", "y", "integer", Value("1")).apply(failing)
        StartOptimization("s", "y", "opt").apply(failing)
        DeleteVariable("s", "x").apply(failing)
        RegisterVariable("s", "x", "string", Value('"new"')).apply(failing)
        failing.rollback_to(START)
        assert not failing.has_changes()
        assert drafts.states["s"] == staged
        memory.keep(drafts, first)
        assert get(memory, "x").value == Value("2")

    @pytest.mark.parametrize("seed", range(20))
    def test_deletions_undone_in_parts_leave_everything_in_its_place(self, memory: MemoryGroups, seed: int) -> None:
        for number in range(6):
            register(memory, f"v{number}")
        random, unit = Random(seed), memory.unit(Drafts(memory), asked_by("ada"), 0)
        marks = []
        for _ in range(12):
            state = unit.session("s")
            marks.append((unit.savepoint(), state.copy(), list(state.variables)))
            name = f"v{random.randrange(8)}"
            if name in state.variables:
                DeleteVariable("s", name).apply(unit)
            else:
                RegisterVariable("s", name, "string", Value('"new"')).apply(unit)
        while marks:
            savepoint, staged, names = marks.pop(random.randrange(len(marks)))
            marks = [mark for mark in marks if mark[0] < savepoint]
            unit.rollback_to(savepoint)
            state = unit.session("s")
            assert (list(state.variables), state.names) == (names, staged.names)
            assert (state.variables, state.weight_bytes) == (staged.variables, staged.weight_bytes)

    def test_a_session_ended_and_begun_again_in_one_group(self, memory: MemoryGroups) -> None:
        register(memory)
        drafts = Drafts(memory)
        units = [memory.unit(drafts, asked_by("ada"), staged) for staged in range(2)]
        CleanupSession("s").apply(units[0])
        assert not InitializeSession("s").apply(units[1]).resumed
        units[1].rollback_to(START)
        assert drafts.states["s"] is None
        assert not InitializeSession("s").apply(units[1]).resumed
        memory.keep(drafts, *units)
        assert memory.run(ListVariables("s")) == ()

    def test_a_savepoint_in_the_middle(self, memory: MemoryGroups) -> None:
        register(memory)
        drafts = Drafts(memory)
        unit = memory.unit(drafts, asked_by("ada"))
        SetVariable("s", "x", Value("2")).apply(unit)
        savepoint = unit.savepoint()
        SetVariable("s", "x", Value("3")).apply(unit)
        unit.rollback_to(savepoint)
        memory.keep(drafts, unit)
        assert (get(memory).version, get(memory).value) == (1, Value("2"))

    def test_recorded_outcomes_come_and_go_with_their_unit(self, memory: MemoryGroups) -> None:
        register(memory)
        drafts = Drafts(memory)
        outcome = RecordedOutcome("s", "key", "SetVariable", "fingerprint", "1")
        first, second = (memory.unit(drafts, asked_by("ada"), staged) for staged in range(2))
        SetVariable("s", "x", Value("2")).apply(first)
        first.record_outcome(outcome)
        assert second.find_outcome("s", "key") == outcome
        first.rollback_to(START)
        assert second.find_outcome("s", "key") is None
        SetVariable("s", "x", Value("2")).apply(first)
        first.record_outcome(outcome)
        memory.keep(drafts, first)
        assert memory.find_outcome("s", "key") == outcome


class TestFingerprint:
    def test_is_the_same_for_equal_requests_whatever_the_order_of_their_maps(self) -> None:
        one = SetVariables("s", {"x": Value("1"), "y": Value("2", b"bytes")}, {"a": "1", "b": "2"})
        two = SetVariables("s", {"y": Value("2", b"bytes"), "x": Value("1")}, {"b": "2", "a": "1"})
        assert one.fingerprint() == two.fingerprint()

    def test_differs_for_everything_else(self) -> None:
        requests: list[Command[Any]] = [
            SetVariable("s", "x", Value("1")),
            SetVariable("t", "x", Value("1")),
            SetVariable("s", "y", Value("1")),
            SetVariable("s", "x", Value("2")),
            SetVariable("s", "x", Value("1", b"")),
            SetVariable("s", "x", Value("1", b"x")),
            SetVariable("s", "x", Value("1"), {"a": "b"}),
            SetVariable("s", "x", Value("1"), expected_version=1),
            DeleteVariable("s", "x"),
            StopOptimization("s", "x"),
            StopOptimization("s", "x", force=True),
        ]
        assert len({request.fingerprint() for request in requests}) == len(requests)
