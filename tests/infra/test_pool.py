"""A pool of workers that are real processes: lending, failures, and what the pool does about them."""

import asyncio
import os
import signal
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dspex_persist.infra import holder
from dspex_persist.infra.workers.errors import (
    NestedTooDeepError,
    PoolSaturatedError,
    PoolStartError,
    PoolUnavailableError,
    QueueTimeoutError,
    WorkerBusyError,
    WorkerExitedError,
    WorkerLostError,
    WorkerTimeoutError,
)
from dspex_persist.infra.workers.options import PoolOptions
from tests.deadline import within
from tests.infra.test_forks import in_child
from tests.infra.test_helpers import is_gone
from tests.infra.workers import Pool, background, hold, on_loop, run_limited, running, until
from tests.logs import capture_logs

ONE = PoolOptions(size=1, backoff_s=0.01)


async def ask(pool: Pool, *words: object, fails: type[Exception] | None = None, **how: Any) -> str:
    with pytest.raises(fails) if fails else nullcontext():
        async with pool.lend(**how) as lease:
            return await lease.contact.ask(*words)
    return ""


# --- Lending


@on_loop
async def test_each_worker_is_lent_to_one_call_at_a_time() -> None:
    async with running(PoolOptions(size=2, queue_timeout_s=within(10))) as pool:
        at_once = most = 0

        async def call() -> str:
            nonlocal at_once, most
            async with pool.lend() as lease:
                at_once += 1
                most = max(most, at_once)
                answer = await lease.contact.ask("ping")
                assert answer == str(lease.pid)
                at_once -= 1
                return answer

        answers = await asyncio.gather(*(call() for _ in range(20)))
        assert most == 2
        assert len(set(answers)) == 2
        counted = pool.statistics()
        assert (counted.requests, counted.errors, counted.idle, counted.busy) == (20, 0, 2, 0)
        assert sum(each.requests for each in counted.workers) == 20


@on_loop
async def test_a_full_queue_and_one_that_takes_too_long_say_what_to_change() -> None:
    async with running(PoolOptions(size=1, queue_size=1, queue_timeout_s=0.2)) as pool:
        release = asyncio.Event()
        holding = await background(hold(pool, release), lambda: pool.statistics().busy == 1)
        waiting = await background(ask(pool, "ping"), lambda: pool.statistics().queued == 1)
        with pytest.raises(PoolSaturatedError, match=r"pool ping .* pools\.ping\.size or pools\.ping\.queue_size"):
            await ask(pool, "ping")
        with pytest.raises(QueueTimeoutError, match=r"1 of 1 workers busy, .*raise .* pools\.ping\.queue_timeout_s"):
            await waiting
        release.set()
        await holding
        assert await ask(pool, "ping")
        counted = pool.statistics()
        assert (counted.saturated, counted.queue_timeouts, counted.queued, counted.idle) == (1, 1, 0, 1)


@on_loop
async def test_a_call_that_is_cancelled_while_it_waits_takes_no_worker() -> None:
    async with running(ONE) as pool:
        async with pool.lend():
            waiting = await background(ask(pool, "ping"), lambda: pool.statistics().queued == 1)
        # It has got the worker, but does not know yet.
        assert pool.statistics().queued == 0
        waiting.cancel()
        await asyncio.wait({waiting})
        await until(lambda: pool.statistics().idle == 1)
        assert await ask(pool, "ping")


@on_loop
async def test_a_session_comes_back_to_its_worker_if_that_is_free() -> None:
    async with running(PoolOptions(size=2)) as pool:
        workers = {key: await ask(pool, "ping", key=key) for key in ("a", "b")}
        assert workers["a"] != workers["b"]
        for key in ("a", "b", "b", "a"):
            assert await ask(pool, "ping", key=key) == workers[key]
        release = asyncio.Event()
        holding = await background(hold(pool, release, key="a"), lambda: pool.statistics().busy == 1)
        assert await ask(pool, "ping", key="a") == workers["b"]
        release.set()
        await holding


