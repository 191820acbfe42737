"""What an engine and its tools count, and what shows it, without a server."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import observed
from dspex_persist.infra.metrics import CallMeter, Family
from dspex_persist.infra.workers.statistics import PoolStatistics
from dspex_persist.observed import Observed
from dspex_persist.state.bridge.servicer import BridgeServicer
from dspex_persist.state.embedded import SqliteState
from dspex_persist.state.errors import QueueFullError, VariableLockedError, VersionConflictError
from dspex_persist.state.lm_calls import counts_of
from dspex_persist.state.meter import MOST_MODELS, MOST_TOOLS, Meter
from dspex_persist.state.model import RECORDING, TRANSACTION, ExecutionStatus
from dspex_persist.state.tools.with_tools import WithTools

Found = dict[tuple[str, ...], float]


def values_of(families: "list[Family]", name: str) -> Found:
    """The values of a family, by their labels; of a histogram, how many observations there were."""
    (family,) = [family for family in families if family.name == f"dspex_persist_{name}"]
    return dict(family.samples) | {each.labels: each.buckets[-1][1] for each in family.distributions}


@pytest.fixture
def meter() -> Meter:
    return Meter(["ours"])


@pytest.fixture
def engine(meter: Meter, tmp_path: Path) -> Iterator[SqliteState]:
    engine = SqliteState(tmp_path / "a.db", meter=meter)
    engine.initialize_session("s")
    engine.register_variable("s", "n", "integer", 0)
    yield engine
    engine.close()


# --- Names that others make up ---


def test_tools_and_models_without_end_have_labels_with_an_end(meter: Meter) -> None:
    for number in range(3 * MOST_TOOLS):
        meter.ended(f"made_up_{number}", ExecutionStatus.FAILED, 1_000)
        meter.lm_called(f"made_up_{number}", counts_of({"model": f"model_{number}", "cost": 1}))
    meter.ended("ours", ExecutionStatus.COMMITTED, 1_000)
    families = meter.families()
    executions = values_of(families, "executions_total")
    assert len(executions) == MOST_TOOLS + 2
    assert executions["other", "failed"] == 2 * MOST_TOOLS
    assert executions["ours", "committed"] == 1
    cost = values_of(families, "lm_cost_usd_total")
    assert sum(cost.values()) == 3 * MOST_TOOLS
    assert len({model for model, _ in cost}) == MOST_MODELS + 1


def test_recordings_and_transactions_are_no_tools(meter: Meter) -> None:
    meter.ended("a name that a client chose", ExecutionStatus.COMMITTED, 0, is_recording=True)
    meter.ended(TRANSACTION, ExecutionStatus.COMMITTED, 0, is_recording=True)
    meter.ended(TRANSACTION, ExecutionStatus.CONFLICT, 0)
    meter.ended("ours", ExecutionStatus.CONFLICT, 0)
    families = meter.families()
    assert values_of(families, "executions_total") == {(RECORDING, "committed"): 2, ("ours", "conflict"): 1}
    assert values_of(families, "transactions_total") == {("committed",): 0, ("conflict",): 1}
    conflicts = values_of(families, "conflicts_total")
    assert (conflicts["execution",], conflicts["transaction",], conflicts["version",]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("entry", "outcome", "tokens", "cost"),
    [
        ({"model": "m", "cost": 0.5, "usage": {"m": {"input_tokens": 3}}}, "ok", 3, 0.5),
        ({"model": "m", "error": {"type": "RateLimitError"}}, "error", 0, None),
        ({"model": "m", "cached": True, "latency_us": 5}, "cached", 0, None),
        # Nothing in a journal has to be what it should be: a counter must not fall, nor a scrape fail.
        ({"model": {"not": "a text"}, "cost": -1, "latency_us": -1, "usage": "?"}, "ok", 0, 0),
        ({}, "ok", 0, None),
    ],
)
def test_calls_of_models_count_as_far_as_the_journal_says(
    meter: Meter, entry: dict[str, Any], outcome: str, tokens: float, cost: float | None
) -> None:
    meter.lm_called("ours", counts_of(entry))
    families = meter.families()
    ((labels, count),) = values_of(families, "lm_calls_total").items()
    assert (labels[1:], count) == (("ours", outcome), 1)
    assert values_of(families, "lm_tokens_total")[labels[0], "ours", "input"] == tokens
    assert list(values_of(families, "lm_cost_usd_total").values()) == ([] if cost is None else [cost])


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("scope write", "scope write"),
        ("rule for read of secret_*", "rule"),
        ("more than 100 calls per second", "rate"),
        ("execution of another", "execution"),
        ("the call has no token, and this server demands one", "credentials"),
    ],
)
def test_refusals_are_counted_by_what_was_missing(meter: Meter, missing: str, reason: str) -> None:
    meter.denied(missing)
    assert values_of(meter.families(), "denials_total") == {(reason,): 1}


# --- The engine ---


def test_the_engine_counts_groups_commits_and_errors(engine: SqliteState, meter: Meter) -> None:
    engine.set_variable("s", "n", 1)
    with pytest.raises(VersionConflictError):
        engine.set_variable("s", "n", 2, expected_version=9)
    engine.start_optimization("s", "n", "optimizer")
    with pytest.raises(VariableLockedError):
        engine.set_variable("s", "n", 3)
    families = meter.families()
    errors = values_of(families, "write_errors_total")
    assert {error: count for (error,), count in errors.items() if count} == {
        "VersionConflictError": 1,
        "VariableLockedError": 1,
    }
    conflicts = values_of(families, "conflicts_total")
    assert (conflicts["version",], conflicts["lock",]) == (1, 1)
    assert values_of(families, "group_writes")[()] == values_of(families, "group_seconds")[()] == 6
    assert values_of(families, "commit_seconds")[()] == engine.head_sequence == 4


def test_a_full_queue_is_counted_once_for_each_write(tmp_path: Path, meter: Meter) -> None:
    meter.refused(2)
    meter.failed(QueueFullError(1))
    assert values_of(meter.families(), "queue_full_total") == {(): 2}


def test_a_session_that_is_not_in_memory_is_a_miss(tmp_path: Path) -> None:
    with SqliteState(tmp_path / "a.db") as engine:
        engine.initialize_session("s")
        assert engine.figures().cache_hits == 0
    meter = Meter()
    with SqliteState(tmp_path / "a.db", meter=meter) as engine:
        assert (meter.misses, engine.figures().sessions) == (0, 0)
        engine.get_session("s")
        assert (meter.misses, engine.figures().sessions) == (1, 1)
        before = engine.figures().cache_hits
        engine.get_session("s")
        assert (meter.misses, engine.figures().cache_hits > before) == (1, True)


def test_a_watch_is_behind_by_what_it_has_not_delivered(engine: SqliteState) -> None:
    with engine.watch("s") as watch:
        assert engine.lag(watch.first_sequence, watch.position) == (0, None)
        start = watch.position
        for number in range(300):
            engine.set_variable("s", "n", number)
        commits, since = engine.lag(watch.first_sequence, start)
        assert commits == 256
        assert since is not None
        assert engine.lag(watch.first_sequence, engine.head_sequence - 2)[0] == 2
        while watch.next(0):
            pass
        assert engine.lag(watch.first_sequence, watch.position) == (0, None)
    assert engine.lag(watch.first_sequence, 0) == (0, None)


# --- What a scrape shows ---


@pytest.fixture
def show(engine: SqliteState, meter: Meter) -> Iterator[Callable[..., list[Family]]]:
    """Shows what a server with this engine would, and with these pools."""
    provider = WithTools(engine, meter=meter)

    def families(*pools: PoolStatistics) -> list[Family]:
        async def scraped() -> list[Family]:
            loop = asyncio.get_running_loop()
            shown = Observed(
                engine,
                meter=meter,
                calls=CallMeter(),
                cache_limit_bytes=1000,
                runner=provider.runner,
                servicer=BridgeServicer(provider),
                pools=lambda: pools,
                loop=loop,
                version="1",
            )
            return await asyncio.to_thread(lambda: [each for source in shown.sources for each in source()])

        return asyncio.run(scraped())

    yield families
    provider.close()


def test_a_pool_shows_its_workers_and_what_became_of_others(show: Callable[..., list[Family]]) -> None:
    counts = {name: number for number, name in enumerate(PoolStatistics.__dataclass_fields__)}
    facts: dict[str, Any] = {**counts, "pool": "p", "state": "failing", "last_failure": "", "workers": ()}
    families = show(PoolStatistics(**facts))
    assert values_of(families, "pool_workers") == {
        ("p", state): counts[state] for state in ("idle", "busy", "starting")
    }
    assert values_of(families, "pool_failing") == {("p",): 1}
    assert values_of(families, "pool_call_failures_total")["p", "worker_exit"] == counts["exits"]
    assert values_of(families, "pool_worker_ends_total")["p", "crashed"] == counts["crashed"]
    assert values_of(show(), "pool_size") == {}


def test_a_database_that_does_not_answer_does_not_hold_up_a_scrape(
    show: Callable[..., list[Family]], engine: SqliteState, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(observed, "_DATABASE_MOST_S", 0.01)
    monkeypatch.setattr(engine, "file_figures", answers.wait)
    with pytest.raises(TimeoutError, match="the database has not said its size"):
        show()
    answers.set()


def test_a_loop_that_does_not_answer_does_not_hold_up_a_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed, "_LAG_MOST_S", 0.01)
    loop = asyncio.new_event_loop()
    assert observed.loop_lag_s(loop) >= 0.01
    loop.close()
