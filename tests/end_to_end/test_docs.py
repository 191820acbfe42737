"""The programs of the pages on tools, and the examples, run as a newcomer would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dspex_persist import BridgedState, Context, connect
from dspex_persist.infra.process import ServerProcess
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment, serve, target_of, tools_list
from tests.end_to_end.programs import Program, programs_of, run, run_prepared, run_python

PAGES = (
    "docs/context.md",
    "docs/variables.md",
    "docs/tools.md",
    "docs/tracing.md",
    "docs/transactions.md",
    "docs/backends.md",
    "docs/typed-state.md",
    "docs/watching.md",
    "docs/from-dspex.md",
)
PROGRAMS = [program for page in PAGES for program in programs_of(page)]
WORKERS = [program for program in PROGRAMS if "BridgeServiceServicer" in program.text]
EXAMPLES = ROOT / "examples"
DSPY = """
import dspy
from dspy.lm15 import Message, Response, TextPart, Usage

import dspex_persist
import dspex_persist.cognitive.dspy


class Engine:
    def complete(self, request):
        text = "[[ ## urgent ## ]]\\nTrue\\n\\n[[ ## completed ## ]]"
        usage = Usage(input_tokens=1, output_tokens=1, total_tokens=2)
        answer = Message.assistant([TextPart(text)])
        return Response(id=None, model="m", message=answer, finish_reason="stop", usage=usage)


ask_a_model = dspy.LM
dspy.LM = lambda model, **options: ask_a_model(model, engine=Engine(), cache=False, **options)
import triage

tools = dspex_persist.Toolbox()
tools.add(triage.triage)
with dspex_persist.connect("dspy.db", tools=tools) as state:
    session = dspex_persist.Context("s", state)
    session.define("temperature", 0.3)
    session.define("urgent_count", 0)
    print(session.call("triage", message="Fire!"), session["urgent_count"])
    _, commits = state.record("s")
    ends = [event.body for commit in commits for event in commit.events if "recorded" in event.body]
print(len(ends[0]["recorded"]["lm"]))


def run_the_program():
    with dspy.context(lm=dspy.LM("openai/gpt-4o-mini", temperature=0.3)):
        triage.classify(message="Fire!")


