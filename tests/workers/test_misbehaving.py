"""Workers that misbehave, in a real server: the execution fails cleanly, its journal says why, the pool heals."""

import sys
import time
from collections.abc import Iterator

import pytest

from dspex_persist.infra.process import ServerProcess
from dspex_persist.infra.workers.statistics import PoolStatistics
from dspex_persist.state.audit import ExecutionDetail
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.model import ExecutionStatus, ToolOutcome
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, STUBS, serve
from tests.outcomes import execute, result_of

# Long enough to take much memory.
CALL_S = round(within(0.5), 1)
POOLS = f"""
[pools.tools]
max_rss_bytes = "150MiB"
kill_rss_bytes = "400MiB"
call_timeout_s = {CALL_S}
queue_timeout_s = {within(5)}

[pools.odd]
command = ["{sys.executable}", "-m", "tests.workers.odd", "--port", "{{port}}", "--starts", "STARTS"]
size = 3
ready_timeout_s = SECONDS
call_timeout_s = 0.5
tools = ["nonsense", "deaf", "late", "fine"]
streaming = ["garbled"]
env = {{ PYTHONPATH = "{ROOT}:{STUBS}" }}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("rough")
    text = POOLS.replace("STARTS", str(folder / "starts")).replace("SECONDS", f"{within(0.6):.1f}")
    (folder / "pools.toml").write_text(text)
    flags = ("--tools", "tests.workers.rough_tools", "--workers", "1", "--config", str(folder / "pools.toml"))
    with serve(folder / "sessions.db", *flags) as server:
        yield server


def why(provider: BridgedState, session: str, failed: ToolOutcome) -> ExecutionDetail:
    """The journal of an execution that failed, and wrote nothing."""
    assert provider.get_variable(session, "a").version == 0
    with provider.audit() as audit:
        detail = audit.execution(failed.execution_id)
    assert detail.failure is not None
    assert detail.failure.message in str(failed.error)
    return detail


def pools_when(provider: BridgedState, whole: tuple[str, ...] = ("tools", "odd")) -> dict[str, PoolStatistics]:
    """The pools, as soon as these have all of their workers, which are free."""
    deadline = time.monotonic() + within(20)
    while True:
        pools = {pool.pool: pool for pool in provider.list_workers()}
        if all((pools[name].state, pools[name].idle) == ("running", pools[name].size) for name in whole):
            return pools
        assert time.monotonic() < deadline, pools
        time.sleep(0.02)


def test_workers_that_never_get_ready_or_answer_no_ping_are_replaced(provider: BridgedState, session: str) -> None:
    pool = pools_when(provider)["odd"]
    assert (pool.start_failures, pool.started) == (2, 3)
    # The other one has failed at once: its answer to a ping is no message.
    assert "it was not ready within" in pool.last_failure
    assert "(pools.odd.ready_timeout_s)" in pool.last_failure
    assert result_of(execute(provider, session, "fine")) == "fine"


def test_nonsense_instead_of_an_answer(provider: BridgedState, session: str) -> None:
    strange = execute(provider, session, "nonsense")
    assert strange.status is ExecutionStatus.FAILED
    failure = why(provider, session, strange).failure
    assert failure is not None
    assert "not a message of the protocol" in failure.message
    chunks = provider.stream_tool(session, "garbled")
    assert next(chunks) == 1
    with pytest.raises(Exception, match="a chunk is not a message of the protocol"):
        next(chunks)
    assert result_of(execute(provider, session, "fine")) == "fine"


def test_one_that_does_not_hear_is_replaced_and_one_that_is_late_is_not(provider: BridgedState, session: str) -> None:
    before = pools_when(provider)["odd"]
    late = execute(provider, session, "late")
    deaf = execute(provider, session, "deaf")
    for failed in (late, deaf):
        assert (failed.status, failed.error_code) == (ExecutionStatus.TIMED_OUT, "WORKER_TIMEOUT")
        failure = why(provider, session, failed).failure
        assert failure is not None
        assert "did not finish within 0.5 s (it still runs)" in failure.message
        assert "pools.odd.call_timeout_s" in failure.message
    after = pools_when(provider)["odd"]
    assert (after.replaced - before.replaced, after.call_timeouts - before.call_timeouts) == (1, 2)


def test_garbage_on_its_output_harms_nothing(provider: BridgedState, session: str) -> None:
    ran = [result_of(execute(provider, session, "chatter")) for _ in range(2)]
    assert ran[0] == ran[1]
    assert provider.get_value(session, "a") == 5


def test_one_that_leaks_is_replaced_after_the_call(provider: BridgedState, session: str) -> None:
    before = pools_when(provider)["tools"]
    grown = result_of(execute(provider, session, "leak", mib=160))
    assert provider.get_value(session, "a") == 160
    after = pools_when(provider)["tools"]
    assert after.recycled == before.recycled + 1
    assert result_of(execute(provider, session, "pid")) != grown


def test_one_that_takes_too_much_is_killed(provider: BridgedState, session: str) -> None:
    killed = execute(provider, session, "grow", mib=450)
    assert (killed.status, killed.error_code) == (ExecutionStatus.FAILED, "WORKER_EXIT")
    detail = why(provider, session, killed)
    assert detail.failure is not None
    assert "bytes of memory in use, more than pools.tools.kill_rss_bytes" in detail.failure.message
    assert [line.message for line in detail.log] == ["before it grows"]
    pools_when(provider)
    assert result_of(execute(provider, session, "pid"))


def test_code_that_never_returns_is_given_up_when_the_pool_says_so(provider: BridgedState, session: str) -> None:
    first = result_of(execute(provider, session, "pid"))
    hung = execute(provider, session, "never_return")
    assert (hung.status, hung.error_code) == (ExecutionStatus.TIMED_OUT, "WORKER_TIMEOUT")
    detail = why(provider, session, hung)
    assert detail.failure is not None
    assert f"did not finish within {CALL_S:g} s" in detail.failure.message
    assert [line.message for line in detail.log] == ["before it hangs"]
    pools_when(provider)
    assert result_of(execute(provider, session, "pid")) != first


def test_a_stream_that_is_not_read_to_its_end(provider: BridgedState, session: str) -> None:
    before = result_of(execute(provider, session, "pid"))
    chunks = provider.stream_tool(session, "endless")
    assert next(chunks) == 0
    chunks.close()
    pools_when(provider)
    assert provider.get_variable(session, "a").version == 0
    # Its code ended with it, so the worker stayed.
    assert result_of(execute(provider, session, "pid")) == before
