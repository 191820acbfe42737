"""The cost of audit queries on a large file, compared with a file a tenth the size."""

import itertools
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspex_persist
from benchmarks.files import begin_session, carry_out, session_id, value_of
from benchmarks.load import ratios_of, run_threads
from benchmarks.plan import CALLERS, Plan
from benchmarks.proc import Counts
from benchmarks.table import Row, Target
from dspex_persist.audit import AuditSource, HistoryQuery
from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.cognitive.toolbox import Toolbox
from dspex_persist.cognitive.tools import tool
from dspex_persist.replay import load, replay
from dspex_persist.state.abilities import Recordable
from dspex_persist.state.commands import Command, InitializeSession, RegisterVariable, SetVariable, SetVariables
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.model import PrunePolicy
from dspex_persist.state.store import maintenance
from dspex_persist.state.store.maintenance import transfer

_NAMES = tuple(f"v{index}" for index in range(5))
_VERSIONS = 20
"""Versions of each variable of an ordinary session, so that ten sessions have a thousand."""
_WIDE, _WIDTH = "wide", 100
"""A session with this many variables, which many commits change."""
_DEEP, _DEPTH = "deep", 2_000
"""A session whose only variable has this many versions."""
_FOUND = 10
"""How many versions have the metadata that the search looks for."""
_SCAN = """
import sys
import dspex_persist
from dspex_persist.audit import HistoryQuery, parse_predicate
with dspex_persist.open_audit(sys.argv[1]) as audit:
    print("scanning", flush=True)
    while True:
        for _ in audit.iterate(HistoryQuery(where=(parse_predicate("= nothing"),))):
            pass
"""


