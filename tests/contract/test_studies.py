"""Studies with the real Optuna on every backend: their trials are in the journal, and nowhere else."""

import asyncio
import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dspex_persist import Context, EmbeddedState, LocalState, StateProvider, connect
from dspex_persist.errors import (
    ContextClosedError,
    InvalidArgumentError,
    OutcomeUnknownError,
    StorageError,
    StudyError,
    UnavailableError,
    VariableLockedError,
)
from dspex_persist.replay import replay
from dspex_persist.state.abilities import Recordable
from dspex_persist.state.distributed import DistributedState
from dspex_persist.state.events import ExecutionEnded
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.tools.with_tools import WithTools
from dspex_persist.state.valkey.valkey_state import RedisState
from dspex_persist.testing.server import ServedDatabase
from tests.deadline import within
from tests.late import Late

optuna, ours, reading = Late("optuna"), Late("dspex_persist.optuna"), Late("dspex_persist.optuna.reading")
_numbers = itertools.count()


FILE = pytest.param("file", marks=pytest.mark.thorough)  # the server has one


@pytest.fixture(scope="module", params=["memory", FILE, "server", "postgresql", "valkey"])
def provider(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StateProvider]:
    path = tmp_path_factory.mktemp("studies") / "studied.db"
    if request.param == "memory":
        with WithTools(LocalState()) as state:
            yield state
    elif request.param == "file":
        with WithTools(EmbeddedState(path)) as state:
            yield state
    elif request.param == "postgresql":
        databases = request.getfixturevalue("postgres")
        url = databases.create()
        with DistributedState(url) as state, DistributedState(url) as state.other:
            yield state
        databases.drop(url)
    elif request.param == "valkey":
        server = request.getfixturevalue("valkey").replace("unix://", "redis+unix://")
        url = f"{server}?prefix=t{uuid.uuid4().hex}"
        with RedisState(url) as state, RedisState(url) as state.other:
            yield state
    else:
        with ServedDatabase(path) as served, connect(f"grpc://{served.target}") as state:
            yield state


@pytest.fixture
def ctx(provider: StateProvider) -> Iterator[Context]:
    with Context(f"s{next(_numbers)}", provider, actor="user:ann") as ctx:
        ctx.define("x", 0.5, constraints={"min": -1, "max": 1})
        ctx.define("n", 3, constraints={"min": 1, "max": 9})
        ctx.define("mood", "calm", type_name="choice", constraints={"choices": ["calm", "wild"]})
        yield ctx


@pytest.fixture
def study_of(ctx: Context) -> Callable[..., Any]:
    def study(variables: Any = ("x", "n", "mood"), **options: Any) -> Any:
        options.setdefault("sampler", optuna.samplers.RandomSampler(seed=1))
        return ours.Study(ctx, variables, **options)

    return study


@pytest.fixture
def other(provider: StateProvider) -> StateProvider:
    """Another server on the same sessions, if there can be several."""
    return getattr(provider, "other", provider)


def squared(trial: Any) -> float:
    return float(trial["x"] ** 2 + trial["n"])


def states_of(study: Any) -> list[str]:
    return [each.state.name for each in study.trials]


def test_trials_are_executions_of_the_journal(ctx: Context, study_of: Callable[..., Any]) -> None:
    with study_of(name="tuning") as study:
        trial = study.ask()
        trial.report(7.5, step=0)
        trial.set_user_attr("path", "a.bin")
        ctx["other"] = 7
        assert (trial["n"], trial["other"]) == (trial.params["n"], 7)
        with pytest.raises(KeyError, match="nothing"):
            trial["nothing"]
        told = study.tell(trial, 0.25)
        study.tell(study.ask(), state="fail")
    assert (told.number, told.state.name, told.value, told.actor) == (0, "COMPLETE", 0.25, "user:ann")
    assert (told.params, told.intermediate_values, told.user_attrs) == (trial.params, {0: 7.5}, {"path": "a.bin"})
    assert [each.number for each in study.trials] == [0, 1]
    found = list(reading.reader_of(ctx, "tuning").read())
    ended = {each.id: each for each in found}.values()
    assert [(each.tool, each.actor) for each in ended] == [("study", "user:ann"), *[("trial", "user:ann")] * 2]
    (first,) = [each for each in ended if each.id == trial.execution_id]
    assert told.execution_ids == (first.id,)
    assert first.recorded["trial"][-1] == {"state": "complete", "number": 0, "values": [0.25]}
    assert ctx.get_many("x", "n", "mood") == {"x": 0.5, "n": 3, "mood": "calm"}


