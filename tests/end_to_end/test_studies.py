"""Studies whose process or server is killed, and whose session moves; and what the command line shows of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Context
from dspex_persist.testing.server import ServedDatabase
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment
from tests.late import Late

optuna, ours = Late("optuna"), Late("dspex_persist.optuna")
PROGRAM = """
import os, signal, sys
import optuna
import dspex_persist
from dspex_persist.optuna import Study

def objective(trial):
    if trial.number == 2:
        trial.report(1.0, 0)
        os.kill(os.getpid(), signal.SIGKILL)
    return trial["x"]

with dspex_persist.Context("s", sys.argv[1]) as ctx:
    ctx.define("x", 0.5, constraints={"min": 0, "max": 1})
    with Study(ctx, ["x"], name="killed", sampler=optuna.samplers.RandomSampler(seed=1)) as study:
        study.optimize(objective, n_trials=5)
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDatabase]:
    with ServedDatabase(tmp_path / "served.db") as served:
        yield served


def states_of(study: Any) -> list[str]:
    return [each.state.name for each in study.trials]


@pytest.mark.parametrize("kind", ["file", "server"])
def test_a_study_whose_process_is_killed_goes_on(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    place = str(tmp_path / "s.db") if kind == "file" else request.getfixturevalue("served").url
    argv = [sys.executable, "-c", PROGRAM, place]
    killed = subprocess.run(argv, check=False, cwd=ROOT, env=environment(), timeout=within(60))
    assert killed.returncode == -signal.SIGKILL
    with Context("s", place, create=False) as ctx:
        study = ours.Study(ctx, name="killed")
        deadline = time.monotonic() + within(20)
        while states_of(study)[-1] == "RUNNING" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert states_of(study) == ["COMPLETE", "COMPLETE", "FAIL"]
        assert study.trials[2].interrupted
        # A server has what was reported at once.
        assert study.trials[2].intermediate_values == ({} if kind == "file" else {0: 1.0})
        # The lock ends with its lease; the study may go on before.
        assert ctx.optimization("x") is not None
    sampler = optuna.samplers.RandomSampler(seed=1)
    with Context("s", place, create=False) as ctx:
        with ours.Study(ctx, name="killed", requeue=True, sampler=sampler) as study:
            study.optimize(lambda trial: trial["x"], n_trials=5, in_all=True)
            study.apply_best()
        assert states_of(study) == ["COMPLETE", "COMPLETE", "FAIL", *["COMPLETE"] * 3]
        lost, retried = study.trials[2:4]
        assert (retried.params, retried.retry_of) == (lost.params, lost.id)
        assert ctx["x"] == study.best_params["x"] == min(each.value for each in study.trials if each.values)
        assert ctx.optimization("x") is None


def test_a_trial_outlives_its_server(served: ServedDatabase) -> None:
    with Context("s", served.url) as ctx:
        ctx.define("x", 0.5, constraints={"min": 0, "max": 1})
        with ours.Study(ctx, ["x"], requeue=True) as study:
            trial = study.ask()
            trial.report(3.0, 0)
            served.restart()
            assert states_of(study) == ["RUNNING"]
            trial.report(4.0, 1)
            told = study.tell(trial, 0.25)
            assert (told.state.name, told.value, told.intermediate_values) == ("COMPLETE", 0.25, {0: 3.0, 1: 4.0})
            assert len(told.execution_ids) == 2
            assert study.ask().params != trial.params
        assert next(each.id for each in ours.Study(ctx).trials) == trial.id


def test_a_study_whose_session_moves_goes_on(tmp_path: Path, served: ServedDatabase) -> None:
    with Context("s") as ctx:
        ctx.define("x", 0.5, constraints={"min": 0, "max": 1})
        with ours.Study(ctx, ["x"]) as study:
            done, trial = study.ask(), study.ask()
            study.tell(done, 1.0)
            for place in (tmp_path / "moved.db", served.url):
                ctx.move_to(place)
                assert [each.id for each in study.trials] == [done.id, trial.id]
                assert states_of(study) == ["COMPLETE", "RUNNING"]
                trial.report(1.0, len(trial.user_attrs))
                trial.set_user_attr(f"note {place}", True)
            assert study.tell(trial, 0.5).state.name == "COMPLETE"
            study.apply_best()
        assert ctx["x"] == trial["x"]


def test_the_command_line_shows_a_trial(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with Context("s", path) as ctx:
        ctx.define("x", 0.5, constraints={"min": 0, "max": 1})
        with ours.Study(ctx, ["x"], name="shown") as study:
            study.optimize(lambda _: 0.25, n_trials=1)
            (trial,) = study.trials
    argv = [sys.executable, "-m", "dspex_persist", "audit", "show", "--db", str(path), trial.execution_ids[0]]
    shown = subprocess.run(
        argv, check=True, capture_output=True, text=True, env={**os.environ, **environment(), "COLUMNS": "200"}
    ).stdout
    assert 'trial: {"number": 0, "state": "complete", "values": [0.25]}' in shown
    assert "study = shown" in shown