@on_loop
async def test_a_session_waits_for_its_worker_if_it_has_to() -> None:
    async with running(PoolOptions(size=2, affinity="strict_queue", queue_timeout_s=within(10))) as pool:
        mine = await ask(pool, "ping", key="a")
        release = asyncio.Event()
        holding = await background(hold(pool, release, key="a"), lambda: pool.statistics().busy == 1)
        waiting = await background(ask(pool, "ping", key="a"), lambda: pool.statistics().queued == 1)
        assert await ask(pool, "ping", key="b") != mine
        release.set()
        await holding
        assert await waiting == mine


@on_loop
async def test_a_session_is_refused_while_its_worker_is_busy_if_it_has_to() -> None:
    async with running(PoolOptions(size=2, affinity="strict_fail_fast")) as pool:
        release = asyncio.Event()
        holding = await background(hold(pool, release, key="a"), lambda: pool.statistics().busy == 1)
        with pytest.raises(WorkerBusyError, match=r"ping-\d+ of pool ping.* set pools\.ping\.affinity"):
            await ask(pool, "ping", key="a")
        release.set()
        await holding
        # Without its worker, it may have another one.
        async with pool.lend("a") as lease:
            lease.discard("a test")
        assert await ask(pool, "ping", key="a") != str(lease.pid)


# --- Nested calls


@on_loop
async def test_nested_calls_never_deadlock_a_full_pool() -> None:
    async with running(PoolOptions(size=2, queue_timeout_s=within(10), spare_keep_s=0, health_interval_s=0.1)) as pool:

        async def nest(depth: int, parent: Any = None) -> int:
            async with pool.lend(parent=parent) as lease:
                await lease.contact.ask("ping")
                return 1 + (await nest(depth - 1, lease) if depth else 0)

        # Both of the workers, and more calls than there are workers, each three deep.
        assert await asyncio.gather(*(nest(2) for _ in range(4))) == [3] * 4
        assert pool.statistics().started > 2
        # Spares leave when nobody needs them.
        await until(lambda: pool.statistics().spares == 0)
        assert pool.statistics().idle == 2


@on_loop
async def test_few_spares_are_enough_because_the_deepest_call_goes_first() -> None:
    async with running(PoolOptions(size=2, queue_timeout_s=within(10))) as pool:

        async def nest(depth: int, parent: Any = None) -> None:
            async with pool.lend(parent=parent) as lease:
                await asyncio.gather(*(nest(depth - 1, lease) for _ in range(2 if depth else 0)))

        await asyncio.gather(*(nest(3) for _ in range(4)))
        counted = pool.statistics()
        assert (counted.spares, counted.started) == (3, 2 + 3)


