"""The pytest plugin, as a project uses it that has this package installed."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dspex_persist import Context, cli
from dspex_persist.state.abilities import Recordable
from dspex_persist.state.recording import write_recording
from tests.deadline import within
from tests.end_to_end.programs import programs_of
from tests.lms import ask, dspy, dummy
from tests.prepared import commands

TOOLS = '''
from dspex_persist import ToolContext, tool


@tool(description="Sell.")
def sell(ctx: ToolContext, amount: int = 1) -> int:
    """Sell from the stock."""
    ctx["stock"] -= amount
    ctx["order"] = str(ctx.uuid())
    return ctx["stock"]
'''
SHOP = TOOLS.replace('    ctx["order"] = str(ctx.uuid())\n', "")
TESTS = """
from datetime import timedelta

import pytest

import dspex_persist


def drive(session):
    session.define("stock", 5)
    session.define("order", "")
    session.call("sell", amount=2)
    session["stock"] = 10
    session.call("sell")


@pytest.mark.dspex_replay("tapes/checkout.jsonl", tools="shop_tools", drive=drive)
def test_checkout(dspex_replay):
    assert dspex_replay.report.ok
    assert dspex_replay.state["stock"] == 9


@pytest.mark.dspex_replay("tapes/checkout.jsonl", tools=["shop_tools"])
def test_marked_only():
    pass
"""
RUN = """
import dspex_persist
import shop_tools

tools = dspex_persist.Toolbox()
tools.add(shop_tools.sell)
with dspex_persist.connect("shop.db", tools=tools) as state:
    state.initialize_session("s1")
    state.register_variable("s1", "stock", "integer", 3)
    state.register_variable("s1", "order", "string", "")
    state.execute_tool("s1", "sell", {"amount": 2})
    state.set_variables("s1", {"order": "x", "stock": 3})
    state.rollback_variable("s1", "stock", 1)
"""
FIXTURES = """
import time
from datetime import timedelta

import pytest

import dspex_persist

pytestmark = pytest.mark.dspex_tools("shop_tools")


def test_server(dspex_server):
    with dspex_persist.connect(dspex_server.url) as state:
        state.initialize_session("s")
        state.register_variable("s", "stock", "integer", 3)
        state.register_variable("s", "order", "string", "")
        assert state.execute_tool("s", "sell").success
    dspex_server.kill()
    dspex_server.restart()
    with dspex_persist.connect(dspex_server.url) as state:
        assert state.get_value("s", "stock") == 2
    assert dspex_server.stop() == 0
    assert dspex_server.path.exists()


def test_a_client_from_before_a_restart(dspex_server):
    url = dspex_server.url
    with dspex_persist.connect(url) as state:
        session = dspex_persist.Context("s", state)
        session.define("n", 1)
        dspex_server.kill()
        with pytest.raises(dspex_persist.DspexError):
            session["n"]
        for _ in range(2):
            dspex_server.restart()
            assert dspex_server.url == url
        # The client reconnects by itself, some tenths of a second after a failed attempt.
        deadline = time.monotonic() + 60
        while True:
            try:
                assert session["n"] == 1
                break
            except dspex_persist.DspexError as error:
                assert error.retryable and time.monotonic() < deadline
        session["n"] = 2


def test_session(dspex_session, dspex_provider):
    dspex_session.define("stock", 3)
    dspex_session.define("order", "")
    assert dspex_session.call("sell") == 2
    assert dspex_provider.get_value("session", "stock") == 2


def test_clock(dspex_clock, dspex_server, dspex_provider):
    dspex_clock.move_to("2030-01-01")
    dspex_provider.initialize_session("s", {"ttl_seconds": "60"})
    dspex_provider.register_variable("s", "stock", "integer", 3)
    assert dspex_provider.get_variable("s", "stock").updated_at.year == 2030
    with dspex_persist.connect(dspex_server.url) as state:
        state.initialize_session("s")
    dspex_clock.tick(timedelta(minutes=2))
    assert not dspex_provider.heartbeat("s")


def test_called(dspex_replay):
    assert dspex_replay("tapes/checkout.jsonl", tools="shop_tools").state["stock"] == 9
"""


DRIVES = """
import asyncio
import functools

import pytest


def drive(session):
    session.define("stock", 5)
    session.call("sell", amount=2)


async def drive_later(session):
    drive(session)
    await asyncio.sleep(0)
    session.call("sell")


async def in_steps_later(session):
    drive(session)
    yield


