"""The demo's scenes of reading, writing, watching, and of a kill in the middle of writing."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from dspex_persist.cli.demo.stage import PATIENCE_S, PROGRAM, SESSION, DemoContext, DemoFailedError
from dspex_persist.cli.hints import text_of
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.errors import StateError
from dspex_persist.state.model import Update, UpdateKind, VariableVersion

if TYPE_CHECKING:
    from dspex_persist.state.provider import StateProvider
    from dspex_persist.state.watch import Watch

_COUNTERS: Final = ("counter_a", "counter_b", "counter_c", "counter_d")
# The kill comes when every writer has this many acknowledgements.
_WRITES: Final = 150
CALL_TIMEOUT_S: Final = 2.0

# The tour


def register(stage: DemoContext, client: "StateProvider") -> None:
    stage.say("A client begins a session and registers variables, each with its rules:")
    client.initialize_session(SESSION, {"owner": "demo"})
    client.register_variable(SESSION, "temperature", "float", 0.7, constraints={"min": 0, "max": 2})
    client.register_variable(SESSION, "model", "choice", "small", constraints={"choices": ["small", "large"]})
    client.register_variable(SESSION, "prompt", "string", "Be brief.", constraints={"max_length": 200})
    client.register_variable(SESSION, "weights", "embedding", [0.1, 0.2, 0.3], constraints={"dimensions": 3})
    rows = [
        (variable.name, variable.type, variable.constraints, variable.value.json, variable.version)
        for variable in client.list_variables(SESSION)
    ]
    stage.show("The session's variables", ("variable", "type", "rules", "value", "version#"), rows)


def change(stage: DemoContext, client: "StateProvider") -> None:
    stage.say("It sets one, then two in one batch, and tries a value that breaks a rule:")
    rows: list[tuple[str, str]] = []
    version = client.set_variable(SESSION, "temperature", 1.2)
    rows.append(("set temperature = 1.2", f"version {version}"))
    outcome = client.set_variables(SESSION, {"model": "large", "prompt": "Think first."}, atomic=True)
    versions = ", ".join(f"{name}: version {version}" for name, version in sorted(outcome.versions.items()))
    rows.append(('set model = "large", prompt = "Think first."', versions))
    try:
        client.set_variable(SESSION, "temperature", 99)
    except StateError as error:
        rows.append(("set temperature = 99", f"refused: {text_of(error)}"))
    else:
        raise DemoFailedError("temperature = 99 was accepted, though its maximum is 2")
    stage.show("What the client asked, and the answers", ("request", "answer"), rows)


def show_updates(stage: DemoContext, observer: "Observer") -> None:
    stage.say("Another client watched meanwhile. After each commit it was told:")
    observer.wait_for(lambda updates: len(updates) >= 3, "three updates")
    rows = [
        (update.sequence, update.kind.value, update.variable.name, update.variable.value.json, update.variable.version)
        for update in list(observer.updates)
    ]
    stage.show("What the watch received", ("commit#", "what", "variable", "value", "version#"), rows)


def show_history(stage: DemoContext, client: "StateProvider") -> None:
    stage.say("A rollback writes an old value as a new version. History is never rewritten:")
    client.rollback_variable(SESSION, "temperature", 0)
    rows = [
        (entry.version, _json(entry), entry.kind.value, entry.actor, f"{entry.created_at:%H:%M:%S.%f}"[:-3])
        for entry in client.get_variable_history(SESSION, "temperature")
    ]
    stage.show("The history of temperature, newest first", ("version#", "value", "how", "by", "at (UTC)"), rows)
    if [row[1] for row in rows] != ["0.7", "1.2", "0.7"]:
        raise DemoFailedError(f"the history of temperature should be 0.7, 1.2, 0.7, but is {rows}")


def _json(entry: VariableVersion) -> str:
    return entry.value.json if entry.value is not None else ""


# The kill


@dataclass
class CountingClient:
    """One client that counts a variable up, and what it was told. Version n holds the value n."""

    name: str
    acknowledged: list[tuple[int, int]] = field(default_factory=list)
    """(version, value) of every write that was acknowledged."""
    interrupted: int | None = None
    """The value whose write was not acknowledged."""

    def run(self, client: "StateProvider", killed: threading.Event) -> None:
        """Write until the server is gone. An error before that is a call that took too long: it is repeated."""
        value = 1
        while self.interrupted is None:
            try:
                self.acknowledged.append((self.write(client, value), value))
                value += 1
            except StateError:
                if killed.is_set():
                    self.interrupted = value

    def write(self, client: "StateProvider", value: int) -> int:
        """Write once, however often it is repeated: that is what the key says. The version."""
        return client.set_variable(SESSION, self.name, value, idempotency_key=f"{self.name}-{value}")


def write_until_killed(
    stage: DemoContext, client: "StateProvider", server: ServerProcess, observer: "Observer"
) -> list[CountingClient]:
    stage.say(f"Now {len(_COUNTERS)} writers count up, each noting every acknowledgement ...")
    writers = [CountingClient(name) for name in _COUNTERS]
    for writer in writers:
        client.register_variable(SESSION, writer.name, "integer", 0)
    killed = threading.Event()
    threads = [threading.Thread(target=writer.run, args=(client, killed), daemon=True) for writer in writers]
    for thread in threads:
        thread.start()
    # The watch hears of every write, so it is a good moment to count after each.
    observer.wait_for(
        lambda _: all(len(writer.acknowledged) >= _WRITES for writer in writers),
        f"{_WRITES} acknowledgements for each writer",
    )
    server.kill()
    killed.set()
    stage.add(f"... and in the middle of that the server is killed: kill -9 {server.pid}.")
    stage.add(f"The writers repeat their last write for {CALL_TIMEOUT_S:g} s, then give up.")
    for thread in threads:
        thread.join(PATIENCE_S)
    if any(writer.interrupted is None for writer in writers):
        raise DemoFailedError("a writer went on after the server was killed")
    return writers


def show_writes(stage: DemoContext, client: "StateProvider", writers: Sequence[CountingClient]) -> None:
    stage.say(
        "Is every acknowledged write there? And what of those that nobody acknowledged? Each writer repeats its own "
        "with the same idempotency key: whether it was written or not, it happens once."
    )
    problems: list[str] = []
    rows = []
    for writer in writers:
        found = _values_by_version(client, writer.name)
        lost = lost_writes(writer.acknowledged, found)
        problems += [f"{writer.name} lost {len(lost)} acknowledged writes, version {lost[0]} first"] if lost else []
        rows.append((writer.name, len(writer.acknowledged), len(found) - 1, len(lost), _repeat(client, writer, found)))
    columns = ("variable", "acknowledged#", "found#", "lost#", "the interrupted write, repeated")
    stage.show("Writes before the kill, and what is in the file", columns, rows)
    if problems:
        raise DemoFailedError("; ".join(problems))


def _values_by_version(client: "StateProvider", name: str) -> dict[int, int]:
    history = client.get_variable_history(SESSION, name, limit=10_000)
    return {entry.version: int(_json(entry)) for entry in history}


def lost_writes(acknowledged: Iterable[tuple[int, int]], found: dict[int, int]) -> list[int]:
    """The versions that were acknowledged but are not in `found` (value by version) with the value written."""
    return [version for version, value in acknowledged if found.get(version) != value]


def _repeat(client: "StateProvider", writer: CountingClient, found: dict[int, int]) -> str:
    """Settle the write that was interrupted; say what was the case."""
    value = writer.interrupted
    if value is None:
        raise DemoFailedError(f"{writer.name} was not interrupted")
    version = writer.write(client, value)
    if version != value:
        raise DemoFailedError(f"{writer.name} = {value} should be version {value} after its repetition, not {version}")
    return f"was there as version {version}" if value in found.values() else f"was not there: version {version} now"


# The watch


class Observer:
    """A client that watches the session in a thread, until the server is gone."""

    def __init__(self, watch: "Watch") -> None:
        self.updates: list[Update] = []
        self._watch = watch
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def position(self) -> int:
        """The last commit that the watch has told."""
        return self._watch.position

    def wait_for(self, condition: Callable[[Sequence[Update]], bool], what: str) -> None:
        """Wait until `condition` holds; it is asked again whenever there is news."""
        with self._news:
            if not self._news.wait_for(lambda: condition(self.updates), PATIENCE_S):
                raise DemoFailedError(f"there were not {what} within {PATIENCE_S:g} s")

    def _run(self) -> None:
        try:
            while True:
                updates = self._watch.next()
                with self._news:
                    self.updates += updates
                    self._news.notify_all()
        except StateError:
            return  # the server is gone, which is what the demo is about

    def __enter__(self) -> "Observer":
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.close()
        self._thread.join(PATIENCE_S)


@dataclass(frozen=True, slots=True)
class WatchFaults:
    """What was wrong with a sequence of updates; nothing is what was promised."""

    missed: int
    doubled: int
    disordered: int


def judge_watch(told: Sequence[tuple[int, str, int]], latest: dict[str, int]) -> WatchFaults:
    """Compare what a watch told, (commit, variable, version) in order, with each variable's latest version."""
    versions = [(name, version) for _, name, version in told]
    due = {(name, version) for name, last in latest.items() for version in range(1, last + 1)}
    return WatchFaults(
        missed=len(due - set(versions)),
        doubled=len(versions) - len(set(versions)),
        disordered=sum(1 for before, after in pairwise(told) if after[0] <= before[0]),
    )