"""


@pytest.mark.parametrize("program", [each for each in PROGRAMS if each.is_whole and each not in WORKERS], ids=str)
def test_a_program_prints_what_its_page_says(program: Program, tmp_path: Path) -> None:
    assert program.output, "the page does not say what it prints"
    assert run_prepared(["-c", program.text], tmp_path) == program.output


@pytest.mark.parametrize("program", [each for each in PROGRAMS if not each.is_whole], ids=str)
def test_a_part_of_a_program_has_tools_that_can_be_defined(program: Program, tmp_path: Path) -> None:
    run_prepared(["-c", f"from dspex_persist import ToolContext, tool\n{program.text}"], tmp_path)


def test_the_worker_is_part_of_the_transaction(tmp_path: Path) -> None:
    (worker,) = WORKERS
    with serve(tmp_path / "sessions.db") as server, BridgedState(target_of(server)) as state:
        shop = Context("shop", state)
        shop.define("stock", 1)
        argv = [sys.executable, "-c", worker.text, target_of(server), "shop"]
        with ServerProcess.start(argv, env=environment(), cwd=tmp_path):
            assert shop.call("restock", amount=4) == 5
            outcome = state.execute_tool("shop", "restock", {"amount": "many"})
            assert outcome.error_code == "TOOL_FAILED"
        (newest, _) = shop.history("stock")
        assert newest.value is not None
        assert newest.value == 5
        assert newest.cause.startswith("exec_")


def test_the_example_shop(tmp_path: Path) -> None:
    lines = run_python([str(EXAMPLES / "shop.py")], tmp_path).splitlines()
    assert lines[1:4] == [
        "bread for 10",
        "order: {'apples': 'sold for 3', 'milk': \"invalid value for 'milk': value -89 is below minimum 0\"}",
        "apples now: 14",
    ]
    (once, again) = [line for line in lines if line.startswith("count")]
    assert once.startswith("count_once: conflict: meanwhile others changed milk")
    assert once.endswith("(attempts: 1)")
    assert again == "count: 30 (attempts: 2)"
    assert list(tmp_path.iterdir()) == []
    # On an existing file it continues.
    first, second = (run_prepared([str(EXAMPLES / "shop.py"), "shop.db"], tmp_path) for _ in range(2))
    assert "apples now: 14" in first
    assert "apples now: 18" in second


def test_the_example_client_at_a_server(tmp_path: Path) -> None:
    with serve(tmp_path / "sessions.db", "--tools", "examples.shop") as server:
        output = run_prepared([str(EXAMPLES / "call_shop.py"), target_of(server)], tmp_path)
    tools, bread, first, second, refused, *report = output.splitlines()
    assert tools.startswith("tools: ['open_shop', 'sell', ")
    assert bread == "bread for 5"
    assert first.endswith("repeated: False")
    assert second == first.replace("False", "True")
    assert "'cheese'" in refused.replace('"', "'")
    assert report[0] == "report: {'article': 'apples', 'there': 9, 'worth': 27}"
    assert len(report) == 3


def test_the_example_with_an_adapter(tmp_path: Path) -> None:
    assert run_prepared([str(EXAMPLES / "run_adapter.py")], tmp_path).splitlines() == [
        "closed",
        "{'left': 3, 'sold': 2}",
        "InvalidValueError: invalid value for 'stock': value -6 is below minimum 0",
        "3 left and 2 sold",
        "[2, 1, 0]",
    ]
    tools = ("--tools", "examples.run_adapter:tools")
    with serve(tmp_path / "sessions.db", *tools) as server, BridgedState(target_of(server)) as state:
        shop = Context("shop", state)
        shop.call("open_shop", stock=2)
        assert shop.call("sell") == {"left": 1, "sold": 1}


def test_the_example_with_a_compiled_program(tmp_path: Path) -> None:
    first, second = (run_python([str(EXAMPLES / "compiled_program.py"), "compiled.db"], tmp_path) for _ in range(2))
    # The optimizer prints lines of its own.
    _, _, *lines = first.splitlines()
    assert lines[:2] == ["saved versions 0 and 1", "program 'triage': version 0 -> 1"]
    assert lines[2:4] == ["decide.predict", "  1 demo added"]
    assert lines[5:] == [
        "2 ['production'] rolled_back: the second example misled it",
        "1 ['candidate'] set: two demos",
        "0 [] registered: one demo",
        "1 demo, urgent: True",
        "urgent: True",
    ]
    assert "saved versions 3 and 4" in second


def test_the_program_of_a_study_prints_what_its_page_says(tmp_path: Path) -> None:
    (program,) = [each for each in programs_of("docs/studies.md") if each.is_whole]
    assert "study.optimize" in program.text
    assert run(program.text, tmp_path) == program.output


def test_the_example_with_a_study(tmp_path: Path) -> None:
    before, done, style, reason = run_python([str(EXAMPLES / "study.py"), "study.db"], tmp_path).splitlines()
    assert before == "0 trials before"
    assert done.startswith("40 trials: ")
    assert style in ("style: plain", "style: lively")
    assert reason.startswith("study study, trial ")


def test_the_example_whose_temperature_another_process_turns(tmp_path: Path) -> None:
    def turn(server: ServerProcess, name: str, value: str) -> None:
        run_prepared(["-m", "dspex_persist", "set", "tuned", name, value, "--target", target_of(server)], tmp_path)

    shown = next(each for each in programs_of("docs/dspy.md") if "class Draft" in each.text)
    example = (EXAMPLES / "turned_program.py").read_text()
    assert all(line.strip() in example for line in shown.text.splitlines()[1:])
    with serve(tmp_path / "sessions.db") as server:
        command = [sys.executable, "-W", "ignore", str(EXAMPLES / "turned_program.py"), target_of(server)]
        with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as program:
            assert program.stdout is not None
            lines = [program.stdout.readline()]
            turn(server, "temperature", "0.9")
            lines.append(program.stdout.readline())
            turn(server, "done", "true")
            lines += program.stdout
            assert program.wait(within(30)) == 0
    assert lines == ["asked at 0.2, asked at 0.2\n", "asked at 0.9, asked at 0.9\n"]


def test_the_example_whose_module_type_another_process_changes(tmp_path: Path) -> None:
    def turn(name: str, value: str) -> None:
        with Context("retyped", f"grpc://{target_of(server)}") as ctx:
            ctx[name] = json.loads(value)

    with serve(tmp_path / "sessions.db") as server:
        command = [sys.executable, "-W", "ignore", str(EXAMPLES / "retyped_program.py"), target_of(server)]
        with subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as program:
            assert program.stdout is not None
            assert program.stderr is not None
            lines = [program.stdout.readline()]
            for name, count in (("ChainOfThought", 4), ("ReAct", 3), ("Predict", 2)):
                turn("strategy", json.dumps(name))
                lines += [program.stdout.readline() for _ in range(count)]
            turn("done", "true")
            assert program.wait(within(30)) == 0
            assert "this was not carried over: 1 demo of 'predict'" in program.stderr.read()
    assert "".join(lines) == CHANGES


CHANGES = """\
Predict: asked for answer
the module type has changed from 'Predict' to 'ChainOfThought' (strategy)
- 1 demo of 'self', which is 'predict' now
- note: demos of 'predict' have no 'reasoning'
ChainOfThought: asked for reasoning, answer
the module type has changed from 'ChainOfThought' to 'ReAct' (strategy)
- not carried over: 1 demo of 'predict': there is no such predictor, only 'react', 'extract.predict'
ReAct: asked for reasoning, answer
the module type has changed from 'ReAct' to 'Predict' (strategy)
Predict: asked for answer
"""


def test_the_part_on_module_types_prints_what_its_page_says(tmp_path: Path) -> None:
    (program,) = [each for each in programs_of("docs/dspy.md") if "ModuleVariableResolver" in each.text]
    assert run(program.text, tmp_path) == program.output


def test_the_examples_module_is_found_as_their_page_says(tmp_path: Path) -> None:
    here = tools_list("--tools", "examples.shop", cwd=ROOT)
    assert here.returncode == 0, here.stderr
    assert "7 tools" in here.stdout
    arguments = ["-m", "dspex_persist", "tools", "list", "--tools", "shop"]
    assert "7 tools" in run_prepared(arguments, tmp_path, PYTHONPATH=str(EXAMPLES))


def test_the_program_that_makes_a_report(tmp_path: Path) -> None:
    (program,) = programs_of("docs/audit-pages.md")
    with connect(tmp_path / "sessions.db") as state:
        Context("tune-checkout", state).define("temperature", 0.7)
    run_prepared(["-c", program.text], tmp_path)
    assert "temperature" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_programs_of_the_pages_on_dspy(tmp_path: Path) -> None:
    """The tool is recorded, and what was recorded is played, without a model in either."""
    (tool,) = [each for each in programs_of("docs/dspy.md") if "def triage" in each.text]
    recording, _, playing = programs_of("docs/lm-calls.md")
    (tmp_path / "triage.py").write_text(tool.text)
    played = playing.text.replace('"exec_12_5e0f9d5a4c1b7f3e2a6d8c90"', 'ends[0]["execution_id"]')
    played = played.replace("sessions.db", "dspy.db")
    (tmp_path / "both.py").write_text(DSPY + played + 'print("played", playback.divergences)\n')
    output = run_python(["-W", "ignore", "both.py"], tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert output.splitlines() == ["True 1", "1", "played []"]
    assert run(recording.text, tmp_path) == recording.output


def test_metadata_of_the_package() -> None:
    """The README is its page in an index, and the extra `test` has the packages that the fixtures need."""
    argv = [sys.executable, "-m", "hatchling", "metadata"]
    output = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=within(60), check=True).stdout
    metadata = json.loads(output)
    assert metadata["readme"]["text"] == (ROOT / "README.md").read_text()
    extra = {requirement.partition(">")[0] for requirement in metadata["optional-dependencies"]["test"]}
    assert extra == {"pytest", "freezegun"}