def in_steps(session):
    drive(session)
    yield


def idle(session):
    pass


def broken(session):
    raise ZeroDivisionError("the client's own")


def ends(session):
    drive(session)
    raise SystemExit(2)


async def ends_later(session):
    ends(session)


class Client:
    async def __call__(self, session, amount):
        drive(session)


def replayed(tape, drive):
    return pytest.mark.dspex_replay(tape, tools="shop_tools", drive=drive)


@replayed("later.jsonl", drive_later)
def test_later(dspex_replay):
    assert dspex_replay.state["stock"] == 2


@replayed("object.jsonl", functools.partial(Client(), amount=1))
def test_object(dspex_replay):
    assert dspex_replay.state["stock"] == 3


@replayed("steps.jsonl", in_steps)
def test_steps():
    pass


@replayed("steps_later.jsonl", in_steps_later)
def test_steps_later():
    pass


@replayed("idle.jsonl", idle)
def test_idle():
    pass


@replayed("broken.jsonl", broken)
def test_broken():
    pass


@replayed("ends.jsonl", ends)
def test_ends():
    pass


@replayed("ends_later.jsonl", ends_later)
def test_ends_later():
    pass


@replayed(5, drive)
def test_no_path():
    pass


@replayed("", drive)
def test_no_file():
    pass


@replayed("text.jsonl", "drive")
def test_text():
    pass


@replayed("one.jsonl", drive)
@replayed("two.jsonl", drive)
def test_two_markers():
    pass


@pytest.mark.dspex_replay(tools="shop_tools")
def test_without_a_tape():
    pass


def test_two_tapes(dspex_replay):
    one = dspex_replay("a/tape.jsonl", tools="shop_tools", drive=drive)
    two = dspex_replay("b/tape.jsonl", tools="shop_tools", drive=drive)
    assert len(one.recording.commits) == len(two.recording.commits)
    assert one.state == two.state == {"stock": 3}


def test_in_a_running_loop(dspex_replay):
    async def test():
        return dspex_replay("c/tape.jsonl", tools="shop_tools", drive=drive_later)

    assert asyncio.run(test()).state == {"stock": 2}
"""
STALE = """
import pytest


def drive(session):
    session.define("stock", 100)
    for _ in range(8):
        session.call("sell")


@pytest.fixture
def stock(dspex_replay):
    return dspex_replay.state["stock"]


@pytest.mark.dspex_replay("tape.jsonl", tools="shop_tools", drive=drive)
def test_marked(dspex_replay):
    pass


@pytest.mark.dspex_replay("tape.jsonl", tools="shop_tools")
@pytest.mark.xfail(strict=True)
def test_known_to_be_stale():
    pass


def test_called(dspex_replay):
    dspex_replay("tape.jsonl", tools="shop_tools")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "shop_tools.py").write_text(TOOLS, encoding="utf-8")
    (tmp_path / "test_checkout.py").write_text(TESTS, encoding="utf-8")
    return tmp_path


def run_pytest(project: Path, *options: str, ci: bool = False, own: bool = False) -> subprocess.CompletedProcess[str]:
    """Run pytest in the project; `own`: in a new interpreter, which has imported nothing yet."""
    environment = {name: text for name, text in os.environ.items() if name not in ("CI", "PYTEST_ADDOPTS")}
    # Without hypothesis, whose import takes longer than all the rest.
    plugins = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    command = ["-m", "pytest", "-q", "-W", "error", *plugins, *options]
    environment |= {"CI": "true"} if ci else {}
    if own:
        argv = [sys.executable, *command]
        return subprocess.run(
            argv, cwd=project, env=environment, capture_output=True, text=True, timeout=within(100), check=False
        )
    return commands().run_python(command, cwd=project, env=environment, timeout_s=within(100))


def run_program(project: Path) -> None:
    done = commands().run_python(["run.py"], cwd=project, env=os.environ, timeout_s=within(60))
    assert done.returncode == 0, done.stderr


