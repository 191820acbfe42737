"""The order of commits in the file explains everything that executions on one session see."""

import asyncio
import os
import secrets
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from dspex_persist.infra.process import ServerProcess
from tests.concurrency.observations import Action, Observation, View, check
from tests.faults.bridge import Bridge
from tests.faults.crash_test import server_argv

SESSION = "observed"
CLIENTS, EXECUTIONS = 12, int(os.environ.get("EXECUTIONS_EACH", "40"))
_STEADY, _COMING = ("a", "b", "c"), ("x", "y")
_WORDS = ("get", "get", "set", "set", "list", "history", "define", "delete")
_PAUSES_S = (0.0, 0.001, 0.004)


def observations(database: Path, seed: int, bug: str | None = None) -> list[Observation]:
    """Return the observations of the committed executions, half of which have snapshot isolation."""
    with ServerProcess.start(server_argv(database, bug), ready_timeout_s=60) as process:
        observed = asyncio.run(_observe(process.port, seed))
        assert process.terminate(30) == 0
    return observed


async def _observe(port: int, seed: int) -> list[Observation]:
    observed: list[Observation] = []
    async with Bridge(port) as bridge:
        await bridge.begin(SESSION)
        for name in _STEADY:
            await bridge.register(SESSION, name, "string", "", {})
        await asyncio.gather(*(_client(bridge, observed, number, seed) for number in range(CLIENTS)))
    return observed


async def _client(bridge: Bridge, observed: list[Observation], number: int, seed: int) -> None:
    random = Random(f"{seed}/{number}")
    for count in range(EXECUTIONS):
        serializable = random.random() < 0.5
        actions = [_draw(random, f"{number}-{count}-{place}") for place in range(random.randint(2, 5))]
        arguments = {"actions": actions, "pause_s": random.choice(_PAUSES_S)}
        after = max((each.sequence for each in observed), default=0)
        answer = await bridge.execute(SESSION, "observe" if serializable else "observe_on_snapshot", arguments)
        if answer.code:
            assert answer.code == "CONFLICT", answer
            continue
        seen = tuple(Action(*each, found) for each, found in zip(actions, answer.result, strict=True))
        observed.append(Observation(*answer.commit, seen, serializable, after))


def _draw(random: Random, text: str) -> list[str]:
    word = random.choice(_WORDS)
    if word == "list":
        return [word, "", ""]
    # All clients read the permanent variables; the others come and go.
    coming = word in ("define", "delete") or random.random() < (0.5 if word == "history" else 0.2)
    return [word, random.choice(_COMING if coming else _STEADY), text]


@pytest.mark.slow
@pytest.mark.timeout(300 + EXECUTIONS)
def test_the_commits_explain_all_observations(tmp_path: Path) -> None:
    seed, database = secrets.randbelow(1_000_000), tmp_path / "served.db"
    observed = observations(database, seed)
    counts = Counter((action.word, action.found is not None) for each in observed for action in each.actions)
    print(f"seed {seed}: {len(observed)} executions, {counts}")
    assert list(check(database, SESSION, observed)) == [], f"seed {seed}"
    # Enough executions committed, and every action met existing and missing variables.
    assert len(observed) > CLIENTS * EXECUTIONS / 4
    assert min(counts[word, found] for word in ("get", "set", "delete") for found in (True, False)) > 0, counts
    assert min(counts[word, True] for word in ("list", "history", "define")) > 0, counts


def test_each_action_sees_the_ones_before_it() -> None:
    """Only the view; planted bugs test the rest of the checker."""
    view = View({"a": ((0, '""'), (1, '"one"'))})
    assert view.expect(Action("get", "a", "", None)) == [1, '"one"']
    assert view.expect(Action("set", "a", "two", None)) == 2
    assert view.expect(Action("history", "a", "", None)) == [[2, '"two"'], [1, '"one"'], [0, '""']]
    assert view.expect(Action("delete", "a", "", None)) is True
    assert view.expect(Action("get", "a", "", None)) is None
    assert view.expect(Action("define", "a", "new", None)) == [0, '"new"']
    assert view.expect(Action("list", "", "", None)) == [["a", 0, '"new"']]
