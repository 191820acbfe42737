"""Whatever happens in between, a watch delivers each commit once and in order: moves, restarts, lost streams."""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import grpc
from freezegun import freeze_time
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from dspex_persist import Context, LocalState
from dspex_persist.cognitive.changes import Change
from dspex_persist.cognitive.watching import Changes
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.client.line import Line
from dspex_persist.state.bridge.client.watch import BridgedWatch, Resumption
from dspex_persist.state.bridge.headers import BEGAN, INITIAL_VALUES, POSITION
from dspex_persist.state.bridge.status import error_of_call
from dspex_persist.state.errors import StateError
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.watch import Watch
from tests.deadline import within

NAMES: Final = ("a", "b", "c")
DEADLINE_S: Final = within(20)

writes = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(NAMES)),
    st.tuples(st.just("batch"), st.sets(st.sampled_from(NAMES), min_size=1).map(sorted)),
    st.tuples(st.just("replace"), st.sampled_from(NAMES)),
)
steps = st.one_of(
    writes,
    writes,
    st.tuples(st.just("take"), st.integers(1, 5)),
    st.tuples(st.just("tick"), st.integers(1, 15)),
    st.tuples(st.just("move"), st.just(0)),
    st.tuples(st.just("reopen"), st.just(0)),
)


class Session:
    """A context, what was written to it, and watches of each kind."""

    def __init__(self, folder: Path, clock: Any) -> None:
        self._folder = folder
        self._clock = clock
        self._moves = 0
        self._number = 0
        self.ctx = Context("watched")
        self.written: list[tuple[str, object, object]] = []
        """Name, value before, value: of every change."""
        for name in NAMES:
            self.ctx.define(name, 0)
        self.plain = self.ctx.watch()
        self.named = self.ctx.watch("a", "b*")
        self.idle = self.ctx.watch()
        self.debounced = self.ctx.watch(debounce_s=10)
        self.throttled = self.ctx.watch(throttle_s=10)
        self.called: list[Change[Any]] = []
        self.late: list[Change[Any]] = []
        self.ctx.watch(on_change=self.called.append)
        self.ctx.watch(on_change=self.late.append, debounce_s=10_000)
        self.values: dict[str, object] = dict.fromkeys(NAMES, 0)
        self.taken: dict[str, list[Change[Any]]] = defaultdict(list)

    def _change(self, name: str, value: object) -> None:
        self.written.append((name, self.values.get(name), value))
        self.values[name] = value

    def set(self, name: str) -> None:
        self._number += 1
        self.ctx[name] = self._number
        self._change(name, self._number)

    def batch(self, names: list[str]) -> None:
        self._number += 1
        self.ctx.update_many(dict.fromkeys(names, self._number))
        for name in sorted(names, key=self.order):
            self._change(name, self._number)

    def order(self, name: str) -> int:
        """The place of a variable in a commit: by age."""
        return list(self.ctx.names()).index(name)

    def replace(self, name: str) -> None:
        """Delete a variable, and define another of the same name."""
        del self.ctx[name]
        self._change(name, None)
        del self.values[name]
        self._number += 1
        self.ctx.define(name, self._number)
        self._change(name, self._number)

    def take(self, count: int) -> None:
        for which, changes in self.changes():
            for _ in range(count):
                if (change := changes.next(0)) is not None:
                    self.taken[which].append(change)

    def changes(self) -> list[tuple[str, Changes[Any]]]:
        return [
            ("plain", self.plain),
            ("named", self.named),
            ("debounced", self.debounced),
            ("throttled", self.throttled),
        ]

    def tick(self, seconds: int) -> None:
        self._clock.tick(timedelta(seconds=seconds))

    def move(self, _: int) -> None:
        """A session in memory moves to a file, once."""
        self._moves += 1
        if self._moves == 1:
            path = self._folder / "moved.db"
            with Context("other", path) as other:
                # So that commits have other numbers there.
                other.define("z", 0)
            self.ctx.ensure_persistent(path)

    def reopen(self, _: int) -> None:
        """A consumer ends, and goes on where it was; what a batch has not delivered comes again as a whole."""
        position, kept = self.plain.position, self.taken["plain"]
        self.plain.close()
        assert self.plain.position == position
        if kept and kept[-1].update.part[0] < kept[-1].update.part[1]:
            commit = kept[-1].commit
            while kept and kept[-1].commit == commit:
                kept.pop()
        self.plain = self.ctx.watch(after=position)

    def end(self) -> None:
        """Take all that is left."""
        self.tick(100)
        last = [list(self._rest(changes)) for _, changes in self.changes()]
        for (which, _), rest in zip(self.changes(), last, strict=True):
            self.taken[which] += rest
        self.ctx.end()
        for which, changes in (*self.changes(), ("idle", self.idle)):
            self.taken[which] += list(changes)
        self.ctx.close()

    def _rest(self, changes: Changes[Any]) -> Iterator[Change[Any]]:
        while (change := changes.next(0)) is not None:
            yield change