def run_command(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`dspex-persist ...` in the project."""
    return commands().run(words, cwd=project, env=os.environ, timeout_s=within(60))


def test_a_recording_is_made_once_then_replayed_and_renewed_on_request(project: Path) -> None:
    tape = project / "tapes" / "checkout.jsonl"
    # In CI nothing is recorded without a request.
    missing = run_pytest(project, ci=True)
    assert missing.returncode == 1
    assert "there is no recording" in missing.stdout
    assert "pytest test_checkout.py::test_checkout --dspex-record=all" in missing.stdout
    # A test without a drive cannot make its recording, whatever the options.
    assert "pytest test_checkout.py::test_marked_only --dspex-record=all" not in missing.stdout
    assert "make the recording with: dspex-persist session export SESSION -o " in missing.stdout
    assert not tape.exists()

    made = run_pytest(project)
    assert made.returncode == 0, made.stdout
    recorded = tape.read_bytes()
    # Two workers read it side by side.
    replayed = run_pytest(project, "-n", "2", ci=True)
    assert replayed.returncode == 0, replayed.stdout
    assert tape.read_bytes() == recorded

    tools = project / "shop_tools.py"
    tools.write_text(TOOLS.replace("-= amount", "-= 2 * amount"), encoding="utf-8")
    # New episodes are added calls, and this is another answer to an old one.
    stale = run_pytest(project, "--dspex-record=new_episodes")
    assert stale.returncode == 1
    assert "checkout.jsonl is stale" in stale.stdout
    assert "-" in stale.stdout
    assert "+" in stale.stdout
    assert "--dspex-record=all" in stale.stdout
    assert tape.read_bytes() == recorded

    # The first test drives its client again; the second has none, and asks again what the recording has been asked.
    renewed = run_pytest(project, "--dspex-record=all")
    assert "assert 8 == 9" in renewed.stdout, renewed.stdout
    assert tape.read_bytes() != recorded
    alone = run_pytest(project, "--dspex-record=all", "-k", "marked_only")
    assert alone.returncode == 0, alone.stdout


def test_recorded_lm_calls_are_played(project: Path) -> None:
    """In a test, and in a test whose program has changed since."""
    with Context("s", project / "lm.db") as ctx, dspy.context(lm=dummy("blue", "green")), ctx.recording() as recording:
        ask("one")
        ask("two")
    (project / "test_lm.py").write_text(
        f"""
import dspy

answer = dspy.Predict("question -> answer")


def test_same(dspex_lm):
    dspex_lm({recording.id!r}, "lm.db")
    assert [answer(question=each).answer for each in ("one", "two")] == ["blue", "green"]


def test_fewer(dspex_lm):
    dspex_lm({recording.id!r}, "SQLite:///{project / "lm.db"}")
    assert answer(question="one").answer == "blue"
"""
    )
    # DSPy's own imports warn.
    done = run_pytest(project, "-W", "ignore", "test_lm.py")
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "the LM calls are not the recorded ones" in done.stdout
    assert "recorded LM call 1 was not made" in done.stdout


def test_the_fixtures(project: Path) -> None:
    (project / "test_fixtures.py").write_text(FIXTURES, encoding="utf-8")
    ran = run_pytest(project)
    assert ran.returncode == 0, ran.stdout
    assert "7 passed" in ran.stdout


def test_every_kind_of_drive_is_played_or_refused(project: Path) -> None:
    """An empty recording would always pass."""
    (project / "test_checkout.py").unlink()
    (project / "shop_tools.py").write_text(SHOP, encoding="utf-8")
    (project / "test_drives.py").write_text(DRIVES, encoding="utf-8")
    ran = run_pytest(project)
    assert "11 failed, 4 passed" in ran.stdout, ran.stdout
    for line in (
        "ends.jsonl: drive tried to end the process: SystemExit(2)",
        "ends_later.jsonl: drive tried to end the process: SystemExit(2)",
        "the tape is the path of a file, not 5; write dspex_replay(tape,",
        f"{project} is a folder: the tape is a file, such as",
        "steps.jsonl: drive has a yield, so calling it does not run its code; make it a plain function",
        "steps_later.jsonl: drive has a yield",
        "idle.jsonl: drive did nothing with the session that was passed to it",
        "ZeroDivisionError: the client's own",
        "text.jsonl: drive is a function that takes the session, not 'drive'",
        "has the marker dspex_replay more than once: in a test without the marker, the fixture dspex_replay is a",
        "the marker dspex_replay has wrong arguments (missing a required argument: 'tape'); write dspex_replay(tape,",
    ):
        assert line in ran.stdout
    made = sorted(str(path.relative_to(project)) for path in project.rglob("*.jsonl"))
    assert made == ["a/tape.jsonl", "b/tape.jsonl", "c/tape.jsonl", "later.jsonl", "object.jsonl"]
    # A recording that an earlier version made of such a drive.
    header, first, *_ = (project / "later.jsonl").read_text(encoding="utf-8").splitlines()
    header = json.dumps(json.loads(header) | {"commits": 1})
    (project / "steps.jsonl").write_text(f"{header}\n{first}\n", encoding="utf-8")
    ran = run_pytest(project, "-k", "test_steps", ci=True)
    assert "steps.jsonl contains only the session's beginning" in ran.stdout, ran.stdout


def test_a_stale_recording_fails_the_test_whichever_way_it_is_replayed(project: Path) -> None:
    (project / "test_checkout.py").unlink()
    (project / "shop_tools.py").write_text(SHOP, encoding="utf-8")
    (project / "test_stale.py").write_text(STALE, encoding="utf-8")
    assert "2 passed" in run_pytest(project, "-k", "not known").stdout
    (project / "shop_tools.py").write_text(SHOP.replace("-= amount", "-= 2 * amount"), encoding="utf-8")
    ran = run_pytest(project)
    assert "2 failed, 1 xfailed" in ran.stdout, ran.stdout
    assert "and 11 more (pytest -vv shows them)" in ran.stdout
    wordy = run_pytest(project, "-rN", "-vvv", "-k", "marked").stdout  # -q takes one away
    assert "more" not in wordy
    assert wordy.count("its result is not the recorded one") == 8


def test_a_session_that_ran_elsewhere_becomes_a_test(project: Path) -> None:
    """Its recording is renewed by replaying the client requests from the old one."""
    (project / "test_checkout.py").unlink()
    (project / "run.py").write_text(RUN, encoding="utf-8")
    run_program(project)
    command = ["session", "export", "s1", "--db", "shop.db", "--as-test", "test_s1.py", "--tools", "shop_tools"]
    exported = run_command(project, *command)
    assert exported.returncode == 0, exported.stderr
    assert "pytest test_s1.py" in exported.stdout
    ran = run_pytest(project, ci=True)
    assert (ran.returncode, "1 passed" in ran.stdout) == (0, True), ran.stdout
    # Written once: it may have been changed since.
    again = run_command(project, *command)
    assert (again.returncode, "test_s1.py exists already" in again.stderr) == (2, True)

    tape = project / "test_s1.jsonl"
    recorded = tape.read_text(encoding="utf-8")
    (project / "shop_tools.py").write_text(TOOLS.replace("-= amount", "-= 2 * amount"), encoding="utf-8")
    assert run_pytest(project, ci=True).returncode == 1
    renewed = run_pytest(project, "--dspex-record=all")
    assert renewed.returncode == 0, renewed.stdout
    assert tape.read_text(encoding="utf-8") != recorded
    lines = [json.loads(line) for line in tape.read_text(encoding="utf-8").splitlines()]
    assert [(each["name"], each["json"]) for commit in lines[1:] for each in commit["versions"]][-2:] == [
        ("order", '"x"'),
        ("stock", "-1"),
    ]


def test_a_recording_without_anything_to_replay_fails_its_test(project: Path) -> None:
    (project / "test_checkout.py").unlink()
    secret = RUN.replace('"integer", 3)', '"integer", 3, metadata={"sensitive": "true"})')
    # A recording without executions is fine: its state is checked.
    (project / "run.py").write_text(secret + '    state.initialize_session("s2")\n', encoding="utf-8")
    run_program(project)
    errors = {}
    for session, options in (("s1", ()), ("s2", ()), ("s1", ("--reveal",))):
        test = f"test_{session}{'_revealed' if options else ''}.py"
        export = ["session", "export", session, "--db", "shop.db", "--as-test", test, "--tools", "shop_tools"]
        ran = run_command(project, *export, *options)
        assert ran.returncode == 0, ran.stderr
        errors[test] = ran.stderr
    warning = errors.pop("test_s1.py")
    assert warning.startswith(
        "warning: values of sensitive variables are left out; executions that read them cannot be"
    )
    assert "--reveal" in warning
    assert set(errors.values()) == {""}
    ran = run_pytest(project, ci=True)
    assert "1 failed, 2 passed" in ran.stdout, ran.stdout
    reason = "it reads a variable whose values were kept out of the recording"
    assert f"test_s1.jsonl: nothing was checked: {reason}" in ran.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "say where to write the recording"),
        (["--as-test", "test_x.py"], "--tools MODULE"),
        (["--as-test", "test-x.py", "--tools", "shop_tools"], "is not a name for a test"),
        (["--as-test", "test_x.py", "--tools", "shop_tools", "-o", "-"], "leave out -o -"),
        (["-o", "x.jsonl", "--tools", "shop_tools"], "--tools is only for --as-test"),
    ],
)
def test_a_wrong_export_says_what_is_wrong(
    options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dspex-persist", "session", "export", "s", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").split())


NAMES = [
    '"""; open("ran", "w"); """',
    "\\\"\\\"\\\"; open('ran', 'w') #",
    "'+str(open('ran','w'))+'",
    "{open('ran', 'w')}",
    "\u2028open('ran', 'w')\u202e",
    "é\\",
]


def test_names_from_clients_are_literals_in_a_test(project: Path) -> None:
    (project / "test_checkout.py").unlink()
    begun, used = RUN.split("    state.initialize_session", 1)
    each = textwrap.indent("    state.initialize_session" + used, "    ").replace('"s1"', "name")
    (project / "run.py").write_text(f"{begun}    for name in {NAMES!a}:\n{each}", encoding="utf-8")
    run_program(project)
    for number, name in enumerate(NAMES):
        export = ["session", "export", name, "--db", "shop.db", "--as-test", f"test_named_{number}.py"]
        ran = run_command(project, *export, "--tools", "shop_tools")
        assert ran.returncode == 0, ran.stderr
        source = (project / f"test_named_{number}.py").read_text(encoding="utf-8")
        assert source.isascii(), name
        # The code of the test is the same for every id; the id is one string in it.
        strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
        assert strings.count(name) == 1, name
    ran = run_pytest(project, ci=True)
    assert f"{len(NAMES)} passed" in ran.stdout, ran.stdout
    assert not (project / "ran").exists()


def test_a_test_without_its_tools_is_not_made(project: Path) -> None:
    (project / "run.py").write_text(RUN, encoding="utf-8")
    run_program(project)
    export = ["session", "export", "s1", "--db", "shop.db", "--as-test", "test_none.py"]
    ran = run_command(project, *export, "--tools", "nope")
    assert (ran.returncode, "nope" in ran.stderr) == (2, True), ran.stderr
    assert not list(project.glob("test_none*"))


def test_the_plugin_costs_nothing_where_it_is_not_used(project: Path) -> None:
    """Where the package is installed, every run of pytest loads the plugin."""
    (project / "test_checkout.py").write_text(
        "import sys\n"
        "def test_nothing_heavy():\n"
        "    heavy = {'grpc', 'sqlalchemy', 'pydantic', 'dspy', 'freezegun', 'dspex_persist.state'}\n"
        "    assert not heavy & set(sys.modules)\n",
        encoding="utf-8",
    )
    ran = run_pytest(project, own=True)
    assert ran.returncode == 0, ran.stdout
    markers = run_pytest(project, "--markers").stdout
    assert "dspex_replay(tape" in markers
    assert "dspex_tools(*references)" in markers
    assert "--dspex-record" in run_pytest(project, "--help").stdout


def _triaged(tape: Path) -> str:
    """Record the LM call of a program; returns the id of the recording."""
    lm = dspy.utils.DummyLM([{"urgent": "True"}])
    with Context("support") as ctx, dspy.context(lm=lm):
        with ctx.recording() as recording:
            dspy.Predict("message -> urgent: bool")(message="The checkout is down!")
        header, commits = Recordable.of(ctx.backend.provider).record("support")
        with tape.open("w", encoding="utf-8") as file:
            write_recording(header, commits, file)
    return recording.id


def test_the_programs_of_the_page_on_tests_pass(tmp_path: Path) -> None:
    """They test the tools of a shop."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "tools.py").write_text(SHOP, encoding="utf-8")
    (tmp_path / "triage.py").write_text('import dspy\n\nclassify = dspy.Predict("message -> urgent: bool")\n')
    (tmp_path / "tapes").mkdir()
    programs = programs_of("docs/testing.md")
    recording_id = _triaged(tmp_path / "tapes" / "support.jsonl")
    for number, program in enumerate(programs):
        text = program.text.replace("rec_1f0c2a9b7e6d5c4f", recording_id)
        (tmp_path / f"test_{number}.py").write_text(text, encoding="utf-8")
    # DSPy's own imports warn.
    ran = run_pytest(tmp_path, "-W", "ignore::DeprecationWarning")
    assert ran.returncode == 0, ran.stdout
    assert f"{len(programs)} passed" in ran.stdout
