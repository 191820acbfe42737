"""Moves under concurrent load, checked against an oracle, with a failure injected into any step of any move.

Every write has a value that no other one has, and its answer says which version it became. So the oracle knows what
the history must be: exactly the acknowledged writes, each at its version, wherever the session is by then.

`MOVES_EXAMPLES` sets how many plans are tried.
"""

import os
import tempfile
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspex_persist import Context, tool
from dspex_persist.cognitive import moves
from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.state.abilities import Recordable
from dspex_persist.state.store import maintenance
from tests.deadline import within
from tests.store.test_moves import STEPS

NAMES = ("a", "b")
WAYS = ("set", "keyed", "tool")
PLANS = st.tuples(
    # What each writer does again and again.
    st.lists(st.lists(st.tuples(st.sampled_from(WAYS), st.sampled_from(NAMES)), min_size=1), min_size=1, max_size=3),
    # Each move, and the step of it that fails.
    st.lists(st.none() | st.sampled_from(sorted(STEPS.keys() - {"interrupt"})), min_size=1, max_size=3),
)
EXAMPLES = int(os.environ.get("MOVES_EXAMPLES", "4"))


MOST_CONFLICTS = 20
"""After so many, the others let a tool commit: a move waits for it, and on a busy machine they may keep it for ever."""
unhindered = threading.Event()
unhindered.set()


@tool(retries=1_000)
def write(ctx: ToolContext, name: str, token: int) -> int:
    """Writes as a tool, and returns the version."""
    if ctx.attempt > MOST_CONFLICTS:
        unhindered.clear()
    ctx[name] = token
    return ctx.info(name).version


class Writer:
    """Writes until it is told to stop, and keeps what was acknowledged: variable, version, value."""

    def __init__(self, ctx: Context, number: int, plan: Sequence[tuple[str, str]], stop: threading.Event) -> None:
        self.acknowledged: list[tuple[str, int, int]] = []
        self.raised: list[BaseException] = []
        self._ctx, self._number, self._plan, self._stop = ctx, number, plan, stop
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        count = 0
        try:
            while not self._stop.is_set() or count < len(self._plan):
                way, name = self._plan[count % len(self._plan)]
                count += 1
                token = self._number * 1_000_000 + count
                self.acknowledged.append((name, self._write(way, name, token), token))
        except BaseException as error:  # noqa: BLE001 - the test reports it
            self.raised.append(error)

    def _write(self, way: str, name: str, token: int) -> int:
        ctx = self._ctx
        if way == "tool":
            try:
                return int(ctx.call(write, name=name, token=token))
            finally:
                unhindered.set()
        unhindered.wait(within(60))
        if way == "keyed":
            first = ctx.set(name, token, idempotency_key=str(token))
            # A repetition gets the same answer, even if the session has moved in between.
            assert ctx.set(name, token, idempotency_key=str(token)) == first
            return first
        return ctx.set(name, token)

    def join(self) -> None:
        self._thread.join(within(60))
        assert not self._thread.is_alive()
        assert self.raised == []


def move(ctx: Context, path: Path, step: str | None) -> bool:
    """Move the session to a new file, with a failure; return whether it moved."""
    with ExitStack() as faults:
        if step is not None:
            owner, name, replacement, _ = STEPS[step]
            faults.enter_context(patch.object(owner, name, replacement))
        try:
            moves._move(ctx._backend, ctx.session_id, str(path), {"tools": {"write": write}})
        except Exception as error:
            if step is None or not isinstance(error, STEPS[step][3]):
                raise
            # The one that was injected.
            return False
    return True


def check(ctx: Context, acknowledged: Iterable[tuple[str, int, int]]) -> None:
    """The history is what was acknowledged, and nothing else."""
    expected: dict[str, dict[int, int]] = {name: {0: 0} for name in NAMES}
    for name, version, token in acknowledged:
        assert version not in expected[name], "two writes became the same version"
        expected[name][version] = token
    for name in NAMES:
        history, before = {}, None
        while page := ctx.history(name, 100, before=before):
            history |= {entry.version: entry.value for entry in page}
            before = page[-1].version
        assert history == expected[name]
        assert sorted(history) == list(range(len(history)))


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(PLANS)
def test_nothing_is_lost_and_nothing_is_written_twice(
    plan: tuple[list[list[tuple[str, str]]], list[str | None]],
) -> None:
    writing, moving = plan
    with tempfile.TemporaryDirectory() as folder, Context("s", tools=[write]) as ctx:
        for name in NAMES:
            ctx.define(name, 0)
        stop, moved = threading.Event(), 0
        writers = [Writer(ctx, number, each, stop) for number, each in enumerate(writing, 1)]
        try:
            for number, step in enumerate(moving):
                path = Path(folder, f"{number}.db")
                # The memory of the first backend alone has this method.
                step = None if step == "record" and moved else step
                if move(ctx, path, step):
                    moved += 1
                else:
                    assert not list(Path(folder).glob(f"{number}.db*"))
        finally:
            stop.set()
            for writer in writers:
                writer.join()
        assert len(ctx.backend.switches) == moved
        check(ctx, [each for writer in writers for each in writer.acknowledged])
        content_hash = Recordable.of(ctx.backend.provider).content_hash("s")
        ctx.close()
        if moved:
            last = Path(folder, ctx.backend.url)
            with Context("s", last, create=False) as again:
                assert Recordable.of(again.backend.provider).content_hash("s") == content_hash
            for path in Path(folder).glob("*.db"):
                assert maintenance.check(path).problems == ()