async def turns() -> None:
    """Let everything on the event loop run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


@on_loop
async def test_no_spare_is_started_while_another_call_can_end() -> None:
    async with running(PoolOptions(size=2, queue_timeout_s=within(10))) as pool:
        release = asyncio.Event()
        holding = await background(hold(pool, release), lambda: pool.statistics().busy == 1)
        async with pool.lend() as lease:
            nested = await background(ask(pool, "ping", parent=lease), lambda: pool.statistics().queued == 1)
            await turns()
            assert (pool.statistics().starting, pool.statistics().queued) == (0, 1)
            release.set()
            await holding
            assert await nested != str(lease.pid)
        assert pool.statistics().started == 2


@on_loop
async def test_no_second_spare_is_started_for_a_call_that_is_not_deeper() -> None:
    options = PoolOptions(size=1, queue_timeout_s=within(10))
    async with running(options, name="a") as a, running(options, name="b") as b:
        release = asyncio.Event()
        holding = await background(hold(b, release), lambda: b.statistics().busy == 1)

        async def there(parent: Any) -> None:
            async with a.lend(parent=parent) as lease:
                await ask(b, "ping", parent=lease)

        async with a.lend() as outer:
            # The first has a spare, and waits for the other pool, which will go on.
            first = await background(there(outer), lambda: b.statistics().queued == 1)
            second = await background(there(outer), lambda: a.statistics().queued == 1 or b.statistics().queued == 2)
            await turns()
            assert (a.statistics().starting, a.statistics().spares) == (0, 1)
            release.set()
            await asyncio.gather(holding, first, second)
        assert (a.statistics().spares, b.statistics().spares) == (1, 0)


@on_loop
async def test_nested_calls_have_a_queue_of_their_own() -> None:
    async with running(PoolOptions(size=1, queue_size=1, queue_timeout_s=within(10))) as pool, pool.lend() as lease:
        waiting = await background(ask(pool, "ping"), lambda: pool.statistics().queued == 1)
        spare = await ask(pool, "ping", parent=lease)
        assert spare != str(lease.pid)
        assert not waiting.done()
        waiting.cancel()


@on_loop
async def test_spares_that_do_not_start_are_tried_again_after_a_pause(tmp_path: Path) -> None:
    flags = ("--exit-from", str(tmp_path / "starts"), "--exit-times", "3")
    async with running(PoolOptions(size=1, backoff_s=0.05), *flags) as pool, pool.lend() as lease:
        assert await ask(pool, "ping", parent=lease)
        assert pool.statistics().start_failures == 3
    flags = ("--exit-from", str(tmp_path / "others"))
    async with running(PoolOptions(size=1, backoff_s=within(60)), *flags) as pool, pool.lend() as lease:
        nested = await background(ask(pool, "ping", parent=lease), lambda: pool.statistics().start_failures == 1)
        await turns()
        assert pool.statistics().starting == 0
        nested.cancel()


@on_loop
async def test_two_pools_that_call_each_other_do_not_deadlock() -> None:
    options = PoolOptions(size=1, queue_timeout_s=within(10))
    async with running(options, name="a") as a, running(options, name="b") as b:
        both_are_lent = asyncio.Barrier(2)

        async def there_and_back(here: Pool, there: Pool, *, waits: bool) -> None:
            async with here.lend() as outer:
                if waits:
                    await both_are_lent.wait()
                async with there.lend(parent=outer) as inner, here.lend(parent=inner) as innermost:
                    await innermost.contact.ping()
                    async with there.lend(parent=innermost) as last:
                        await last.contact.ping()

        # The later ones get a worker when one of the first has ended, at the same time or not.
        pools = ((a, b), (b, a)) * 2
        await asyncio.gather(*(there_and_back(*each, waits=number < 2) for number, each in enumerate(pools)))
        assert max(a.statistics().spares, b.statistics().spares) <= 3


@on_loop
async def test_no_calls_of_three_pools_deadlock() -> None:
    """Random trees of calls, some of which are given up."""
    options = PoolOptions(size=1, nesting=4, queue_timeout_s=within(15))
    async with running(options, name="a") as a, running(options, name="b") as b, running(options, name="c") as c:
        random, pools, ended = Random(1), [a, b, c], Counter[str]()

        async def nest(depth: int, parent: Any = None) -> None:
            async with random.choice(pools).lend(parent=parent) as lease:
                # The worker is well, although its call is given up.
                lease.release_when(asyncio.sleep(0), within(1))
                for _ in range(random.randrange(3)):
                    await asyncio.sleep(0)
                if depth:
                    below = [asyncio.create_task(nest(depth - 1, lease)) for _ in range(random.randrange(4))]
                    if below and random.random() < 0.2:
                        await asyncio.sleep(random.random() / 100)
                        below[0].cancel()
                    for call in below:
                        await asyncio.wait({call})
                        ended["given up" if call.cancelled() else "ok"] += 1
                        assert call.cancelled() or call.exception() is None

        for _ in range(8):
            await asyncio.gather(*(nest(4) for _ in range(4)))
        assert ended["given up"] > 5
        assert ended["ok"] > 50
        for pool in pools:
            assert pool.statistics().queue_timeouts == 0
            assert pool.statistics().spares <= 4
            assert pool.statistics().started == 1 + pool.statistics().spares


@on_loop
async def test_calls_that_are_nested_too_deep_are_refused() -> None:
    options = PoolOptions(size=1, nesting=1)
    async with running(options) as pool, pool.lend() as outer, pool.lend(parent=outer) as inner:
        assert inner.depth == 1
        with pytest.raises(NestedTooDeepError, match=r"more than 1 deep.*pools\.ping\.nesting"):
            await ask(pool, "ping", parent=inner)


# --- Workers that fail during a call


@on_loop
async def test_a_killed_worker_ends_its_call_and_is_replaced() -> None:
    async with running(ONE) as pool:
        pid = int(await ask(pool, "ping"))

        async def killing() -> None:
            async with pool.lend():
                os.kill(pid, signal.SIGKILL)
                await asyncio.get_running_loop().create_future()

        with pytest.raises(WorkerExitedError, match=r"worker ping-\d+ of pool ping was killed by SIGKILL"):
            await killing()
        assert await ask(pool, "ping") != str(pid)
        counted = pool.statistics()
        assert (counted.exits, counted.crashed, counted.errors) == (1, 1, 0)


@on_loop
async def test_a_worker_that_exits_says_why() -> None:
    async with running(ONE) as pool:
        # What it wrote during the calls of others is not for this one.
        await ask(pool, "warn", "earlier")
        with pytest.raises(WorkerExitedError) as caught:
            await ask(pool, "exit", 3)
        assert caught.value.ending == "ended with exit code 3"
        assert caught.value.output == "last words"
        assert await ask(pool, "ping")


@on_loop
async def test_a_worker_that_hangs_is_replaced_and_the_caller_hears_in_time() -> None:
    async with running(PoolOptions(size=1, call_timeout_s=0.2, queue_timeout_s=within(10))) as pool:
        with pytest.raises(WorkerTimeoutError, match=r"not finish within 0\.2 s \(it still runs\) and is replaced"):
            await ask(pool, "hang")
        pid = int(await ask(pool, "ping", timeout_s=within(10)))
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerTimeoutError, match=r"within 0\.1 s \(it is stopped"):
            await ask(pool, "ping", timeout_s=0.1)
        assert await ask(pool, "ping", timeout_s=within(10)) != str(pid)
        assert pool.statistics().call_timeouts == 2
        await until(lambda: is_gone(pid))


@on_loop
async def test_a_cancelled_call_has_its_worker_replaced_unless_that_ends_it() -> None:
    async with running(PoolOptions(size=1, queue_timeout_s=within(10))) as pool:
        first = await ask(pool, "ping")
        release = asyncio.Event()

        async def given_up() -> None:
            async with pool.lend() as lease:
                lease.release_when(release.wait(), within(10))
                await asyncio.get_running_loop().create_future()

        task = await background(given_up(), lambda: pool.statistics().busy == 1)
        task.cancel()
        await asyncio.wait({task})
        assert [each.state for each in pool.statistics().workers] == ["settling"]
        waiting = await background(ask(pool, "ping"), lambda: pool.statistics().queued == 1)
        release.set()
        assert await waiting == first
        task = await background(hold(pool, asyncio.Event()), lambda: pool.statistics().busy == 1)
        task.cancel()
        assert await ask(pool, "ping") != first


@on_loop
async def test_a_lost_connection_says_whether_the_worker_has_exited() -> None:
    async with running(ONE) as pool:
        async with pool.lend() as lease:
            error = await lease.lost("no route")
        assert isinstance(error, WorkerLostError)
        assert str(error).endswith("is replaced: no route")
        await ask(pool, "exit", 1, fails=WorkerExitedError)
        assert await ask(pool, "ping")


@on_loop
async def test_errors_of_the_block_itself_keep_the_worker() -> None:
    async with running(ONE) as pool:
        first = await ask(pool, "ping")
        with pytest.raises(LookupError):
            async with pool.lend():
                raise LookupError
        assert await ask(pool, "ping") == first
        assert pool.statistics().errors == 1


# --- Workers that do not start


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--exit", "2"], r"ended with exit code 2; its output ends with:\nno adapter"),
        (["--never-ready"], r"was not ready within 0\.5 s \(pools\.ping\.ready_timeout_s\); it wrote nothing"),
        (["--nonsense"], r"does not answer as it should: it answered \?"),
    ],
)
@on_loop
async def test_a_pool_whose_workers_do_not_start_says_why(flags: list[str], reason: str) -> None:
    limit_s = 0.5 if "--never-ready" in flags else within(10)
    with pytest.raises(PoolStartError, match=r"(?s)pool ping has no workers: worker ping-\d+ .*" + reason):
        async with running(ONE, *flags, ready_timeout_s=limit_s):
            pass


@on_loop
async def test_a_worker_that_does_not_start_at_first_is_tried_again(tmp_path: Path) -> None:
    options = PoolOptions(size=2, batch=1, backoff_s=0.01)
    async with running(options, "--exit-until", str(tmp_path / "starts")) as pool:
        await until(lambda: pool.statistics().idle == 2)
        counted = pool.statistics()
        assert (counted.start_failures, counted.started, counted.state) == (1, 2, "running")


@on_loop
async def test_workers_that_fail_at_once_are_not_started_again_and_again(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    options = PoolOptions(size=1, backoff_s=0.01, crash_limit=3, crash_pause_s=0.5, queue_timeout_s=within(10))
    with capture_logs() as events:
        async with running(options, "--exit-from", str(starts), "--exit-times", "2") as pool:
            with pytest.raises(WorkerExitedError):
                await ask(pool, "exit", 1)
            # Who waits for a worker hears it, too.
            with pytest.raises(
                PoolUnavailableError, match=r"3 workers in a row failed at once.*\n*.*not now"
            ) as caught:
                await ask(pool, "ping")
            assert caught.value.retryable
            assert pool.statistics().state == "failing"
            with pytest.raises(PoolUnavailableError):
                await ask(pool, "ping")
            # After the pause one is tried, which works.
            await until(lambda: pool.statistics().idle == 1)
            assert await ask(pool, "ping")
    assert [each["failures"] for each in events if "failures" in each] == [3]


@on_loop
async def test_who_waits_hears_that_no_other_worker_comes() -> None:
    options = PoolOptions(size=1, crash_limit=1, crash_pause_s=within(60), queue_timeout_s=within(10))
    async with running(options) as pool:
        lent = await background(ask(pool, "hang", fails=WorkerExitedError), lambda: pool.statistics().busy == 1)
        waiting = await background(ask(pool, "ping"), lambda: pool.statistics().queued == 1)
        os.kill(pool.statistics().workers[0].pid, signal.SIGKILL)
        await lent
        with pytest.raises(PoolUnavailableError, match=r"1 workers in a row failed at once.* was killed by SIGKILL"):
            await waiting


@on_loop
async def test_callers_are_not_told_what_was_written_in_calls_of_others() -> None:
    options = PoolOptions(size=1, crash_limit=1, crash_pause_s=within(60))
    async with running(options) as pool:
        with pytest.raises(WorkerExitedError, match="last words"):
            await ask(pool, "exit", 1)
        await until(lambda: pool.statistics().state == "failing" and not pool.statistics().workers)
        with pytest.raises(PoolUnavailableError, match=r"The last: worker ping-1 ended with exit code 1 at once$"):
            await ask(pool, "ping")
        assert "last words" in pool.statistics().last_failure


@on_loop
async def test_garbage_is_logged_within_limits_and_hides_nothing() -> None:
    with capture_logs() as events:
        async with running(ONE, "--garbage", "3000000") as pool:
            await ask(pool, "print", "hello")
            await ask(pool, "flood", 5_000)
            await ask(pool, "exit", 0, fails=WorkerExitedError)
    written = [each for each in events if each["event"] == "a worker wrote"]
    assert all(each["worker"].startswith("ping-") for each in written)
    hello = next(each for each in written if each["text"] == "hello")
    assert hello["stream"] == "stdout"
    assert max(len(each["text"]) for each in written) <= 2_000
    left_out = sum(each.get("lines", 0) for each in events)
    assert left_out > 4_000
    assert sum(each["text"] == "y" for each in written) + left_out >= 5_000


# --- Keeping workers


@on_loop
async def test_a_worker_that_dies_while_it_is_idle_is_replaced_before_anybody_gets_it() -> None:
    async with running(ONE) as pool:
        pid = int(await ask(pool, "ping"))
        os.kill(pid, signal.SIGKILL)
        # Without a turn of the event loop in between.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
        assert await ask(pool, "ping") != str(pid)
        assert pool.statistics().crashed == 1


@on_loop
async def test_an_idle_worker_that_does_not_answer_is_replaced() -> None:
    options = PoolOptions(size=1, health_interval_s=0.05, health_timeout_s=0.1, queue_timeout_s=within(10))
    async with running(options) as pool:
        pid = int(await ask(pool, "ping"))
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: pool.statistics().replaced == 1)
        assert "did not answer health checks: no answer within 0.1 s; it is stopped" in pool.statistics().last_failure
        assert await ask(pool, "ping") != str(pid)
        await until(lambda: is_gone(pid))


@on_loop
async def test_a_worker_that_answers_nonsense_is_replaced() -> None:
    options = PoolOptions(size=1, health_interval_s=0.05, queue_timeout_s=within(10))
    async with running(options) as pool:
        assert await ask(pool, "nonsense") == "ok"
        await until(lambda: pool.statistics().replaced == 1)
        assert "ValueError: it answered ?" in pool.statistics().last_failure
        assert (await ask(pool, "ping")).isdecimal()


@on_loop
async def test_busy_workers_are_not_asked_how_they_are() -> None:
    options = PoolOptions(size=1, health_interval_s=0.02, health_timeout_s=0.02, health_failures=1)
    async with running(options) as pool:
        async with pool.lend() as lease:
            os.kill(lease.pid, signal.SIGSTOP)
            # Time for several rounds, if there were any.
            await asyncio.sleep(0.2)
            os.kill(lease.pid, signal.SIGCONT)
            assert await lease.contact.ask("ping") == str(lease.pid)
        assert pool.statistics().replaced == 0


@on_loop
async def test_a_worker_is_replaced_after_its_calls() -> None:
    async with running(PoolOptions(size=1, max_requests=2, queue_timeout_s=within(10))) as pool:
        pids = [await ask(pool, "ping") for _ in range(6)]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [2, 2, 2]
        assert pool.statistics().recycled == 3


@on_loop
async def test_a_worker_that_has_grown_is_replaced_after_its_call() -> None:
    async with running(PoolOptions(size=1, max_rss_bytes=100_000_000, queue_timeout_s=within(10))) as pool:
        first = await ask(pool, "ping")
        await ask(pool, "leak", 10_000_000)
        assert await ask(pool, "ping") == first
        await ask(pool, "leak", 100_000_000)
        assert await ask(pool, "ping") != first


@on_loop
async def test_a_worker_that_grows_too_much_during_a_call_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspex_persist.infra.workers.keeping._MEMORY_POLL_S", 0.05)
    async with running(PoolOptions(size=1, kill_rss_bytes=100_000_000, queue_timeout_s=within(10))) as pool:

        async def grow() -> None:
            async with pool.lend() as lease:
                await lease.contact.ask("leak", 100_000_000)
                await lease.contact.ask("hang")

        with pytest.raises(
            WorkerLostError, match=r"it had \d{9} bytes of memory in use, more than pools\.ping\.kill_rss"
        ):
            await grow()
        assert await ask(pool, "ping")


@on_loop
async def test_old_workers_are_replaced_one_after_the_other() -> None:
    async with running(PoolOptions(size=2, max_age_s=0, health_interval_s=0.05, queue_timeout_s=within(10))) as pool:
        first = {each.pid for each in pool.statistics().workers}
        fewest = 2

        def all_new() -> bool:
            nonlocal fewest
            fewest = min(fewest, len(pool.statistics().workers))
            return not first & {each.pid for each in pool.statistics().workers}

        await until(all_new)
        assert fewest == 1


# --- The end


@on_loop
async def test_workers_that_fail_together_have_failed_once(tmp_path: Path) -> None:
    options = PoolOptions(size=4, batch=4, backoff_s=0.01, crash_limit=2, crash_pause_s=within(60))
    async with running(options, "--exit-from", str(tmp_path / "starts"), "--exit-times", "3") as pool:
        await until(lambda: pool.statistics().idle == 4)
        assert (pool.statistics().start_failures, pool.statistics().state) == (3, "running")


@on_loop
async def test_a_worker_that_works_ends_the_pause_of_others(tmp_path: Path) -> None:
    options = PoolOptions(size=2, backoff_s=within(60), longest_backoff_s=within(60), stable_s=within(60))
    async with running(options, "--exit-from", str(tmp_path / "starts"), "--exit-times", "1") as pool:
        await turns()
        assert (pool.statistics().idle, pool.statistics().starting) == (1, 0)
        assert await ask(pool, "ping")
        await until(lambda: pool.statistics().idle == 2)


@on_loop
async def test_a_drain_lets_calls_end_with_what_they_call() -> None:
    async with running(PoolOptions(size=1, queue_timeout_s=within(10))) as pool:
        release = asyncio.Event()

        async def call() -> str:
            async with pool.lend() as lease:
                await release.wait()
                return await ask(pool, "ping", parent=lease)

        calling = await background(call(), lambda: pool.statistics().busy == 1)
        waiting = await background(ask(pool, "ping"), lambda: pool.statistics().queued == 1)
        draining = await background(pool.drain(within(10)), lambda: pool.statistics().state == "draining")
        with pytest.raises(PoolUnavailableError, match="pool ping takes no calls: it is draining"):
            await ask(pool, "ping")
        release.set()
        assert await calling
        assert await waiting
        assert await draining
        with pytest.raises(PoolUnavailableError, match="it is closed"):
            await ask(pool, "ping")
        assert pool.statistics().workers == ()


@on_loop
async def test_a_drain_interrupts_what_takes_too_long() -> None:
    async with running(ONE) as pool:
        calling = await background(ask(pool, "hang"), lambda: pool.statistics().busy == 1)
        waiting = await background(ask(pool, "ping"), lambda: pool.statistics().queued == 1)
        pids = [each.pid for each in pool.statistics().workers]
        assert not await pool.drain(0.05)
        for task in (calling, waiting):
            with pytest.raises(PoolUnavailableError, match="it is closed"):
                await task
        assert all(map(is_gone, pids))


@on_loop
async def test_a_pool_closes_while_its_workers_start() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3), running(ONE, "--never-ready"):
            pass


@on_loop
async def test_a_forked_child_cannot_use_the_pool() -> None:
    async with running(ONE) as pool:
        first = await ask(pool, "ping")

        def in_vain() -> str:
            try:
                asyncio.run(ask(pool, "ping"))
            except PoolUnavailableError as error:
                return str(error)
            return "lent"

        assert in_child(in_vain) == "pool ping takes no calls: it is closed"
        assert await ask(pool, "ping") == first


async def _chaos(calls: int) -> None:
    """Workers are killed, stopped and made to exit under load: every call ends, and the pool is whole again."""
    random = Random(calls)
    options = PoolOptions(
        size=3,
        queue_timeout_s=within(20),
        call_timeout_s=within(0.2),
        health_interval_s=0.1,
        health_timeout_s=within(0.2),
        max_requests=20,
        backoff_s=0.01,
        crash_limit=1_000,
    )
    ended = Counter[str]()
    # In a long run, numbers of processes are used again.
    seen = set[tuple[int, str]]()
    async with running(options) as pool:

        async def call(number: int) -> None:
            try:
                async with pool.lend(f"s{number % 5}") as lease:
                    seen.add((lease.pid, started_at(lease.pid)))
                    if random.random() < 0.1:
                        os.kill(lease.pid, random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP]))
                    elif random.random() < 0.05:
                        await lease.contact.ask("exit", 1)
                    elif random.random() < 0.2:
                        async with pool.lend(parent=lease) as nested:
                            await nested.contact.ask("ping")
                    assert await lease.contact.ask("ping") == str(lease.pid)
                    ended["ok"] += 1
            except (WorkerExitedError, WorkerTimeoutError, WorkerLostError) as error:
                ended[type(error).__name__] += 1

        callers = iter(range(calls))

        async def caller() -> None:
            for number in callers:
                await call(number)

        await asyncio.gather(*(caller() for _ in range(8)))
        assert ended.total() == calls
        assert ended["ok"] > calls / 2
        await until(lambda: pool.statistics().idle - pool.statistics().spares == 3)
        assert await ask(pool, "ping")
    assert not [pid for pid, began in seen if not is_gone(pid) and started_at(pid) == began]


def started_at(pid: int) -> str:
    """When a process began, in the system's units; "" where the system does not say, or for one that has gone."""
    return "".join(holder.fields_of(pid)[19:20])


def test_a_pool_heals_under_load() -> None:
    run_limited(_chaos(150), within(30))


def test_a_pool_works_on_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(_chaos(30), within(30)))


@pytest.mark.thorough
def test_a_pool_heals_under_load_for_long() -> None:
    run_limited(_chaos(5_000), within(300))