def test_a_study_finds_good_values_and_applies_the_best_in_one_commit(
    ctx: Context, study_of: Callable[..., Any]
) -> None:
    with study_of(name="tuning", direction="maximize") as study:
        study.optimize(squared, n_trials=8)
        best = study.best_trial
        assert best.value == max(each.value for each in study.trials) == study.best_value
        assert study.apply_best() == best
        assert study.to_optuna().best_trial.number == best.number
    assert ctx.get_many("x", "n", "mood") == best.params == study.best_params
    entries = [ctx.history(name, 1)[0] for name in ("x", "n", "mood")]
    assert len({entry.commit for entry in entries}) == 1
    assert entries[0].reason == f"study tuning, trial {best.number}: {best.value:.6g}"
    assert (entries[0].metadata["study"], entries[0].metadata["trial"]) == ("tuning", str(best.number))


def test_variables_are_locked_while_a_study_runs(ctx: Context, study_of: Callable[..., Any]) -> None:
    with study_of() as study:
        ctx["x"] = 0.25
        trial = study.ask()
        with pytest.raises(VariableLockedError, match="study study"):
            ctx["x"] = 0.5
        assert ctx["x"] == 0.25
        assert trial.apply() == 3
        assert ctx.get_many("x", "n", "mood") == trial.params
        assert ctx.history("x", 1)[0].reason == "study study, trial 0"
        study.tell(trial, 1)
    ctx["x"] = 0.75
    with ctx.optimize("n", optimizer_id="another"):
        with pytest.raises(VariableLockedError, match="another"):
            study.ask()
        assert ctx.optimization("x") is None
    assert study.apply(0).number == 0


