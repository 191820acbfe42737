"""The demo's scenes with clients that read, write and watch, and with a kill while they write."""

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
# The server is killed when every writer has this many acknowledgements.
_WRITES: Final = 150
CALL_TIMEOUT_S: Final = 2.0

# The tour


def register(stage: DemoContext, client: "StateProvider") -> None:
    stage.say("A client begins a session and registers variables, with constraints:")
    client.initialize_session(SESSION, {"owner": "demo"})
    client.register_variable(SESSION, "temperature", "float", 0.7, constraints={"min": 0, "max": 2})
    client.register_variable(SESSION, "model", "choice", "small", constraints={"choices": ["small", "large"]})
    client.register_variable(SESSION, "prompt", "string", "Be brief.", constraints={"max_length": 200})
    client.register_variable(SESSION, "weights", "embedding", [0.1, 0.2, 0.3], constraints={"dimensions": 3})
    rows = [
        (variable.name, variable.type, variable.constraints, variable.value.json, variable.version)
        for variable in client.list_variables(SESSION)
    ]
    stage.show("The session's variables", ("variable", "type", "constraints", "value", "version#"), rows)


def change(stage: DemoContext, client: "StateProvider") -> None:
    stage.say("It sets one, then two in one batch, and tries a value that violates a constraint:")
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
    stage.show("The client's requests, and the answers", ("request", "answer"), rows)


def show_updates(stage: DemoContext, observer: "Observer") -> None:
    stage.say("Meanwhile, another client was watching. It received each commit:")
    observer.wait_for(lambda updates: len(updates) >= 3, "three updates")
    rows = [
        (update.sequence, update.kind.value, update.variable.name, update.variable.value.json, update.variable.version)
        for update in list(observer.updates)
    ]
    stage.show("What the watch received", ("commit#", "kind", "variable", "value", "version#"), rows)


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
    """A client that counts a variable up, and notes each acknowledgement. Version n has the value n."""

    name: str
    acknowledged: list[tuple[int, int]] = field(default_factory=list)
    """(version, value) of every acknowledged write."""
    interrupted: int | None = None
    """The value whose write was not acknowledged."""

    def run(self, client: "StateProvider", killed: threading.Event) -> None:
        """Write until the server is gone. An error before that is a timeout, and the write is repeated."""
        value = 1
        while self.interrupted is None:
            try:
                self.acknowledged.append((self.write(client, value), value))
                value += 1
            except StateError:
                if killed.is_set():
                    self.interrupted = value

    def write(self, client: "StateProvider", value: int) -> int:
        """Write a value, once however often this is repeated, as the key stays the same; return the version."""
        return client.set_variable(SESSION, self.name, value, idempotency_key=f"{self.name}-{value}")


def write_until_killed(
    stage: DemoContext, client: "StateProvider", server: ServerProcess, observer: "Observer"
) -> list[CountingClient]:
    stage.say(f"Now {len(_COUNTERS)} writers count up, and note every acknowledgement ...")
    writers = [CountingClient(name) for name in _COUNTERS]
    for writer in writers:
        client.register_variable(SESSION, writer.name, "integer", 0)
    killed = threading.Event()
    threads = [threading.Thread(target=writer.run, args=(client, killed), daemon=True) for writer in writers]
    for thread in threads:
        thread.start()
    # The watch receives every write, so the condition is evaluated after each.
    observer.wait_for(
        lambda _: all(len(writer.acknowledged) >= _WRITES for writer in writers),
        f"{_WRITES} acknowledgements for each writer",
    )
    server.kill()
    killed.set()
    stage.add(f"... and meanwhile the server is killed: kill -9 {server.pid}.")
    stage.add(f"The writers retry their last write for {CALL_TIMEOUT_S:g} s, then give up.")
    for thread in threads:
        thread.join(PATIENCE_S)
    if any(writer.interrupted is None for writer in writers):
        raise DemoFailedError("a writer continued after the server was killed")
    return writers


def show_writes(stage: DemoContext, client: "StateProvider", writers: Sequence[CountingClient]) -> None:
    stage.say(
        "Is every acknowledged write there? And what about the write that was in flight? Each writer repeats it with "
        "the same idempotency key: whether it was written or not, it happens once."
    )
    problems: list[str] = []
    rows = []
    for writer in writers:
        stored = _values_by_version(client, writer.name)
        lost = lost_writes(writer.acknowledged, stored)
        problems += [f"{writer.name} lost {len(lost)} acknowledged writes, version {lost[0]} first"] if lost else []
        repeated = _repeat(client, writer, stored)
        rows.append((writer.name, len(writer.acknowledged), len(stored) - 1, len(lost), repeated))
    columns = ("variable", "acknowledged#", "found#", "lost#", "the interrupted write, repeated")
    stage.show("Writes before the kill, and what is in the file", columns, rows)
    if problems:
        raise DemoFailedError("; ".join(problems))


def _values_by_version(client: "StateProvider", name: str) -> dict[int, int]:
    history = client.get_variable_history(SESSION, name, limit=10_000)
    return {entry.version: int(_json(entry)) for entry in history}


