"""DSPy programs across processes: saved in one, loaded in another; commands without DSPy; no secret anywhere."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspex_persist import Context, open_audit
from dspex_persist.cli import completing
from dspex_persist.extras import how_to_install
from dspex_persist.infra.process import ServerProcess
from dspex_persist.replay import replay
from dspex_persist.state.errors import ToolFailedError
from dspex_persist.wiring.connecting import connect
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment, serve, target_of
from tests.end_to_end.programs import programs_of
from tests.end_to_end.test_live_commands import Result, fine, run  # noqa: F401 -- a fixture
from tests.late import Late
from tests.logs import capture_logs

dspy, made, ours = Late("dspy"), Late("tests.programs"), Late("dspex_persist.dspy")
SECRET = "sk-planted-9f8e7d6c5b4a"

# Loads every program in a process of its own, and prints what an LM receives.
LOADING = """
import json, sys
import dspy
from dspex_persist import Context
from tests.programs import Answering, Typed, agent, requests_of

makers = {"nested": Answering, "agent": agent, "typed": lambda: dspy.Predict(Typed)}
with Context("s", sys.argv[1], create=False) as ctx:
    inputs = json.loads(sys.argv[2])
    programs = {name: ctx.programs.load(name, make, "production") for name, make in makers.items()}
print(json.dumps({name: requests_of(program, **inputs[name]) for name, program in programs.items()}))
"""
INPUTS = {"nested": {"question": "q"}, "agent": {"question": "q"}, "typed": {"kind": "a"}}


def python(*arguments: str, **variables: str) -> Any:
    """Run Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=within(120),
        check=False,
    )


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    frozen = made.tuned(made.Answering())
    frozen.generate._compiled = True
    return {"nested": frozen, "agent": made.tuned(made.agent()), "typed": made.typed()}