def prepare(path: Path, versions: int) -> None:
    """Make a database with about this many versions, in a hundredth as many sessions."""
    toolbox = Toolbox()
    toolbox.add(_mix)
    with dspex_persist.connect(path, tools=toolbox) as provider:
        carry_out(provider, _special())
        carry_out(provider, itertools.chain.from_iterable(map(_ordinary, range(versions // 100))))
        carry_out(provider, _searched(versions // 100))
        # Changed last and at the beginning: the versions in between must cost nothing.
        carry_out(provider, (SetVariables(_WIDE, dict.fromkeys(_wide_names(), value_of(step))) for step in range(20)))
        provider.execute_tool(_WIDE, "mix")


@tool(name="noop", description="Do nothing.")
def _noop() -> None:
    pass


@tool(name="mix", description="Read ten variables and write one.")
def _mix(ctx: ToolContext) -> None:
    ctx["w00"] = sum(ctx[name] for name in _wide_names()[:10])


def _wide_names() -> list[str]:
    return [f"w{index:02d}" for index in range(_WIDTH)]


def _special() -> Iterator[Command[Any]]:
    yield InitializeSession(_WIDE)
    yield from (RegisterVariable(_WIDE, name, "float", value_of(0)) for name in _wide_names())
    yield from (SetVariables(_WIDE, dict.fromkeys(_wide_names(), value_of(step))) for step in range(20))
    yield InitializeSession(_DEEP)
    yield RegisterVariable(_DEEP, "d", "float", value_of(0))
    yield from (SetVariable(_DEEP, "d", value_of(step)) for step in range(_DEPTH))


def _ordinary(number: int) -> Iterator[Command[Any]]:
    yield from begin_session(number, _NAMES)
    for step in range(1, _VERSIONS):
        yield SetVariables(session_id(number), dict.fromkeys(_NAMES, value_of(step)), {"step": str(step)})


def _searched(sessions: int) -> Iterator[Command[Any]]:
    step = max(1, sessions // _FOUND)
    for number in range(0, step * _FOUND, step):
        yield SetVariable(session_id(number % sessions), _NAMES[0], value_of(7), {"trace": "needle"})


# Queries


@dataclass(slots=True)
class _Question:
    """A query, the number of answers that it must have, and its measurements by size of the file."""

    key: str
    what: str
    ask: Callable[[AuditSource, Path, int], int]
    answers: int
    times_s: dict[int, list[float]] = field(default_factory=dict)
    read_bytes: dict[int, list[float]] = field(default_factory=dict)


def _questions() -> list[_Question]:
    def newest(audit: AuditSource, _path: Path, _middle: int) -> int:
        return len(list(audit.iterate(HistoryQuery(session=_DEEP, variable="d", limit=100))))

    def as_of(audit: AuditSource, _path: Path, middle: int) -> int:
        return len(audit.state(_WIDE, str(middle)))

    def blame(audit: AuditSource, _path: Path, _middle: int) -> int:
        return len(audit.blame(_WIDE, "w00", depth=1))

    def search(audit: AuditSource, _path: Path, _middle: int) -> int:
        return len(list(audit.iterate(HistoryQuery(metadata={"trace": "needle"}))))

    def export(_audit: AuditSource, path: Path, _middle: int) -> int:
        return transfer.export_session(path, _DEEP, path.with_suffix(".jsonl")).commits

    return [
        _Question("newest", "newest 100 versions of a variable", newest, 100),
        _Question("as_of", f"state of {_WIDTH} variables as of the middle", as_of, _WIDTH),
        _Question("blame", "blame of a variable and its ten inputs", blame, 11),
        _Question("search", f"search for {_FOUND} versions by metadata", search, _FOUND),
        _Question("export", f"export of a session of {_DEPTH:,} versions", export, _DEPTH + 2),
    ]


def measure(plan: Plan, small: Path, large: Path) -> list[Row]:
    """Measure all queries on both files in turn, each on a freshly opened file; then operations with linear cost."""
    paths = dict(zip(plan.audit_versions, (small, large), strict=True))
    questions = _questions()
    for _ in range(plan.audit_rounds):
        for question, (versions, path) in itertools.product(questions, paths.items()):
            _ask(question, versions, path)
    rows = [_row_of(question, versions, plan) for question in questions for versions in plan.audit_versions]
    linear = [_verify(plan, large), _prune(plan, small), _replay(plan, small.with_name("replay.db"))]
    return [*rows, *linear, *_during_scan(plan, large)]


def _ask(question: _Question, versions: int, path: Path) -> None:
    with dspex_persist.open_audit(path) as audit:
        middle = audit.head() // 2
    with dspex_persist.open_audit(path) as audit:
        before, began = Counts.now(), time.perf_counter()
        answers = question.ask(audit, path, middle)
        elapsed_s = time.perf_counter() - began
        # SQLite reads a page with one call.
        read_bytes = Counts.now().since(before).read_bytes
    if answers != question.answers:
        raise AssertionError(f"{question.what}: {answers} answers instead of {question.answers}")
    question.times_s.setdefault(versions, []).append(elapsed_s)
    question.read_bytes.setdefault(versions, []).append(read_bytes)


def _row_of(question: _Question, versions: int, plan: Plan) -> Row:
    fewest = plan.audit_versions[0]
    compared = versions != fewest
    read_bytes = question.read_bytes[versions]
    return Row.of_rounds(
        f"audit.{question.key}.{versions}",
        f"{question.what}, of {versions:,}",
        "kB read",
        [count / 1_000 for count in read_bytes],
        ratios_of(read_bytes, question.read_bytes[fewest]) if compared else (),
        p50_ms=statistics.median(question.times_s[versions]) * 1_000,
        p99_ms=max(question.times_s[versions]) * 1_000,
        ratio_to=f"audit.{question.key}.{fewest}" if compared else "",
        target=Target("ratio", "at most", 1.5) if compared else None,
    )


# Operations with linear cost


def _verify(plan: Plan, path: Path) -> Row:
    versions = next(table.rows or 0 for table in maintenance.stats(path).tables if table.name == "versions")
    rates: list[float] = []
    for _ in range(plan.linear_rounds):
        began = time.perf_counter()
        report = maintenance.check(path)
        rates.append(versions / (time.perf_counter() - began))
        if report.problems:
            raise AssertionError(f"the file does not verify: {report.problems[0]}")
    target = Target("value", "at least", 150_000)
    return Row.of_rounds("audit.verify", f"verify {versions:,} versions", "versions/s", rates, target=target)


def _prune(plan: Plan, path: Path) -> Row:
    rates: list[float] = []
    versions = 0
    for count in range(plan.linear_rounds):
        copy = path.with_name(f"pruned{count}.db")
        shutil.copy(path, copy)
        with EmbeddedState(copy) as provider:
            began = time.perf_counter()
            versions = provider.prune(PrunePolicy(keep_versions=_VERSIONS // 2), confirm=True).versions
            rates.append(versions / (time.perf_counter() - began))
        copy.unlink()
    return Row.of_rounds("audit.prune", f"prune {versions:,} versions", "versions/s", rates)


def _replay(plan: Plan, path: Path) -> Row:
    """Measure the replay of recorded executions of a no-op."""
    count = plan.audit_executions
    toolbox = Toolbox()
    toolbox.add(_noop)
    with dspex_persist.connect(path, tools=toolbox) as provider:
        provider.initialize_session("s")
        for _ in range(count):
            provider.execute_tool("s", "noop")
        recording = load(Recordable.of(provider).record("s"))
    rates: list[float] = []
    for _ in range(plan.linear_rounds):
        began = time.perf_counter()
        report = replay(recording, toolbox)
        rates.append(count / (time.perf_counter() - began))
        if not report.ok or len(report.executions) != count:
            raise AssertionError(report.describe())
    target = Target("value", "at least", 3_000)
    return Row.of_rounds(
        "audit.replay", f"replay {count:,} executions of a no-op", "executions/s", rates, target=target
    )


# Writing during a scan


def _during_scan(plan: Plan, large: Path) -> list[Row]:
    """Measure writes by 64 threads, without an audit and while another process scans the file."""
    quiet: list[float] = []
    scanned: list[float] = []
    with dspex_persist.connect(large) as provider:

        def set_one(caller: int) -> None:
            provider.set_variable(session_id(caller), _NAMES[0], 0.5)

        run_threads(set_one, CALLERS, plan.slice_s)
        for _ in range(plan.rounds):
            quiet.append(run_threads(set_one, CALLERS, 2 * plan.slice_s).calls_per_s)
            with subprocess.Popen([sys.executable, "-c", _SCAN, str(large)], stdout=subprocess.PIPE) as scan:
                assert scan.stdout is not None
                scan.stdout.readline()
                scanned.append(run_threads(set_one, CALLERS, 2 * plan.slice_s).calls_per_s)
                scan.kill()
    what = f"SetVariable, {CALLERS} threads"
    target = Target("ratio", "at least", 0.8)
    return [
        Row.of_rounds("audit.quiet", f"{what}, no audit running", "updates/s", quiet),
        Row.of_rounds(
            "audit.scanned",
            f"{what}, an audit scans the file",
            "updates/s",
            scanned,
            ratios_of(scanned, quiet),
            ratio_to="audit.quiet",
            target=target,
        ),
    ]