@pytest.mark.parametrize("error", [StorageError("full"), UnavailableError("away"), OutcomeUnknownError("lost")])
def test_locks_are_renewed_again_after_a_failure(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with WithTools(LocalState(SessionOptions(optimization_lease_s=0.3))) as state, Context("s", state) as ctx:
        ctx.define("x", 0.5, constraints={"min": 0, "max": 1})
        take, calls, renewed = ours.locks.Locks._take, itertools.count(), threading.Event()

        def take_or_fail(locks: Any) -> None:
            call = next(calls)
            if call == 1:
                raise error
            take(locks)
            if call > 1:
                renewed.set()

        monkeypatch.setattr(ours.locks.Locks, "_take", take_or_fail)
        with ours.Study(ctx, ["x"]) as study:
            study.ask()
            assert renewed.wait(within(10))


def test_optimize_alone_unlocks_at_its_end(ctx: Context, study_of: Callable[..., Any]) -> None:
    study = study_of()
    study.optimize(squared, n_trials=1)
    assert ctx.optimization("x") is None
    with pytest.raises(ZeroDivisionError):
        study.optimize(lambda _: 1 / 0, n_trials=1)
    assert ctx.optimization("x") is None
    assert states_of(study) == ["COMPLETE", "FAIL"]


def test_a_study_goes_on_where_it_was(ctx: Context, study_of: Callable[..., Any]) -> None:
    with study_of({"x": {"high": 0.5}, "mood": None}, direction="maximize") as study:
        study.optimize(lambda trial: trial["x"], n_trials=5)
        before = study.trials
    again = study_of(None)
    assert again.trials == before
    assert (again.directions, dict(again.space)) == (("maximize",), dict(study.space))
    again.optimize(lambda trial: trial["x"], n_trials=8, in_all=True)
    assert [each.number for each in again.trials] == list(range(8))
    # A sampler with a seed does not begin with the same values.
    assert len({each.params["x"] for each in again.trials}) == 8
    again.optimize(lambda trial: trial["x"], n_trials=8, in_all=True)
    assert len(again.trials) == 8
    with pytest.raises(StudyError, match="to maximize, as it began"):
        study_of(None, direction="minimize")
    with pytest.raises(StudyError, match="say which variables"):
        study_of(None, name="another")


def test_samplers_go_on_where_they_were(ctx: Context) -> None:
    """Some keep what they need to know with trials, or with the study."""
    for sampler in (
        lambda: optuna.samplers.GridSampler({"n": [1, 2, 3, 4], "mood": ["calm", "wild"]}),
        lambda: optuna.samplers.NSGAIISampler(population_size=2, seed=1),
    ):
        name = type(sampler()).__name__
        for _ in range(2):
            study = ours.Study(ctx, ["n", "mood"], name=name, sampler=sampler())
            study.optimize(lambda trial: trial["n"], n_trials=4)
        assert len(study.trials) == 8
        if name == "GridSampler":
            assert len({tuple(each.params.items()) for each in study.trials}) == 8
            # There is nothing left: it tries one again, and ends.
            study.optimize(lambda trial: trial["n"], n_trials=4)
            assert len(study.trials) == 9


def test_the_space_of_a_study_may_change(ctx: Context) -> None:
    first = ours.Study(ctx, {"mood": ["calm"], "x": None})
    first.optimize(squared_of_x, n_trials=3)
    sampler = optuna.samplers.TPESampler(n_startup_trials=1, seed=1)
    second = ours.Study(ctx, {"x": {"low": 0.0}, "mood": ["wild", "calm"], "n": None}, sampler=sampler)
    second.optimize(squared_of_x, n_trials=3)
    assert len(second.trials) == 6
    assert all(each.params["x"] >= 0 for each in second.trials[3:])
    assert len(second.to_optuna().trials) == 6
    assert ours.Study(ctx).space.keys() == {"x", "mood", "n"}


def squared_of_x(trial: Any) -> float:
    return float(trial["x"] ** 2)


def test_pruned_trials(study_of: Callable[..., Any]) -> None:
    def objective(trial: Any) -> float:
        for step in range(3):
            trial.report(float(trial.number), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return float(trial.number)

    study = study_of(pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    study.optimize(objective, n_trials=3)
    assert states_of(study) == ["COMPLETE", "PRUNED", "PRUNED"]
    assert [each.value for each in study.trials] == [0.0, 1.0, 2.0]
    assert study.best_trial.number == 0
    study.tell(study.ask(), state="pruned")
    study.close()
    again = study_of(None)
    assert states_of(again) == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]


def test_several_objectives(ctx: Context, study_of: Callable[..., Any]) -> None:
    study = study_of(directions=["minimize", "maximize"])
    study.optimize(lambda trial: (trial["n"], trial["x"]), n_trials=6)
    best = study.best_trials
    assert best
    for each in best:
        assert not any(o.values[0] < each.values[0] and o.values[1] > each.values[1] for o in study.trials)
    with pytest.raises(StudyError, match="several objectives"):
        study.apply_best()
    with pytest.raises(InvalidArgumentError, match="1 were told, and there are 2"):
        study.tell(study.ask(), 1.0)
    assert study.apply(best[0]).params == ctx.get_many("x", "n", "mood")
    study.close()


def test_failed_trials(study_of: Callable[..., Any], ctx: Context) -> None:
    def objective(trial: Any) -> Any:
        if trial.number == 0:
            raise RuntimeError("no model")
        return [float("nan"), None, "good", float("inf")][trial.number - 1]

    study = study_of()
    study.optimize(objective, n_trials=5, catch=(RuntimeError, InvalidArgumentError))
    assert states_of(study) == ["FAIL", "FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert study.trials[4].value == float("inf")
    _, commits = Recordable.of(ctx.backend.provider).record(ctx.session_id)
    ends = [event for commit in commits for event in commit.read_events() if isinstance(event, ExecutionEnded)]
    (first, _) = [each.failure for each in ends if each.failure is not None]
    assert (first.type, first.message) == ("RuntimeError", "no model")
    assert "no model" in first.traceback


def test_what_cannot_be_told(study_of: Callable[..., Any]) -> None:
    with study_of() as study:
        with pytest.raises(StudyError, match="no complete trial yet"):
            study.apply_best()
        trial = study.ask()
        for values, state, field in (
            ("good", None, "values"),
            (None, "complete", "values"),
            (1.0, "pruned", "values"),
            (1.0, "fine", "state"),
            ([1.0, 2.0], None, "values"),
        ):
            with pytest.raises(InvalidArgumentError) as caught:
                study.tell(trial, values, state=state)
            assert caught.value.field == field
        study.tell(trial.number, 1.0)
        for again in (trial, trial.number, study.trials[0]):
            with pytest.raises(StudyError, match="trial 0 has ended: complete"):
                study.tell(again, 2.0)
        with pytest.raises(StudyError, match="has no trial 7"):
            study.tell(7, 2.0)
        assert study.trials[0].value == 1.0


def test_interrupted_trials(ctx: Context, study_of: Callable[..., Any]) -> None:
    with study_of() as study:
        lost, late = study.ask(), study.ask()
        assert states_of(study) == ["RUNNING", "RUNNING"]
    assert states_of(study) == ["FAIL", "FAIL"]
    assert all(each.interrupted for each in study.trials)
    with study_of(requeue=True) as again:
        assert again.tell(late.number, 4.0).state.name == "COMPLETE"
        retried = again.ask()
        assert retried.params == lost.params
        assert again.tell(retried, 1.0).retry_of == lost.id
        assert again.ask().params != lost.params
        assert states_of(again) == ["FAIL", "COMPLETE", "COMPLETE", "RUNNING"]
    assert len(again.trials[1].execution_ids) == 2
    assert study_of(None).best_trial.params == lost.params


def test_two_processes_run_a_study_at_the_same_time(
    ctx: Context, provider: StateProvider, other: StateProvider
) -> None:
    """Each has a study of its own; only the journal connects them."""

    def run(provider: StateProvider) -> None:
        with Context(ctx.session_id, provider) as own, ours.Study(own, ["x", "n"], name="shared") as study:
            study.optimize(squared, n_trials=12, in_all=True)
            told.append(study.trials)

    told: list[Any] = []
    threads = [threading.Thread(target=run, args=(each,)) for each in (provider, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 2
    study = ours.Study(ctx, name="shared")
    assert 12 <= len(study.trials) <= 13
    assert [each.number for each in study.trials] == list(range(len(study.trials)))
    assert set(states_of(study)) == {"COMPLETE"}
    assert ctx.optimization("x") is None


def test_an_interrupted_trial_is_tried_again_once(
    ctx: Context, study_of: Callable[..., Any], other: StateProvider
) -> None:
    with study_of() as study:
        lost = study.ask()
    elsewhere = Context(ctx.session_id, other)
    first, second = study_of(None, requeue=True), ours.Study(elsewhere, requeue=True)
    barrier = threading.Barrier(2)
    asked: list[Any] = []

    def ask(study: Any) -> None:
        barrier.wait()
        asked.append(study.ask())

    threads = [threading.Thread(target=ask, args=(each,)) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.params == lost.params for each in asked].count(True) == 1
    first.close()
    second.close()


def test_values_that_are_to_be_tried(ctx: Context, study_of: Callable[..., Any]) -> None:
    with study_of() as study:
        study.enqueue()
        study.enqueue({"x": 0.125})
        assert study.ask().params == {"x": 0.5, "n": 3, "mood": "calm"}
        assert study.ask().params["x"] == 0.125
        with pytest.raises(InvalidArgumentError, match="the space has no x=7"):
            study.enqueue({"x": 7})


def test_a_study_from_asyncio(ctx: Context, study_of: Callable[..., Any]) -> None:
    async def objective(trial: Any) -> float:
        await asyncio.sleep(0)
        return float(trial["x"])

    async def main() -> None:
        async with study_of() as study:
            trial = await study.ask.aio()
            await trial.report.aio(1.0, step=0)
            await study.tell.aio(trial, 5.0)
            await study.optimize.aio(objective, n_trials=2)
            await study.optimize.aio(squared_of_x, n_trials=1)
            await study.apply_best.aio()
            cancelled = asyncio.create_task(study.optimize.aio(forever, n_trials=1))
            await begun.wait()
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled

    async def forever(trial: Any) -> float:
        begun.set()
        await asyncio.Event().wait()
        return 0.0

    begun = asyncio.Event()
    asyncio.run(main())
    study = study_of(None)
    assert states_of(study) == ["COMPLETE"] * 4 + ["FAIL"]
    assert study.trials[4].interrupted
    assert ctx.optimization("x") is None


def test_a_study_can_be_stopped(study_of: Callable[..., Any]) -> None:
    study = study_of()
    study.optimize(squared, callbacks=[lambda study, trial: study.stop() if trial.number == 1 else None])
    assert len(study.trials) == 2
    study.optimize(squared, timeout_s=0.0)
    assert len(study.trials) == 2


def test_a_closed_context_ends_its_studies(provider: StateProvider) -> None:
    with Context(f"s{next(_numbers)}", provider) as ctx:
        ctx.define("x", 0.5, constraints={"min": -1, "max": 1})
        study = ours.Study(ctx, ["x"])
        trial = study.ask()
    with pytest.raises(ContextClosedError):
        study.tell(trial, 1.0)
    study.close()
    with pytest.raises(ContextClosedError):
        study.ask()
    assert repr(study) == f"<Study 'study' of session '{ctx.session_id}'>"


def test_sessions_of_the_same_id_have_studies_of_their_own(ctx: Context, study_of: Callable[..., Any]) -> None:
    study_of().optimize(squared, n_trials=1)
    ctx.end()
    with Context(ctx.session_id, ctx.backend.provider) as again:
        again.define("x", 0.5, constraints={"min": -1, "max": 1})
        assert ours.Study(again, ["x"]).trials == ()


def test_a_trial_that_says_much_has_several_executions(ctx: Context) -> None:
    with ours.Study(ctx, ["x"]) as study:
        trial = study.ask()
        for number in range(3):
            trial.set_user_attr(f"note {number}", "a" * 400_000)
        told = study.tell(trial, 1.0)
    assert sorted(told.user_attrs) == ["note 0", "note 1", "note 2"]
    assert (told.state.name, len(told.execution_ids)) == ("COMPLETE", 2)


def test_recordings_tell_the_same_as_audits(ctx: Context, study_of: Callable[..., Any]) -> None:
    """What a study reads where there are no audits."""
    readers = [
        reading.reader_of(ctx, "read"),
        reading.RecordingReader(Recordable.of(ctx.backend.provider), ctx.session_id, "read"),
    ]
    with study_of(name="another") as another:
        another.ask()
    with study_of(name="read") as study:
        study.optimize(squared, n_trials=2)
        open_trials = [study.ask(), study.ask()]
        told = [{each.id: each for each in reader.read()} for reader in readers]
        study.tell(open_trials[0], 1.0)
        told += [{each.id: each for each in reader.read()} for reader in readers]
    told += [{each.id: each for each in reader.read()} for reader in readers]
    facts = [[facts_of(each) for each in some.values()] for some in told]
    assert facts[::2] == facts[1::2]
    # The study itself, and its trials: two that have ended, and two that run.
    assert [len(each) for each in facts[::2]] == [5, 1, 1]


def facts_of(execution: Any) -> Any:
    recorded = {kind: entries for kind, entries in execution.recorded.items() if entries}
    metadata = dict(execution.metadata)
    return execution.id, execution.tool, metadata, execution.actor, execution.is_running, execution.ended_at, recorded


def test_replays_leave_trials_out(ctx: Context, study_of: Callable[..., Any]) -> None:
    study_of().optimize(squared, n_trials=1)
    header, commits = Recordable.of(ctx.backend.provider).record(ctx.session_id)
    report = replay((header, commits), [])
    reasons = {each.reason for each in report.executions}
    assert reasons == {"a client recorded in it what its own code did, which is not a tool"}