def test_a_program_survives_a_restart(saved: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    with Context("s", path) as ctx:
        for name, program in saved.items():
            ctx.programs.save(name, program, tag="production")
            ctx.programs.save(name, dspy.Predict("question -> answer"))
    done = python("-c", LOADING, str(path), json.dumps(INPUTS))
    assert done.returncode == 0, done.stderr
    expected = {name: made.requests_of(program, **INPUTS[name]) for name, program in saved.items()}
    assert json.loads(done.stdout) == json.loads(json.dumps(expected))


# Secrets


def test_a_planted_secret_is_nowhere(tmp_path: Path, run: Callable[..., Result]) -> None:  # noqa: F811
    path, export = tmp_path / "sessions.db", tmp_path / "export.jsonl"
    lm = dspy.LM("openai/m", api_key=SECRET, api_base=f"https://{SECRET}.example", headers={"Authorization": SECRET})
    addressed = dspy.LM(f"huggingface/https://user:{SECRET}@example.org/m")
    program = made.Answering()
    program.set_lm(lm)
    program.generate.predict.lm = addressed
    program.judge.config |= {"api_key": SECRET, "extra_headers": {"x": SECRET}, "base_url": SECRET, "user": SECRET}
    program.judge.config["tools"] = [{"type": "mcp", "name": "x", "headers": {"Authorization": SECRET}}]
    shown = []
    with capture_logs() as logs, Context("s", path) as ctx:
        ctx.programs.save("p", program, lms={"main": lm})
        ctx.programs.save("p", program)
        shown += [str(ctx.programs.diff("p")), ctx.programs.history("p")._repr_html_(), repr(ctx.programs.list())]
        with pytest.raises(ours.ProgramMismatchError) as raised:
            ctx.programs.load("p", made.Answering)
        files = [each.read_bytes() for each in tmp_path.iterdir()]
    assert len(files) >= 3
    commands = (
        ("session", "export", "s", "-o", str(export)),
        *(("program", each, "s", "p", "--json") for each in ("show", "history", "diff")),
        ("audit", "history", "s", "--json"),
    )
    shown += [fine(run(*command, "--db", str(path))) for command in commands]
    texts = [*shown, export.read_text(), str(raised.value), repr(logs)]
    assert [each for each in texts if SECRET in each] == []
    assert not any(SECRET.encode() in each for each in (*files, path.read_bytes()))


# Calls in the journal, and replays of them


@pytest.mark.parametrize("kind", ["file", "server"])
def test_a_call_is_one_execution_with_its_lm_calls(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"

    def use(place: Any) -> None:
        with Context("s", place) as ctx:
            ctx["temperature"] = 0.25
            ctx.programs.save("qa", ours.bind(made.Answering(), ctx, temperature="temperature"))
            with dspy.context(lm=made.lm_on(made.Asked())):
                ctx.programs.execute("qa", {"question": "q"}, into=made.Answering, record_lm=True, reason="a question")

    if kind == "file":
        use(path)
    else:
        with serve(path) as server:
            use(f"grpc://{target_of(server)}")
    with open_audit(path) as source:
        (summary,) = source.iterate(ours_query())
        detail = source.execution(summary.execution_id)
    calls = detail.recorded["lm"]
    assert [call["request"]["options"]["temperature"] for call in calls] == [0.25] * 5
    assert {tuple(call["variables"].items()) for call in calls} == {(("temperature", 0),)}
    read = {each.name for each in detail.all_reads()}
    assert read >= {"programs/qa", "temperature"}
    if kind == "file":
        assert summary.tool == "programs/qa"
        assert json.loads(detail.parameters["inputs"].json) == {"question": "q"}
        assert json.loads(detail.result.json) == {"score": 1.5}  # type: ignore[union-attr]
    else:
        assert (summary.tool, detail.metadata["tool"]) == ("transaction", "programs/qa")


@pytest.fixture(scope="module", params=["0", pytest.param("1", marks=pytest.mark.thorough)])
def running(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    """A server that has a program as a tool, and runs it itself or in a worker: its address, and its file."""
    path = tmp_path_factory.mktemp("running") / "sessions.db"
    with serve(path, "--tools", "tests.end_to_end.program_tools", "--workers", request.param) as server:
        yield f"grpc://{target_of(server)}", path


def test_a_server_runs_a_program_for_clients(running: tuple[str, Path]) -> None:
    url, path = running
    with Context("support", url) as ctx:
        ctx.programs.save("answer", predictor("Answer.", temperature=0.5), tag="production")
        assert ctx.call("programs/answer", inputs={"question": "q"}) == {"answer": "by the server"}
        # The server's tool goes before one of this process.
        found = ctx.programs.execute("answer", {"question": "q"}, into=lambda: predictor(""), version="production")
        assert found.answer == "by the server"
        with pytest.raises(ToolFailedError, match=r"ProgramNotFoundError: .* there is no tag 'x'"):
            ctx.call("programs/answer", inputs={"question": "q"}, version="x")
    with open_audit(path) as source:
        failed, *summaries = source.iterate(ours_query())
        calls = [source.execution(each.execution_id).recorded["lm"][0] for each in summaries]
    assert [each.tool for each in (failed, *summaries)] == ["programs/answer"] * 3
    assert [call["request"]["options"]["temperature"] for call in calls] == [0.5, 0.5]


def ours_query() -> Any:
    from dspex_persist.audit import ExecutionQuery

    return ExecutionQuery()


def test_a_call_can_be_replayed_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(tmp_path / "sessions.db") as state, Context("s", state) as ctx:
        ctx.programs.save("qa", made.tuned(made.Answering()))
        ctx.programs.save("dated", made.dated())
        inputs = {name: made.typed_values()[name] for name in ("event", "image")}
        with dspy.context(lm=made.lm_on(made.Asked())):
            ctx.programs.execute("qa", {"question": "q"}, into=made.Answering, record_lm=True)
        with dspy.context(lm=made.lm_on(made.Asked("[[ ## day ## ]]\n2026-02-28"))):
            ctx.programs.execute("dated", inputs, into=made.dated, record_lm=True, version=0)
        recording = state.record("s")
        monkeypatch.setattr(made.Asked, "complete", None)
        report = replay(recording, [ours.program_tool("qa", made.Answering), ours.program_tool("dated", made.dated)])
    assert report.ok, report.describe()
    assert len(report.executions) == 2


# The commands


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serve(tmp_path_factory.mktemp("served") / "sessions.db") as started:
        yield started


@pytest.fixture(params=["server", "file", "file in use"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    """The options that name a server, or a file that has programs."""
    path, url = tmp_path / "sessions.db", ""
    if request.param == "server":
        url = target_of(request.getfixturevalue("server"))
    with Context("support", f"grpc://{url}" if url else path) as ctx:
        ctx.programs.save("answer", predictor("Answer.\nPolitely."), reason="as written", actor="user:ann")
        ctx.programs.save("answer", predictor("Answer.\nBriefly.", temperature=0.5), tag="production")
        if request.param == "file in use":
            yield ["--db", str(path)]
    if request.param != "file in use":
        yield ["--target", url] if url else ["--db", str(path)]
    if url:
        with Context("support", f"grpc://{url}") as ctx:
            ctx.end()


def predictor(instructions: str, **config: Any) -> Any:
    program = dspy.Predict("question -> answer", **config)
    program.signature = program.signature.with_instructions(instructions)
    program.demos = [dspy.Example(question="q", answer="a")]
    return program


def test_programs_are_listed_shown_and_compared(place: list[str], run: Callable[..., Result]) -> None:  # noqa: F811
    assert re.search(
        r"answer +1 +production: 1 +dspy\.Predict +1 +3\.", fine(run("program", "list", "support", *place))
    )
    history = fine(run("program", "history", "support", "answer", *place)).splitlines()
    assert re.fullmatch(r"1 .* set +production +1 *", history[2])
    assert re.fullmatch(r"0 .* user:ann +registered +1 +as written", history[3])
    shown = fine(run("program", "show", "support", "answer", "production", *place))
    assert shown.splitlines()[0] == f"answer, version 1 [production]: dspy.Predict, DSPy {version('dspy-ai')}"
    assert '    Briefly.\n  config: temperature=0.5\n  1 demo\n    question="q", answer="a"\n' in shown
    diff = fine(run("program", "diff", "support", "answer", "0", *place))
    assert diff == (
        "program 'answer': version 0 -> 1\nself\n  instructions\n    @@ -1,2 +1,2 @@\n     Answer.\n    -Politely.\n"
        "    +Briefly.\n  config temperature: 0.5 (new)\n"
    )
    report = json.loads(fine(run("program", "diff", "support", "answer", "--json", *place)))
    assert (report["ok"], report["predictors"][0]["changes"]) == (
        True,
        [{"what": "config temperature", "before": None, "after": 0.5}],
    )
    document = json.loads(fine(run("program", "show", "support", "answer", "0", "--json", *place)))
    assert document["program"]["predictors"]["self"]["signature"]["instructions"] == "Answer.\nPolitely."
    (listed,) = json.loads(fine(run("program", "list", "support", "--json", *place)))["programs"]
    assert (listed["name"], listed["version"], listed["tags"]) == ("answer", 1, {"production": 1})
    for words, sentence in (
        (("show", "support", "answr"), "there is no such program; did you mean 'answer'?"),
        (("show", "support", "answer", "prod"), "there is no tag 'prod'; its tags: production (1)"),
        (("diff", "support", "answer", "7"), "there is no version 7; they are 0 to 1"),
        (("list", "suport"), "did you mean 'support'?"),
    ):
        done = run("program", *words, *place)
        assert (done.returncode, done.stdout) == (1, "")
        assert sentence in done.stderr


def test_programs_are_tagged_and_rolled_back(place: list[str], run: Callable[..., Result]) -> None:  # noqa: F811
    assert fine(run("program", "tag", "support", "answer", *place)) == "production: 1\n"
    done = run("program", "rollback", "support", "answer", "0", "--why", "rude", "--actor", "user:bob", *place)
    if done.returncode == 4:
        # Another process has the file; that can only be read.
        assert "--target" in done.stderr
        assert run("program", "tag", "support", "answer", "x", *place).returncode == 4
        return
    assert fine(done) == "answer is as in 0 (v2)\n"
    (newest, *_) = json.loads(fine(run("program", "history", "support", "answer", "--json", *place)))["versions"]
    assert (newest["reason"], newest["actor"], newest["tags"]) == ("rude", "user:bob", [])
    assert fine(run("program", "tag", "support", "answer", "polite", *place)) == "polite: 2, production: 1\n"
    assert fine(run("program", "tag", "support", "answer", "production", "polite", *place)) == (
        "polite: 2, production: 2\n"
    )
    assert fine(run("program", "tag", "support", "answer", "polite", "--remove", *place)) == "production: 2\n"
    assert run("program", "tag", "support", "answer", "--remove", *place).returncode == 2
    assert "a tag is a letter" in run("program", "tag", "support", "answer", "1x", *place).stderr


def test_names_are_completed(place: list[str]) -> None:
    option, where = place
    options = {"db": where} if option == "--db" else {"target": where}
    typed: Any = SimpleNamespace(params={"session": "support", **options})
    assert (completing.programs(typed, "an"), completing.programs(typed, "x")) == (["answer"], [])


def test_the_commands_need_no_dspy(tmp_path: Path) -> None:
    with Context("support", tmp_path / "sessions.db") as ctx:
        ctx.programs.save("answer", predictor("Answer."), tag="production")
    without = tmp_path / "without"
    without.mkdir()
    (without / "dspy.py").write_text("raise ModuleNotFoundError(\"No module named 'dspy'\", name='dspy')\n")
    path = f"{without}{os.pathsep}{ROOT}"
    for command in (("show", "support", "answer", "production"), ("rollback", "support", "answer", "0")):
        done = python(
            "-m", "dspex_persist", "program", *command, "--db", str(tmp_path / "sessions.db"), PYTHONPATH=path
        )
        assert (done.returncode, done.stderr) == (0, "")
    done = python("-c", "import dspex_persist as d; d.Context('s').programs", PYTHONPATH=path)
    assert how_to_install("dspy") in done.stderr


def test_sensitive_programs_are_masked(tmp_path: Path, run: Callable[..., Result]) -> None:  # noqa: F811
    with Context("support", tmp_path / "sessions.db") as ctx:
        ctx.programs.save("answer", predictor("Answer."))
        ctx.set("programs/answer", ctx["programs/answer"], metadata={"sensitive": "true"})
    assert "add --reveal" in run("program", "show", "support", "answer").stderr
    assert "Answer." in fine(run("program", "show", "support", "answer", "--reveal"))
    assert fine(run("program", "list", "support")) == "no programs\n"


# The pages


def test_the_program_of_the_page(tmp_path: Path) -> None:
    (whole,) = [each for each in programs_of("docs/programs.md") if "Context(" in each.text and each.output]
    (tmp_path / "page.py").write_text(whole.text)
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=within(120),
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, whole.output), done.stderr
