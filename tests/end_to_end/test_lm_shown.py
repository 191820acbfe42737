"""LM calls for people: `dspex-persist audit show --lm`, comparisons and usage."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dspex_persist import cli
from tests import asked

Ask = Callable[..., str]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asked") / "sessions.db"
    asked.tell(path).close()
    return path


@pytest.fixture
def ask(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """`dspex-persist audit ...` in this process; returns what it prints."""

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys, "argv", ["dspex-persist", "audit", *arguments, "--db", str(path)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert ended.value.code == code, captured
        return captured.out if code == 0 else captured.err

    return run


def executions(ask: Ask, tool: str) -> list[str]:
    rows = map(json.loads, ask("executions", asked.SESSION, "--tool", tool, "--top", "--json").splitlines())
    return [row["execution_id"] for row in rows]


def test_the_calls_of_an_execution(ask: Ask) -> None:
    execution = executions(ask, "ask")[0]
    lines = [line.rstrip() for line in ask("show", execution, "--lm").splitlines()]
    assert lines[0].startswith(f"ask  {execution}  committed")
    assert lines[1] == "3 LM calls, 1 failed, 1 from the cache, 100 tokens in, 10 out, $0.001, 750.0 ms"
    assert "call 0  openai/gpt-4o-mini  generate.predict  100 tokens in, 10 out  $0.0005  250.0 ms" in lines
    assert "call 2  openai/gpt-4o-mini  generate.predict  $0.00  250.0 ms  from the cache" in lines
    assert "  options: temperature = 0.3" in lines
    assert "  variables: prompt v0" in lines
    after = lines[lines.index("  user") :]
    assert after[:5] == ["  user", "    The key:", "        •••; the pin is •••.", "  answer", "    It is •••."]
    assert "    dspy.utils.exceptions.LMTransportError: no route" in lines
    assert str(asked.PIN) in ask("show", execution, "--lm", "--reveal")


def test_the_calls_of_what_it_called_follow(ask: Ask) -> None:
    (execution,) = executions(ask, "ask_twice")
    text = ask("show", execution, "--lm")
    assert text.index("Which size?") < text.index("\nask  exec_") < text.index("Again!")
    rows = [json.loads(line) for line in ask("show", execution, "--lm", "--json").splitlines()]
    assert [(row["tool"], row["model"], row["messages"][1]["text"]) for row in rows] == [
        ("ask_twice", "anthropic/claude", "Which size?"),
        ("ask", "openai/gpt-4o-mini", "Which size? Again!"),
    ]
    assert rows[0]["at"] == "2026-03-01T12:00:00+00:00"
    assert len(ask("show", execution, "--lm", "--csv").splitlines()) == 3


def test_long_texts_are_shortened_unless_asked_for(ask: Ask) -> None:
    execution = executions(ask, "ask")[-1]
    assert "x" * 20 not in ask("show", execution, "--lm")
    assert "(513 more characters: --full)" in " ".join(ask("show", execution, "--lm").split())
    assert "--full)" not in ask("show", execution, "--lm", "--full")


def test_show_says_that_there_are_calls(ask: Ask) -> None:
    assert "1 LM call, 100 tokens in, 10 out, $0.0005, 250.0 ms: --lm shows them" in ask(
        "show", executions(ask, "ask")[1]
    )


# Usage


def test_usage_as_a_table_and_for_programs(ask: Ask) -> None:
    lines = [line.split() for line in ask("usage", "--by", "tool,day", asked.SESSION).splitlines()]
    assert lines[0] == [
        "day",
        "tool",
        "executions",
        "calls",
        "failed",
        "cached",
        *["tokens", "in", "tokens", "out"],
        "cost",
        "took",
    ]
    assert lines[2] == ["2026-03-01", "ask", "3", "5", "1", "1", "300", "30", "$0.002", "1.2", "s"]
    (row,) = map(json.loads, ask("usage", "--model", "anth*", "--json").splitlines())
    assert (row["model"], row["calls"], row["cost"], row["day"]) == ("anthropic/claude", 1, 0.0005, None)
    assert ask("usage", "--csv").splitlines()[1] == ",,openai/gpt-4o-mini,,3,5,1,1,300,30,330,0.002,5,1250000"


def test_usage_of_nothing_and_a_mistake(ask: Ask) -> None:
    assert ask("usage", "--model", "other").splitlines()[-1] == "no LM calls are recorded"
    assert "invalid --by: calls are not summed by 'modle'; did you mean 'model'?" in ask(
        "usage", "--by", "modle", code=2
    )
    assert "did you mean 'ask'" in ask("usage", "--tool", "akk", code=1)


# Comparisons


def test_two_executions_side_by_side(ask: Ask) -> None:
    newest, *_, oldest = executions(ask, "ask")
    lines = [line.rstrip() for line in ask("compare", oldest, newest).splitlines()]
    assert lines[0].startswith(f"- {oldest}  ask  committed")
    assert lines[1].startswith(f"+ {newest}  ask  committed")
    assert lines[3] == "call 0  ask  generate.predict"
    assert "  tokens in          100         100" in lines
    assert lines[lines.index("  answer") :][:3] == ["  answer", "    - blue", "    + It is •••."]
    assert "call 1 of ask, only after" in lines
    assert "  system" not in lines[: lines.index("  answer")], "the system prompt is the same"
    assert "      Be brief." in ask("compare", oldest, newest, "--full")
    (pair, *_) = map(json.loads, ask("compare", oldest, newest, "--json").splitlines())
    assert (pair["before"]["execution_id"], pair["after"]["execution_id"]) == (oldest, newest)
    assert pair["parts"][-1] == {"name": "answer", "rows": [{"before": "blue", "after": "It is •••."}]}
    assert ask("compare", oldest, oldest).splitlines()[-1] == "  the same request and the same answer"


def test_two_versions_of_a_prompt(ask: Ask) -> None:
    lines = ask("compare", "0", "v1", "--prompt", asked.SESSION, "prompt").splitlines()
    assert lines[0] == "prompt of session asks"
    assert lines[1].startswith("- version 0")
    assert lines[3:] == ["- Answer in one word.", "+ Answer in two words.", "  Be brief."]
    (row,) = map(json.loads, ask("compare", "0", "1", "--prompt", asked.SESSION, "prompt", "--json").splitlines())
    assert row["rows"][0] == {"before": "Answer in one word.", "after": "Answer in two words."}
    assert "its values are masked: •••" in ask("compare", "0", "0", "--prompt", asked.SESSION, "key")
    assert "'x' is not the number of a version" in ask("compare", "x", "1", "--prompt", asked.SESSION, "prompt", code=2)
    assert "no variable 'p*'" in ask("compare", "0", "1", "--prompt", asked.SESSION, "p*", code=1)