def show_resumed_watch(stage: DemoContext, client: "StateProvider", observer: Observer) -> None:
    stage.say(f"The watch resumes after commit {observer.position}, the last that it was told before the kill:")
    latest = {name: client.get_variable(SESSION, name).version for name in _COUNTERS}
    before = _counted(observer.updates)
    with client.watch(SESSION, _COUNTERS, after_sequence=observer.position) as watch:
        after = _pull_until(watch, set(latest.items()) - {(name, version) for _, name, version in before})
    faults = judge_watch([*before, *after], latest)
    columns = ("told before the kill#", "told after it#", "missed#", "doubled#", "out of order#")
    row = (len(before), len(after), faults.missed, faults.doubled, faults.disordered)
    stage.show("Changes of the counters that the watch told", columns, [row])
    if faults != WatchFaults(0, 0, 0):
        raise DemoFailedError(f"the watch was not exact: {faults}")


def _counted(updates: Iterable[Update]) -> list[tuple[int, str, int]]:
    return [
        (update.sequence, update.variable.name, update.variable.version)
        for update in updates
        if update.variable.name in _COUNTERS and update.kind is UpdateKind.VALUE_CHANGE and update.variable.version > 0
    ]


def _pull_until(watch: "Watch", due: set[tuple[str, int]]) -> list[tuple[int, str, int]]:
    """What the watch tells until it has told all that is `due` (variable, version), or takes too long."""
    told: list[tuple[int, str, int]] = []
    open_still = set(due)
    deadline = time.monotonic() + PATIENCE_S
    while open_still and time.monotonic() < deadline:
        told += _counted(watch.next(timeout_s=1.0))
        open_still -= {(name, version) for _, name, version in told}
    return told