def shown(changes: list[Change[Any]]) -> list[tuple[str, object, object]]:
    return [(change.name, change.old, change.value) for change in changes]


def check_merged(changes: list[Change[Any]], written: list[tuple[str, object, object]]) -> None:
    """Check that changes that stand for several leave none out, and that the last value is there."""
    stands_for = 0
    for change in changes:
        stands_for += change.count
    assert stands_for == len(written)
    by_id: dict[str, list[Change[Any]]] = defaultdict(list)
    for change in changes:
        by_id[change.variable.id].append(change)
    for name in NAMES:
        values = [value for each, _, value in written if each == name]
        newest = max((each for each in changes if each.name == name), key=lambda change: change.commit, default=None)
        assert (newest is None) == (not values)
        assert newest is None or newest.value == values[-1]
    for of_one in by_id.values():
        assert [change.version for change in of_one] == sorted({change.version for change in of_one})
        # Each goes on where the one before has ended.
        assert [change.old for change in of_one[1:]] == [change.value for change in of_one[:-1]]


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, min_size=1, max_size=25))
def test_every_commit_comes_once_and_in_order(script: list[tuple[str, Any]]) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        with freeze_time() as clock:
            session = Session(folder, clock)
            for step, argument in script:
                note(f"{step} {argument}")
                getattr(session, step)(argument)
            session.end()
    finally:
        shutil.rmtree(folder)
    written = session.written
    assert shown(session.taken["plain"]) == written
    assert shown(session.taken["idle"]) == written
    assert shown(session.called) == written
    assert shown(session.taken["named"]) == [each for each in written if each[0] in ("a", "b")]
    for which in ("debounced", "throttled"):
        check_merged(session.taken[which], written)
    check_merged(session.late, written)


# Streams that break


class LostError(grpc.RpcError):  # type: ignore[misc]
    """A connection that was lost."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "Socket closed"

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()


class BrokenStream(LostError):
    """A stream of a watch on `state` that breaks after some messages; None: it lasts."""

    def __init__(self, state: StateProvider, after: int | None, most: int | None) -> None:
        super().__init__()
        self._watch: Watch = state.watch("s", after_sequence=after)
        self._first = self._watch.position
        self._initial = self._watch.initial if after is None else ()
        self._messages = self._all(most)

    def _all(self, most: int | None) -> Iterator[Any]:
        sent = 0
        while True:
            for update in self._watch.next():
                if sent == most:
                    raise self
                yield codec.update_message(update)
                sent += 1

    def initial_metadata(self) -> tuple[tuple[str, str], ...]:
        facts = ((POSITION, self._first), (INITIAL_VALUES, 0), (BEGAN, self._watch.first_sequence))
        return tuple((name, str(number)) for name, number in facts)

    def __iter__(self) -> Iterator[Any]:
        return self._messages

    def __next__(self) -> Any:
        return next(self._messages)

    def cancel(self) -> None:
        # Wakes the reader, whose next pull raises.
        self._messages = iter(())


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), max_size=6), st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_streams_that_break_lose_and_repeat_nothing(breaks: list[int], sizes: list[int]) -> None:
    """Streams break after some messages, also within a commit of several parts, while others write."""
    names = [f"v{number}" for number in range(4)]
    with LocalState() as state:
        state.initialize_session("s")
        for name in names:
            state.register_variable("s", name, "integer", 0)
        left = list(breaks)

        def open_stream(resumption: Resumption | None) -> BrokenStream:
            return BrokenStream(state, None if resumption is None else resumption[0], left.pop(0) if left else None)

        def error_of(call: BrokenStream) -> StateError:
            return error_of_call(call, "server")

        line = Line("server", None, jitter=lambda: 0.02)
        watch = BridgedWatch(open_stream, error_of, line, session_id="s", timeout_s=DEADLINE_S, patience_s=DEADLINE_S)
        expected = []
        for number, size in enumerate(sizes, 1):
            versions = state.set_variables("s", dict.fromkeys(names[:size], number), atomic=True).versions
            expected += list(versions.items())
        found = []
        while len(found) < len(expected):
            updates = watch.next(DEADLINE_S)
            assert updates, f"only {found}"
            found += updates
        state.cleanup_session("s")
        watch.close()
    assert [(update.variable.name, update.variable.version) for update in found] == expected
    assert [update.sequence for update in found] == sorted(update.sequence for update in found)