def lost_writes(acknowledged: Iterable[tuple[int, int]], stored: dict[int, int]) -> list[int]:
    """Return the acknowledged versions that `stored` (value by version) lacks, or has with another value."""
    return [version for version, value in acknowledged if stored.get(version) != value]


def _repeat(client: "StateProvider", writer: CountingClient, stored: dict[int, int]) -> str:
    """Repeat the interrupted write, and say whether it had been written."""
    value = writer.interrupted
    if value is None:
        raise DemoFailedError(f"{writer.name} was not interrupted")
    version = writer.write(client, value)
    if version != value:
        raise DemoFailedError(f"{writer.name} = {value} should be version {value} when repeated, not {version}")
    return f"was version {version} already" if value in stored.values() else f"was missing, is version {version} now"


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
        """The last commit that the watch has delivered."""
        return self._watch.position

    def wait_for(self, condition: Callable[[Sequence[Update]], bool], what: str) -> None:
        """Wait until `condition` holds; it is evaluated after each update."""
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
            return  # the server was killed, as the demo intends

    def __enter__(self) -> "Observer":
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.close()
        self._thread.join(PATIENCE_S)


@dataclass(frozen=True, slots=True)
class WatchFaults:
    """How many updates were missed, doubled or out of order; all three must be 0."""

    missed: int
    doubled: int
    disordered: int


def judge_watch(received: Sequence[tuple[int, str, int]], latest: dict[str, int]) -> WatchFaults:
    """Compare the updates of a watch, (commit, variable, version) in order, with each variable's latest version."""
    versions = [(name, version) for _, name, version in received]
    due = {(name, version) for name, last in latest.items() for version in range(1, last + 1)}
    return WatchFaults(
        missed=len(due - set(versions)),
        doubled=len(versions) - len(set(versions)),
        disordered=sum(1 for before, after in pairwise(received) if after[0] <= before[0]),
    )


def show_resumed_watch(stage: DemoContext, client: "StateProvider", observer: Observer) -> None:
    stage.say(f"The watch resumes after commit {observer.position}, the last that it received before the kill:")
    latest = {name: client.get_variable(SESSION, name).version for name in _COUNTERS}
    before = _counted(observer.updates)
    with client.watch(SESSION, _COUNTERS, after_sequence=observer.position) as watch:
        after = _pull_until(watch, set(latest.items()) - {(name, version) for _, name, version in before})
    faults = judge_watch([*before, *after], latest)
    columns = ("before the kill#", "after it#", "missed#", "doubled#", "out of order#")
    row = (len(before), len(after), faults.missed, faults.doubled, faults.disordered)
    stage.show("Changes of the counters that the watch received", columns, [row])
    if faults != WatchFaults(0, 0, 0):
        raise DemoFailedError(f"the watch was not exact: {faults}")


def _counted(updates: Iterable[Update]) -> list[tuple[int, str, int]]:
    return [
        (update.sequence, update.variable.name, update.variable.version)
        for update in updates
        if update.variable.name in _COUNTERS and update.kind is UpdateKind.VALUE_CHANGE and update.variable.version > 0
    ]


def _pull_until(watch: "Watch", due: set[tuple[str, int]]) -> list[tuple[int, str, int]]:
    """Return the updates of the watch until it has delivered all that are `due` (variable, version), or a timeout."""
    received: list[tuple[int, str, int]] = []
    missing = set(due)
    deadline = time.monotonic() + PATIENCE_S
    while missing and time.monotonic() < deadline:
        received += _counted(watch.next(timeout_s=1.0))
        missing -= {(name, version) for _, name, version in received}
    return received


# The check, and the end


def show_verification(stage: DemoContext) -> None:
    stage.say(
        "Does the history verify? Each commit has a hash over itself and the one before it, so no change goes "
        "unnoticed. This is [bold]dspex-persist db check[/], while the server runs:"
    )
    command = [*PROGRAM, "db", "check", "--json", "--db", str(stage.database)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=4 * PATIENCE_S)
    if checked.returncode != 0:
        raise DemoFailedError(f"db check ended with {checked.returncode}: {checked.stdout}{checked.stderr}")
    report = json.loads(checked.stdout)
    rows = [
        ("commits with a correct hash", report["commits"]),
        ("the last commit matches the anchor file", "yes" if report["anchored"] else "no"),
        ("problems with pages, references, versions, current values", len(report["problems"])),
    ]
    stage.show("The database, checked", ("what", "result#"), rows)
    if not (report["ok"] and report["anchored"]):
        raise DemoFailedError(f"the database does not verify: {checked.stdout}")


def stop(stage: DemoContext, server: ServerProcess) -> None:
    stage.say("Stopping it with SIGTERM: calls finish, and everything is in one file.")
    code = server.terminate(PATIENCE_S)
    stage.add(f"It exited with code {code}.")
    if code != 0:
        raise DemoFailedError(f"the server exited with code {code}: {server.stderr_tail}")