# The check, and the end


def show_verification(stage: DemoContext) -> None:
    stage.say(
        "Does the history verify? Each commit carries a hash of itself and of the one before it, so that no change "
        "goes unnoticed. This is [bold]dspex-persist db check[/], while the server runs:"
    )
    command = [*PROGRAM, "db", "check", "--json", "--db", str(stage.database)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=4 * PATIENCE_S)
    if checked.returncode != 0:
        raise DemoFailedError(f"db check ended with {checked.returncode}: {checked.stdout}{checked.stderr}")
    report = json.loads(checked.stdout)
    rows = [
        ("commits whose hash is right", report["commits"]),
        ("the last commit is the one that the anchor file remembers", "yes" if report["anchored"] else "no"),
        ("problems with pages, references, versions, current values", len(report["problems"])),
    ]
    stage.show("The database, checked", ("what", "found#"), rows)
    if not (report["ok"] and report["anchored"]):
        raise DemoFailedError(f"the database does not verify: {checked.stdout}")


def stop(stage: DemoContext, server: ServerProcess) -> None:
    stage.say("Stopping it with SIGTERM: calls finish, and all goes into the one file.")
    code = server.terminate(PATIENCE_S)
    stage.add(f"It ended with exit code {code}.")
    if code != 0:
        raise DemoFailedError(f"the server ended with exit code {code}: {server.stderr_tail}")
