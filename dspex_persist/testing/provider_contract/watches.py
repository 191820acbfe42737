"""Watches deliver whole commits, in order, each once, none missing, and only durable ones."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.model import ChangeKind, UpdateKind, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.watch import Watch
from dspex_persist.testing.checks import DEADLINE_S, LONG_TEXT, check_whole_commits, names_of, refused, take, take_until
from dspex_persist.testing.provider_contract.base import Contract


class WatchContract(Contract):
    """Watches deliver whole commits, in order, each once, none missing, and only durable ones."""

    @pytest.fixture
    def watched(self, provider: StateProvider) -> str:
        session_id = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(session_id)
        for name in ("x", "y"):
            provider.register_variable(session_id, name, "integer", 0)
        return session_id

    def end_marker(self, provider: StateProvider, watched: str) -> str:
        """Register a variable that marks the end of the updates so far for a watcher of the whole session."""
        name = f"end-{uuid.uuid4().hex}"
        provider.register_variable(watched, name, "integer", 0)
        return name

    def test_begins_with_the_values_as_they_are(self, provider: StateProvider, watched: str) -> None:
        provider.set_variable(watched, "y", 1)
        with provider.watch(watched) as watch:
            assert watch.initial == provider.list_variables(watched)
            assert watch.position == provider.get_variable_history(watched, "y", 1)[0].sequence
            assert watch.next(0.01) == []

    def test_tells_every_change_with_its_variable_and_version(self, provider: StateProvider, watched: str) -> None:
        with provider.watch(watched) as watch:
            provider.set_variable(watched, "x", 1, metadata={"a": "1"})
            first = provider.get_variable(watched, "x")
            provider.rollback_variable(watched, "x", 0)
            provider.register_variable(watched, "z", "string", "new")
            updates = take(watch, 3)
            assert watch.position == updates[-1].sequence
        assert [update.kind for update in updates] == [UpdateKind.VALUE_CHANGE] * 3
        assert names_of(updates) == ["x", "x", "z"]
        assert updates[0].variable == first
        history = provider.get_variable_history(watched, "x")
        assert [updates[1].version, updates[0].version] == history[:2]
        assert [update.sequence for update in updates[1::-1]] == [version.sequence for version in history[:2]]
        assert updates[0].created_at == history[1].created_at
        assert updates[2].version is not None
        assert updates[2].version.kind is ChangeKind.REGISTERED
        check_whole_commits(updates)

    def test_tells_the_values_before_and_who_made_the_commit(self, provider: StateProvider, watched: str) -> None:
        provider.register_variable(watched, "text", "string", "")
        provider.add_dependency(watched, "y", "x")
        large = f"{LONG_TEXT} and more"
        with provider.watch(watched) as watch:
            provider.register_variable(watched, "z", "integer", 7)
            provider.set_variable(watched, "x", 1)
            provider.set_variable(watched, "text", large)
            provider.set_variable(watched, "text", "short")
            provider.delete_variable(watched, "z")
            new, x, y, long, short, gone = updates = take(watch, 6)
        assert [new.previous, x.previous, long.previous, gone.previous] == [None, Value("0"), Value('""'), Value("7")]
        assert short.previous == Value(f'"{large}"'), "of any size, for a watch that has had it"
        assert y.previous is None, "a dependant has not changed"
        version = provider.get_variable_history(watched, "x", 1)[0]
        assert {update.actor for update in updates} == {version.actor}
        assert [x.cause, y.cause, gone.cause] == ["SetVariable", "SetVariable", "DeleteVariable"]
        assert x.execution_id is None

    def test_tells_a_batch_as_one_commit(self, provider: StateProvider, watched: str) -> None:
        with provider.watch(watched) as watch:
            provider.set_variables(watched, {"y": 1, "x": 2})
            provider.set_variables(watched, {"x": 3, "y": 4}, atomic=True)
            updates = take(watch, 4)
        check_whole_commits(updates)
        assert [update.part for update in updates] == [(1, 2), (2, 2), (1, 2), (2, 2)]
        assert names_of(updates) == ["x", "y", "x", "y"], "in the order of the log"

    def test_tells_a_deletion_with_the_last_value(self, provider: StateProvider, watched: str) -> None:
        provider.set_variable(watched, "x", 7)
        with provider.watch(watched, ["x"]) as watch:
            provider.delete_variable(watched, "x")
            (update,) = take(watch, 1)
        assert (update.kind, update.variable.name, update.variable.value) == (UpdateKind.DELETED, "x", Value("7"))
        assert update.version is not None
        assert (update.version.kind, update.version.version, update.version.value) == (ChangeKind.DELETED, 2, None)

    def test_tells_nothing_of_what_failed_or_changed_nothing_or_is_elsewhere(
        self, provider: StateProvider, watched: str
    ) -> None:
        provider.initialize_session(other := uuid.uuid4().hex)
        provider.register_variable(other, "x", "integer", 0)
        with provider.watch(watched) as watch:
            provider.set_variable(other, "x", 1)
            refused(provider.submit(commands.SetVariable(watched, "x", Value('"text"'))))
            refused(provider.submit(commands.SetVariable(watched, "x", Value("1"), expected_version=9)))
            provider.set_variables(watched, {"x": 1, "none": 1}, atomic=True)
            provider.register_variable(watched, "x", "integer", 5)
            provider.initialize_session(watched, {"new": "metadata"})
            provider.start_optimization(watched, "x", "optimizer")
            provider.stop_optimization(watched, "x")
            assert take_until(watch, self.end_marker(provider, watched)) == []

    def test_filters_by_name_and_by_id(self, provider: StateProvider, watched: str) -> None:
        y_id = provider.get_variable(watched, "y").id
        for identifier in ("y", y_id):
            with provider.watch(watched, [identifier]) as watch:
                assert names_of(watch.initial) == ["y"]
                version = provider.set_variables(watched, {"x": 1, "y": 2}).versions["y"]
                provider.set_variable(watched, "x", 3)
                provider.set_variable(watched, "y", 4)
                updates = take(watch, 2)
            assert names_of(updates) == ["y", "y"]
            assert [update.part for update in updates] == [(1, 1), (1, 1)]
            assert [update.variable.version for update in updates] == [version, version + 1]

    def test_a_name_outlives_its_variable_an_id_does_not(self, provider: StateProvider, watched: str) -> None:
        x_id = provider.get_variable(watched, "x").id
        with provider.watch(watched, ["x"]) as by_name, provider.watch(watched, [x_id, "y"]) as by_id:
            provider.delete_variable(watched, "x")
            provider.register_variable(watched, "x", "string", "again")
            provider.set_variable(watched, "y", 1)
            updates = take(by_name, 2)
            assert [update.kind for update in updates] == [UpdateKind.DELETED, UpdateKind.VALUE_CHANGE]
            assert names_of(take(by_id, 2)) == ["x", "y"]

    def test_an_unknown_identifier_is_not_found(self, provider: StateProvider, watched: str) -> None:
        for identifiers in (["unknown"], ["x", "unknown"]):
            with pytest.raises(errors.VariableNotFoundError, match="'unknown'"):
                provider.watch(watched, identifiers)

    def test_a_deleted_variable_may_still_be_watched(self, provider: StateProvider, watched: str) -> None:
        begun = provider.get_variable_history(watched, "x")[0].sequence
        provider.delete_variable(watched, "x")
        with provider.watch(watched, ["x"], after_sequence=begun) as watch:
            (update,) = take(watch, 1)
        assert update.kind is UpdateKind.DELETED

    def test_tells_dependants_after_what_they_depend_on(self, provider: StateProvider, watched: str) -> None:
        for name in ("model", "prompt", "score"):
            provider.register_variable(watched, name, "integer", 0)
        # score -> prompt -> x, score -> model -> x, score -> x: what score uses must be reported before score.
        for user, used in (("score", "x"), ("score", "prompt"), ("score", "model"), ("prompt", "x"), ("model", "x")):
            provider.add_dependency(watched, user, used)
        with provider.watch(watched) as watch, provider.watch(watched, ["score"]) as score:
            provider.set_variable(watched, "x", 1)
            updates = take(watch, 4)
            (update,) = take(score, 1)
            provider.set_variable(watched, "model", 1)
            assert names_of(take(watch, 2)) == ["model", "score"]
        changed, *affected = updates
        assert (changed.variable.name, changed.kind) == ("x", UpdateKind.VALUE_CHANGE)
        assert {update.kind for update in affected} == {UpdateKind.DEPENDENCY_CHANGED}
        assert names_of(affected)[2] == "score"
        assert sorted(names_of(affected)[:2]) == ["model", "prompt"]
        check_whole_commits(updates)
        assert update.kind is UpdateKind.DEPENDENCY_CHANGED
        assert update.variable == provider.get_variable(watched, "score")
        assert update.dependency == "x"
        assert update.version is None
        assert update.part == (1, 1)

    def test_a_deletion_is_reported_to_dependants(self, provider: StateProvider, watched: str) -> None:
        provider.add_dependency(watched, "y", "x")
        with provider.watch(watched, ["y"]) as watch:
            provider.delete_variable(watched, "x")
            (update,) = take(watch, 1)
            assert (update.kind, update.dependency) == (UpdateKind.DEPENDENCY_CHANGED, "x")
            provider.register_variable(watched, "x", "integer", 0)
            provider.set_variable(watched, "x", 1)
            provider.set_variable(watched, "y", 1)
            (update,) = take(watch, 1)
            assert update.kind is UpdateKind.VALUE_CHANGE, "the new x is another variable"

    def test_misses_and_doubles_nothing_while_others_write(self, provider: StateProvider, watched: str) -> None:
        """Watches opened while others write: initial values and updates add up to the final values."""
        writers, rounds = 4, 40
        names = [f"w{number}" for number in range(writers)]
        for name in names:
            provider.register_variable(watched, name, "integer", 0)
        started = threading.Barrier(writers + 1)

        def work(name: str) -> None:
            started.wait(DEADLINE_S)
            for number in range(1, rounds + 1):
                provider.set_variables(watched, {name: number, "x": number})

        watches: list[Watch] = []
        with ThreadPoolExecutor(writers) as threads:
            working = [threads.submit(work, name) for name in names]
            started.wait(DEADLINE_S)
            while not all(future.done() for future in working):
                if len(watches) < 8:
                    watches.append(provider.watch(watched))
            for future in working:
                future.result(DEADLINE_S)
        watches.append(provider.watch(watched))
        end = self.end_marker(provider, watched)
        for watch in watches:
            with watch:
                updates = take_until(watch, end)
            check_whole_commits(updates)
            for variable in watch.initial:
                versions = [update.variable.version for update in updates if update.variable.id == variable.id]
                last = provider.get_variable(watched, variable.id).version
                assert versions == list(range(variable.version + 1, last + 1)), variable.name

    def test_resumes_after_a_sequence(self, provider: StateProvider, watched: str) -> None:
        with provider.watch(watched) as watch:
            for number in range(1, 11):
                provider.set_variables(watched, {"x": number, "y": number})
            updates = take(watch, 20)
        for position in range(0, 20, 2):
            after = updates[position].sequence
            with provider.watch(watched, after_sequence=after) as watch:
                assert watch.initial == ()
                assert watch.position == after
                assert take(watch, 18 - position) == updates[position + 2 :] if position < 18 else True
        with provider.watch(watched, ["y"], after_sequence=updates[0].sequence) as watch:
            assert names_of(take(watch, 9)) == ["y"] * 9

    def test_resumes_what_others_changed_meanwhile(self, provider: StateProvider, watched: str) -> None:
        """Updates from the history equal those from memory, including dependants and locks."""
        provider.add_dependency(watched, "y", "x")
        with provider.watch(watched) as live:
            begun = live.position
            provider.set_variable(watched, "x", 1, metadata={"a": "1"})
            provider.start_optimization(watched, "x", "holder")
            provider.set_variable(watched, "x", 2, metadata={"optimizer_id": "holder", "b": "2"})
            provider.stop_optimization(watched, "x")
            provider.set_variable(watched, "x", 3, metadata={"a": "3"})
            provider.register_variable(watched, "z", "integer", 0, metadata={"m": "1"})
            provider.delete_variable(watched, "z")
            updates = take(live, 8)
        with provider.watch(watched, after_sequence=begun) as resumed:
            # As a server does whose client has lost its connection.
            resumed.check_continues(0)
            assert take(resumed, 8) == updates

    def test_resumes_beyond_what_memory_holds(self, provider: StateProvider, watched: str) -> None:
        position = provider.get_variable_history(watched, "y")[0].sequence
        with provider.watch(watched) as slow:
            pending = [provider.submit(commands.SetVariable(watched, "x", Value(str(n)))) for n in range(1, 601)]
            for future in pending:
                future.result(DEADLINE_S)
            with provider.watch(watched, after_sequence=position) as resumed:
                for watch in (slow, resumed):
                    updates = take(watch, 600)
                    assert [update.variable.version for update in updates] == list(range(1, 601))
                    check_whole_commits(updates)
                provider.set_variable(watched, "x", 0)
                assert [take(watch, 1)[0].variable.version for watch in (slow, resumed)] == [601, 601]

    def test_a_sequence_ahead_of_the_store_is_refused(self, provider: StateProvider, watched: str) -> None:
        for sequence in (10**9, 2**62):
            with pytest.raises(errors.InvalidArgumentError, match="invalid after_sequence"):
                provider.watch(watched, after_sequence=sequence)

    def test_a_sequence_before_the_session_tells_all_of_it(self, provider: StateProvider, watched: str) -> None:
        with provider.watch(watched, after_sequence=0) as watch:
            updates = take(watch, 2)
        assert names_of(updates) == ["x", "y"]

    def test_ends_when_the_session_ends(self, provider: StateProvider, watched: str) -> None:
        with provider.watch(watched) as watch:
            provider.set_variable(watched, "x", 1)
            provider.cleanup_session(watched)
            provider.initialize_session(watched)
            provider.register_variable(watched, "x", "integer", 5)
            assert names_of(watch) == ["x"], "it gets the updates before the end, but none of the next session"
            with pytest.raises(errors.SessionNotFoundError):
                watch.pull()

    def test_ends_for_one_who_waits(self, provider: StateProvider, watched: str) -> None:
        with provider.watch(watched) as watch, ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(list, watch)
            provider.cleanup_session(watched)
            assert waiting.result(DEADLINE_S) == []

    def test_many_watch_the_same(self, provider: StateProvider, watched: str) -> None:
        watches = [provider.watch(watched) for _ in range(20)]
        for number in range(1, 11):
            provider.set_variable(watched, "x", number)
        received = [take(watch, 10) for watch in watches]
        for watch in watches:
            watch.close()
        assert all(updates == received[0] for updates in received)
        assert [update.variable.version for update in received[0]] == list(range(1, 11))

    def test_a_watcher_that_does_not_read_delays_no_one(self, provider: StateProvider, watched: str) -> None:
        provider.register_variable(watched, "text", "string", "")
        with provider.watch(watched) as idle:
            for number in range(40):
                provider.set_variable(watched, "text", f"{number}{LONG_TEXT}")
            assert len(take(idle, 40)) == 40

    def test_a_closed_one_lets_go(self, provider: StateProvider, watched: str) -> None:
        watch = provider.watch(watched)
        watch.close()
        watch.close()
        assert provider.set_variable(watched, "x", 1) == 1
