"""LM calls of tools in the journal, as a server keeps them for an old client; and a server without DSPy."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspex_persist.extras import how_to_install
from dspex_persist.infra.process import ServerProcess
from tests.deadline import within
from tests.end_to_end.keys import SECRET
from tests.end_to_end.old_style import Entry, Journal, OldClient, environment, serve, target_of

TOOLS = ("--tools", "tests.end_to_end.lm_tools")


@pytest.fixture(scope="module", params=["0", pytest.param("1", marks=pytest.mark.thorough)])
def workers(request: pytest.FixtureRequest) -> str:
    """How many workers run the tools. Each of them imports DSPy, which takes seconds."""
    return str(request.param)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, workers: str) -> Path:
    return tmp_path_factory.mktemp(f"lm{workers}") / "sessions.db"


@pytest.fixture(scope="module")
def server(path: Path, workers: str) -> Iterator[ServerProcess]:
    with serve(path, *TOOLS, "--workers", workers, "--limit", "journal_size_bytes=64KiB") as process:
        yield process


def calls_of(entry: Entry) -> list[dict[str, Any]]:
    return sorted(entry.ended["recorded"].get("lm", []), key=lambda call: call["ordinal"])


def answers_of(entry: Entry) -> list[str]:
    return [call["response"]["outputs"][0].split("\n")[1] for call in calls_of(entry)]


def question_of(call: dict[str, Any]) -> str:
    return str(call["request"]["messages"][-1]["content"].split("\n")[1])


def test_a_call_is_in_the_journal_and_the_key_is_nowhere_in_the_file(
    client: OldClient, journal: Journal, path: Path
) -> None:
    done = client.execute("remember", question="Which colour?", name="a")
    assert (done.result, client.get("a")) == ("blue", 4)
    entry = journal.of_id(done.execution_id)
    (call,) = calls_of(entry)
    assert entry.ended["recorded"]["now"] == []
    assert (call["ordinal"], call["model"], question_of(call)) == (0, "dummy", "Which colour?")
    assert call["request"]["options"] == {"temperature": 0.3, "max_tokens": 1000}
    assert answers_of(entry) == ["blue"]
    assert call["response"]["usage"]["dummy"]["total_tokens"] == 0
    assert call["concurrent"] is False
    assert (call["at"] > 0, call["latency_us"] > 0, call["cached"], "cost" in call) == (True, True, False, False)
    assert len(call["hash"]) == 64
    for file in (path, Path(f"{path}-wal")):
        assert SECRET.encode() not in file.read_bytes()


@pytest.mark.parametrize(
    ("tool", "parameters", "answers"),
    [
        ("remember_later", {"question": "x"}, ["green"]),
        ("each", {"questions": ["a", "b"]}, ["a", "b"]),
        ("each_later", {"questions": ["a", "b"]}, ["a", "b"]),
    ],
)
def test_all_kinds_of_code_are_recorded(
    client: OldClient, journal: Journal, tool: str, parameters: dict[str, Any], answers: list[str]
) -> None:
    done = client.execute(tool, **parameters)
    assert done.success, done.error
    entry = journal.of_id(done.execution_id)
    assert answers_of(entry) == answers
    assert [call["concurrent"] for call in calls_of(entry)] == [False] * len(answers)


def test_threads_that_dspy_starts_are_recorded(client: OldClient, journal: Journal) -> None:
    done = client.execute("in_threads", questions=["a", "b", "c"])
    assert done.result == 3
    calls = calls_of(journal.of_id(done.execution_id))
    assert [call["ordinal"] for call in calls] == [0, 1, 2]
    assert {question_of(call) for call in calls} == {"a", "b", "c"}
    assert [call["concurrent"] for call in calls] == [True] * 3


def test_a_called_tool_records_into_its_own_execution(client: OldClient, journal: Journal) -> None:
    done = client.execute("delegate", question="x")
    assert done.result == "one red two"
    parent, child = journal.of_session(client.session)
    assert answers_of(parent) == ["one", "two"]
    assert answers_of(child) == ["red"]
    assert [call["ordinal"] for call in calls_of(child)] == [0]


def test_a_failed_call_is_recorded_without_the_key(client: OldClient, journal: Journal) -> None:
    failed = client.execute("fail")
    entry = journal.of_id(failed.execution_id)
    (call,) = calls_of(entry)
    assert call["error"]["type"].startswith("dspy.")
    assert call["error"]["type"].endswith(entry.ended["failure"]["type"])
    assert "127.0.0.1:9" not in str(call["request"])
    assert SECRET not in str(call)


def test_recorded_calls_count_towards_the_limit_of_the_journal(client: OldClient) -> None:
    failed = client.execute("chatter", size=70_000)
    assert "journal_size_bytes" in failed.error


def test_other_tools_are_recorded_if_the_server_says_so(
    client: OldClient, journal: Journal, workers: str, tmp_path: Path
) -> None:
    assert calls_of(journal.of_id(client.execute("ask", question="x").execution_id)) == []
    other = tmp_path / "sessions.db"
    with serve(other, *TOOLS, "--workers", workers, "--record-lm") as server:
        caller = OldClient(target_of(server), "s")
        done = caller.execute("ask", question="x")
        caller.close()
    assert answers_of(Journal(other).of_id(done.execution_id)) == ["red"]


# --- Without DSPy ---


@pytest.fixture
def no_dspy(tmp_path: Path) -> dict[str, str]:
    """The environment of a process without DSPy, in which importing it fails."""
    folder = tmp_path / "no" / "dspy"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'dspy'\", name='dspy')")
    variables = environment()
    return variables | {"PYTHONPATH": f"{folder.parent}:{variables['PYTHONPATH']}"}


def run(no_dspy: dict[str, str], cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=no_dspy,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=within(60),
        check=False,
    )


def test_a_server_needs_no_dspy(no_dspy: dict[str, str], tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "dspex_persist", "serve", "--db", "s.db", "--listen", "127.0.0.1:0"]
    with ServerProcess.start([*argv, "--tools", "tests.end_to_end.served_tools"], env=no_dspy, cwd=tmp_path) as server:
        caller = OldClient(target_of(server), "s")
        assert caller.execute("add", name="a", amount=2).result == 2
        caller.close()


def test_without_dspy_nothing_can_be_recorded(no_dspy: dict[str, str], tmp_path: Path) -> None:
    arguments = ("-m", "dspex_persist", "serve", "--tools", "tests.end_to_end.served_tools", "--record-lm")
    refused = run(no_dspy, tmp_path, *arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: setting record_lm")
    assert how_to_install("dspy") in refused.stderr
    (tmp_path / "shop.py").write_text(
        "from dspex_persist import tool\n\n@tool(record_lm=True)\ndef ask() -> None:\n    '''Ask.'''\n"
    )
    refused = run(no_dspy, tmp_path, "-m", "dspex_persist", "tools", "list", "--tools", "shop")
    assert refused.returncode == 2
    assert "shop.ask cannot be a tool: record_lm" in refused.stderr
    assert how_to_install("dspy") in refused.stderr
