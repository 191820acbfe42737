"""The programs of the pages on tools, and the examples, run as a newcomer would."""

import sys
from pathlib import Path

import pytest

from dspex_persist import BridgedState, Context
from dspex_persist.infra.process import ServerProcess
from tests.end_to_end.old_style import ROOT, environment, serve, target_of, tools_list
from tests.end_to_end.programs import Program, programs_of, run, run_python

PROGRAMS = [program for page in ("docs/tools.md", "docs/transactions.md") for program in programs_of(page)]
WORKERS = [program for program in PROGRAMS if "BridgeServiceServicer" in program.text]
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("program", [each for each in PROGRAMS if each.is_whole and each not in WORKERS], ids=str)
def test_a_program_prints_what_its_page_says(program: Program, tmp_path: Path) -> None:
    assert program.said, "the page does not say what it prints"
    assert run(program.text, tmp_path) == program.said


@pytest.mark.parametrize("program", [each for each in PROGRAMS if not each.is_whole], ids=str)
def test_a_part_of_a_program_has_tools_that_can_be_defined(program: Program, tmp_path: Path) -> None:
    run(f"from dspex_persist import ToolContext, tool\n{program.text}", tmp_path)


def test_the_worker_is_part_of_the_transaction(tmp_path: Path) -> None:
    (worker,) = WORKERS
    with serve(tmp_path / "sessions.db") as server, BridgedState(target_of(server)) as state:
        shop = Context(state, "shop")
        shop.variables.define("stock", 1)
        argv = [sys.executable, "-c", worker.text, target_of(server), "shop"]
        with ServerProcess.start(argv, env=environment(), cwd=tmp_path):
            assert shop.call("restock", amount=4) == 5
            outcome = state.execute_tool("shop", "restock", {"amount": "many"})
            assert outcome.error_code == "TOOL_FAILED"
        (newest, _) = shop.variables.history("stock")
        assert newest.value is not None
        assert newest.value.json == "5"
        assert newest.cause.startswith("exec_")


def test_the_example_shop(tmp_path: Path) -> None:
    lines = run_python([str(EXAMPLES / "shop.py")], tmp_path).splitlines()
    assert lines[1:4] == [
        "bread for 10",
        "order: {'apples': 'sold for 3', 'milk': \"invalid value for 'milk': value -89 is below minimum 0\"}",
        "apples now: 14",
    ]
    (once, again) = [line for line in lines if line.startswith("count")]
    assert once.startswith("count_once: conflict: while the tool ran, others changed milk")
    assert once.endswith("(attempts: 1)")
    assert again == "count: 30 (attempts: 2)"
    assert list(tmp_path.iterdir()) == []
    # On a file that stays it goes on where it was.
    first, second = (run_python([str(EXAMPLES / "shop.py"), "shop.db"], tmp_path) for _ in range(2))
    assert "apples now: 14" in first
    assert "apples now: 18" in second


def test_the_example_client_at_a_server(tmp_path: Path) -> None:
    with serve(tmp_path / "sessions.db", "--tools", "examples.shop") as server:
        said = run_python([str(EXAMPLES / "call_shop.py"), target_of(server)], tmp_path)
    tools, bread, first, second, refused, *report = said.splitlines()
    assert tools.startswith("tools: ['open_shop', 'sell', ")
    assert bread == "bread for 5"
    assert first.endswith("repeated: False")
    assert second == first.replace("False", "True")
    assert "'cheese'" in refused.replace('"', "'")
    assert report[0] == "report: {'article': 'apples', 'there': 9, 'worth': 27}"
    assert len(report) == 3


def test_the_examples_module_is_found_as_their_page_says(tmp_path: Path) -> None:
    here = tools_list("--tools", "examples.shop", cwd=ROOT)
    assert here.returncode == 0, here.stderr
    assert "7 tools" in here.stdout
    arguments = ["-m", "dspex_persist", "tools", "list", "--tools", "shop"]
    assert "7 tools" in run_python(arguments, tmp_path, PYTHONPATH=str(EXAMPLES))
