"""Watching by pull: feeds of recent commits, which watches are woken, and the updates that a commit causes."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from dspex_persist.state.errors import EngineClosedError, SessionNotFoundError
from dspex_persist.state.model import (
    Change,
    ChangeKind,
    CommitChanges,
    Source,
    Update,
    UpdateKind,
    Value,
    Variable,
    VariableVersion,
)
from dspex_persist.state.watch import Feed, Hub, Watch, is_watched, updates_of
from tests.deadline import within

DEADLINE_S = within(10)
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def variable(name: str, version: int = 1) -> Variable:
    return Variable(f"id-{name}", name, "integer", Value("1"), version, "", {}, Source.PYTHON, NOW)


def change(name: str, kind: ChangeKind = ChangeKind.SET, version: int = 1) -> Change:
    value = None if kind is ChangeKind.DELETED else Value("1")
    version_ = VariableVersion(
        f"id-{name}", "integer", version, kind, value, {}, Source.PYTHON, NOW, "ada", "SetVariable", 1
    )
    return Change(version_, variable(name, version))


def commit(sequence: int, *names: str, dependants: str = "") -> CommitChanges:
    return CommitChanges(sequence, tuple(map(change, names)), tuple(map(variable, dependants)))


def sequences(commits: list[CommitChanges] | None) -> list[int] | None:
    return None if commits is None else [commit.sequence for commit in commits]


class TestUpdatesOf:
    def test_an_update_has_its_variable_and_version(self) -> None:
        (update,) = updates_of(commit(7, "x"), ())
        assert (update.kind, update.variable, update.sequence) == (UpdateKind.VALUE_CHANGE, variable("x"), 7)
        assert update.version == change("x").version
        assert update.part == (1, 1)

    def test_a_deletion_is_an_update_of_its_kind(self) -> None:
        (update,) = updates_of(CommitChanges(7, (change("x", ChangeKind.DELETED),)), ())
        assert update.kind is UpdateKind.DELETED

    @pytest.mark.parametrize("kind", [kind for kind in ChangeKind if kind is not ChangeKind.DELETED])
    def test_every_other_kind_is_a_value_change(self, kind: ChangeKind) -> None:
        (update,) = updates_of(CommitChanges(7, (change("x", kind),)), ())
        assert update.kind is UpdateKind.VALUE_CHANGE

    def test_the_parts_of_a_commit_are_counted_dependants_last(self) -> None:
        updates = updates_of(commit(7, "x", "y", dependants="ab"), ())
        assert [update.variable.name for update in updates] == ["x", "y", "a", "b"]
        assert [update.part for update in updates] == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert [update.kind for update in updates[2:]] == [UpdateKind.DEPENDENCY_CHANGED] * 2
        assert {update.dependency for update in updates[2:]} == {"x, y"}
        assert updates[3].version is None

    def test_only_watched_variables_are_included_and_counted(self) -> None:
        changes = commit(7, "x", "y", dependants="ab")
        assert [update.part for update in updates_of(changes, {"y", "id-b"})] == [(1, 2), (2, 2)]
        (dependant,) = updates_of(changes, {"a"})
        assert (dependant.kind, dependant.dependency) == (UpdateKind.DEPENDENCY_CHANGED, "x, y")
        assert updates_of(changes, {"z"}) == []

    def test_a_commit_without_changes_has_no_updates(self) -> None:
        assert updates_of(CommitChanges(7, ()), ()) == []

    def test_is_watched(self) -> None:
        assert is_watched(variable("x"), ())
        assert is_watched(variable("x"), {"x"})
        assert is_watched(variable("x"), {"id-x"})
        assert not is_watched(variable("x"), {"id-y", "y", "X"})


class TestFeed:
    def test_returns_the_commits_after_a_position(self) -> None:
        feed = Feed(floor=10)
        feed.add([commit(12, "x"), commit(15, "x")])
        assert sequences(feed.after(10)) == [12, 15]
        assert sequences(feed.after(12)) == [15]
        assert sequences(feed.after(15)) == []
        assert feed.after(9) is None

    def test_keeps_only_256_commits_and_reports_the_gap(self) -> None:
        feed = Feed(floor=0)
        for sequence in range(1, 301):
            feed.add([commit(sequence, "x")])
        assert feed.floor == 44
        assert feed.after(43) is None
        assert sequences(feed.after(44)) == list(range(45, 301))

    def test_a_group_larger_than_it_keeps(self) -> None:
        feed = Feed(floor=0)
        feed.add([commit(sequence, "x") for sequence in range(1, 1001)])
        assert feed.floor == 744
        assert feed.after(0) is None
        assert sequences(feed.after(744)) == list(range(745, 1001))

    def test_a_reader_that_is_overtaken_between_two_steps_misses_nothing(self) -> None:
        """The writer may add and drop commits between any two steps of a reader: here, right after its first."""

        class Overtaken(Feed):
            overtake = False

            def __getattribute__(self, name: str) -> object:
                found = super().__getattribute__(name)
                if name in ("floor", "commits") and super().__getattribute__("overtake"):
                    self.overtake = False
                    self.add([commit(sequence, "x") for sequence in range(257, 457)])
                return found

        feed = Overtaken(floor=0)
        feed.add([commit(sequence, "x") for sequence in range(1, 257)])
        feed.overtake = True
        pulled = sequences(feed.after(10))
        assert not feed.overtake, "the reader was overtaken"
        assert pulled is None or pulled[:1] == [11]


class TestHub:
    def test_feeds_only_watches_of_that_session(self) -> None:
        hub = Hub(sequence=5)
        feed = hub.join(1, "one")
        assert hub.is_watched(1)
        assert not hub.is_watched(2)
        hub.publish({1: [commit(6, "x")], 2: [commit(7, "x")]}, [], 7)
        assert sequences(feed.after(5)) == [6]
        assert feed.after(4) is None, "what was there before it joined is in the file"

    def test_a_watch_that_joins_later_is_fed_from_there(self) -> None:
        hub = Hub(sequence=0)
        hub.publish({}, [], 9)
        assert hub.join(1, "one").floor == 9

    def test_all_watches_of_a_session_share_its_feed(self) -> None:
        hub = Hub(sequence=0)
        assert hub.join(1, "one") is hub.join(1, "two")
        assert hub.count == 2
        hub.leave(1, "one")
        assert hub.is_watched(1)
        hub.leave(1, "two")
        hub.leave(1, "two")
        assert not hub.is_watched(1)
        assert hub.count == 0

    def test_wakes_only_watches_with_something_to_pull(self) -> None:
        hub = Hub(sequence=0)
        woken: list[str] = []
        for session, name in ((1, "one"), (1, "too"), (2, "two")):
            hub.join(session, name).watching[name] = lambda name=name: woken.append(name)  # type: ignore[misc]
        hub.publish({1: [commit(1, "x")]}, [], 1)
        assert woken == [], "the writer's callers are answered first"
        hub.wake()
        assert sorted(woken) == ["one", "too"]
        woken.clear()
        hub.publish({}, [2], 2)
        hub.wake()
        assert woken == ["two"]
        hub.wake()
        assert woken == ["two"], "there is nothing new"
        woken.clear()
        hub.wake_all()
        assert sorted(woken) == ["one", "too", "two"]

    def test_a_wake_that_raises_keeps_no_other_watch_asleep(self, caplog: pytest.LogCaptureFixture) -> None:
        hub = Hub(sequence=0)
        woken: list[str] = []

        def fail() -> None:
            raise RuntimeError("Event loop is closed")

        hub.join(1, "one").watching["one"] = fail
        hub.join(1, "two").watching["two"] = lambda: woken.append("two")
        hub.publish({1: [commit(1, "x")]}, [], 1)
        hub.wake()
        hub.wake_all()
        assert woken == ["two", "two"]
        assert "Event loop is closed" in caplog.text

    def test_a_session_that_ends_ends_its_feed_after_its_last_commits(self) -> None:
        hub = Hub(sequence=0)
        feed = hub.join(1, "one")
        hub.publish({1: [commit(1, "x")]}, [1], 2)
        assert feed.ended
        assert sequences(feed.after(0)) == [1]


class Script(Watch):
    """A watch with given updates."""

    def __init__(self, *pages: list[Update] | Exception) -> None:
        self.initial = ()
        self.position = 0
        self.pages = list(pages)
        self.woken = threading.Event()
        self.wake: Callable[[], None] | None = None
        self.closed = False

    def pull(self) -> list[Update]:
        page = self.pages.pop(0) if self.pages else []
        if isinstance(page, Exception):
            raise page
        return page

    def pull_ready(self) -> list[Update] | None:
        return None

    def notify(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.woken.set()

    def close(self) -> None:
        self.closed = True


class TestWatch:
    page = updates_of(commit(1, "x", "y"), ())

    def test_next_returns_what_is_available(self) -> None:
        assert Script(self.page).next(timeout_s=0) == self.page

    def test_next_gives_up_after_its_timeout(self) -> None:
        assert Script([], self.page).next(timeout_s=0.01) == []

    def test_next_waits_until_it_is_woken(self) -> None:
        watch = Script([])

        def write() -> None:
            assert watch.woken.wait(DEADLINE_S)
            watch.pages.append(self.page)
            assert watch.wake is not None
            watch.wake()

        writer = threading.Thread(target=write)
        writer.start()
        assert watch.next(DEADLINE_S) == self.page
        writer.join()

    def test_next_registers_before_it_pulls(self) -> None:
        """A commit that is published between the pull and the wait must wake it."""

        class Late(Script):
            def pull(self) -> list[Update]:
                found = super().pull()
                if not found and self.pages:
                    assert self.wake is not None
                    self.wake()
                return found

        assert Late([], self.page).next(DEADLINE_S) == self.page

    def test_iterating_ends_with_the_session(self) -> None:
        assert list(Script(self.page, self.page, SessionNotFoundError("s"))) == [*self.page, *self.page]

    def test_iterating_ends_with_any_other_error_by_raising_it(self) -> None:
        with pytest.raises(EngineClosedError):
            list(Script(self.page, EngineClosedError()))

    def test_leaving_the_block_closes_it(self) -> None:
        with Script() as watch:
            assert not watch.closed
        assert watch.closed
