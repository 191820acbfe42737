"""dspex-persist demo: it shows what it promises, and would notice if it were not so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dspex_persist.cli.demo.scenes import WatchFaults, judge_watch, lost_writes
from dspex_persist.state.audit import ExecutionQuery
from dspex_persist.wiring.connecting import connect, open_audit
from tests.deadline import within

COUNTERS = ("counter_a", "counter_b", "counter_c", "counter_d")


def run_demo(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dspex_persist", "demo", *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=within(100),
        check=False,
    )


def cells(output: str, first: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    row = next(line for line in output.splitlines() if re.match(rf"[│|] *{first} ", line))
    return [cell.strip() for cell in re.split(r"[│|]", row)[1:-1]]


def test_the_demo_shows_what_it_promises_and_keeps_the_database(tmp_path: Path) -> None:
    # Settings of the user's own must not get in its way.
    result = run_demo(
        "--keep", "kept", cwd=tmp_path, DSPEX_PERSIST_DURABILITY="normal", DSPEX_PERSIST_LISTEN="0.0.0.0:1"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80

    for counter in COUNTERS:
        _, acknowledged, found, lost, repeated = cells(result.stdout, counter)
        assert int(acknowledged) >= 150
        assert int(found) in (int(acknowledged), int(acknowledged) + 1)
        assert lost == "0"
        assert repeated.startswith("was ")
    assert "refused: invalid value" in result.stdout
    assert "rolled_back" in result.stdout
    assert "kill -9" in result.stdout
    assert "All as promised" in result.stdout

    with connect(tmp_path / "kept" / "sessions.db") as state:
        for counter in COUNTERS:
            acknowledged = int(cells(result.stdout, counter)[1])
            # With the interrupted write, repeated, each counter is at the number of writes that were tried.
            assert state.get_value("demo", counter) == acknowledged + 1
        address = [state.get_value("demo", name) for name in ("street", "postcode", "town")]
        assert address == ["New Road 2", "2000", "Newton"]
        assert state.get_variable("demo", "town").version == 1
    with open_audit(tmp_path / "kept" / "sessions.db") as audit:
        executions = list(audit.iterate(ExecutionQuery(session="demo", newest_first=False)))
    assert [(each.status.value, each.writes) for each in executions] == [("interrupted", 0), ("committed", 3)]
    assert cells(result.stdout, "town") == ["town", "Newton", "Oldham"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_demo_that_fails_says_so(tmp_path: Path) -> None:
    (tmp_path / "sessions.db").write_bytes(b"another program's file")
    result = run_demo("--keep", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: the demo failed: ")
    assert "exists already" in result.stderr
    assert (tmp_path / "sessions.db").read_bytes() == b"another program's file"
    result = run_demo("--keep", str(tmp_path / "sessions.db" / "below"), cwd=tmp_path)
    assert (result.returncode, "cannot create the directory" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("stored", "lost"),
    [
        ({0: 0, 1: 1, 2: 2, 3: 3}, []),
        ({0: 0, 1: 1, 2: 2}, []),
        ({0: 0, 1: 1}, [2]),
        ({0: 0, 1: 2, 2: 2}, [1]),
        ({}, [1, 2]),
    ],
)
def test_lost_writes_are_noticed(stored: dict[int, int], lost: list[int]) -> None:
    assert lost_writes([(1, 1), (2, 2)], stored) == lost


@pytest.mark.parametrize(
    ("received", "faults"),
    [
        ([(4, "a", 1), (5, "b", 1), (7, "a", 2)], (0, 0, 0)),
        ([(4, "a", 1), (7, "a", 2)], (1, 0, 0)),
        ([(4, "a", 1), (5, "b", 1), (5, "b", 1), (7, "a", 2)], (0, 1, 1)),
        ([(5, "b", 1), (4, "a", 1), (7, "a", 2)], (0, 0, 1)),
        ([], (3, 0, 0)),
    ],
)
def test_faults_of_a_watch_are_noticed(received: list[tuple[int, str, int]], faults: tuple[int, int, int]) -> None:
    assert judge_watch(received, {"a": 2, "b": 1}) == WatchFaults(*faults)
