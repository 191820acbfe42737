"""The same program gets the same results and exceptions on each backend."""

import asyncio
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import dspex_persist
from dspex_persist.state import errors
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.contract_tools import CONTRACT_TOOLS
from dspex_persist.testing.server import ServedDatabase

SESSION = "alike"


@pytest.fixture(scope="module")
def providers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedState, BridgedState]]:
    folder: Path = tmp_path_factory.mktemp("alike")
    tools = {"tools": "dspex_persist.testing.contract_tools"}
    with (
        EmbeddedState(folder / "file.db", tools=CONTRACT_TOOLS) as file,
        ServedDatabase(folder / "served.db", tools) as served,
        BridgedState(served.target) as bridged,
    ):
        for provider in (file, bridged):
            provider.initialize_session(SESSION)
            for name in ("a", "b", "c"):
                provider.register_variable(SESSION, name, "integer", 0, constraints={"max": 1000})
            provider.execute_tool(SESSION, "add", {"amount": 1}, idempotency_key="used")
            provider.start_optimization(SESSION, "c", "mipro")
        yield file, bridged


def raised(act: Callable[[], object]) -> errors.StateError:
    with pytest.raises(errors.StateError) as caught:
        act()
    return caught.value


def facts(error: errors.StateError) -> tuple[Any, ...]:
    """Return everything that a program can see of the error, except random ids."""
    drawn = re.compile(r"exec_\d+_[0-9a-f]+|var_\w+_[0-9a-f]{12}")
    fields = {name: drawn.sub("ID", str(field)) for name, field in vars(error).items()}
    return type(error), fields, error.error_code, error.retryable, drawn.sub("ID", str(error))


WRONG: dict[str, Callable[[StateProvider], object]] = {
    "unknown session": lambda p: p.get_session("missing"),
    "unknown variable": lambda p: p.get_variable(SESSION, "nothing"),
    "unknown version": lambda p: p.rollback_variable(SESSION, "a", 77),
    "version conflict": lambda p: p.set_variable(SESSION, "a", 1, expected_version=77),
    "bad value": lambda p: p.set_variable(SESSION, "a", "text"),
    "broken constraint": lambda p: p.set_variable(SESSION, "a", 1001),
    "bad constraints": lambda p: p.register_variable(SESSION, "d", "integer", 1, constraints={"max": "1"}),
    "another type": lambda p: p.register_variable(SESSION, "a", "string", "x"),
    "unknown type": lambda p: p.register_variable(SESSION, "d", "int", 1),
    "locked": lambda p: p.set_variable(SESSION, "c", 1),
    "not optimizing": lambda p: p.stop_optimization(SESSION, "a"),
    "cycle": lambda p: p.add_dependency(SESSION, "a", "a"),
    "too long a name": lambda p: p.register_variable(SESSION, "n" * 5000, "integer", 1),
    "bad metadata": lambda p: p.set_variable(SESSION, "a", 1, metadata={"dspex.x": "1"}),
    "bad limit": lambda p: p.get_variable_history(SESSION, "a", limit=-1),
    "watch of an unknown session": lambda p: p.watch("missing"),
    "tool of an unknown session": lambda p: p.execute_tool("missing", "add"),
}


@pytest.mark.parametrize("name", WRONG)
def test_calls_raise_the_same_errors(providers: tuple[StateProvider, BridgedState], name: str) -> None:
    file, bridged = (facts(raised(lambda provider=each: WRONG[name](provider))) for each in providers)  # type: ignore[misc]
    assert file == bridged


TOOLS: dict[str, tuple[str, dict[str, object], dict[str, Any]]] = {
    "UNKNOWN_TOOL": ("ad", {}, {}),
    "INVALID_PARAMETERS": ("add", {"amunt": 1}, {}),
    "TOOL_FAILED": ("fail", {"name": "ValueError"}, {}),
    "TIMED_OUT": ("slow", {"gate": "/nowhere"}, {}),
    "IDEMPOTENCY_CONFLICT": ("add", {"amount": 2}, {"idempotency_key": "used"}),
}


@pytest.mark.parametrize("code", TOOLS)
def test_tools_raise_the_same_errors(providers: tuple[EmbeddedState, BridgedState], code: str, tmp_path: Path) -> None:
    tool, parameters, options = TOOLS[code]
    if "gate" in parameters:
        parameters = {"gate": str(tmp_path)}
    seen = []
    for provider in providers:
        outcome = provider.execute_tool(SESSION, tool, parameters, **options)
        assert isinstance(outcome.error, errors.StateError)
        assert outcome.error_code == outcome.error.error_code == code
        seen.append(facts(outcome.error))
        if not options:
            context = dspex_persist.Context(SESSION, provider)
            seen.append(facts(raised(lambda context=context: context.call(tool, **parameters))))  # type: ignore[misc]
    streaming = {"metadata": options} if options else {}
    for each in providers:
        stream = each.stream_tool(SESSION, tool, parameters, **streaming)
        seen.append(facts(raised(lambda stream=stream: list(stream))))  # type: ignore[misc]
    assert seen == [seen[0]] * len(seen)


def test_a_conflict(providers: tuple[StateProvider, BridgedState], tmp_path: Path) -> None:
    """A loop that retries as long as the error suggests it succeeds on both."""
    for number, provider in enumerate(providers):
        gate = tmp_path / str(number)
        gate.mkdir()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(provider.execute_tool, SESSION, "add_at_gate", {"gate": str(gate), "name": "b"})
            while not (gate / "at 1").exists():
                assert not first.done(), first.result()
            provider.set_variable(SESSION, "b", 10)
            (gate / "go 1").touch()
            error = first.result().error
        assert isinstance(error, dspex_persist.ExecutionConflictError)
        assert (error.retryable, error.error_code) == (True, "CONFLICT")
        assert error.changes == "b (was at version 0, is at version 1)"
        assert provider.execute_tool(SESSION, "add_at_gate", {"gate": str(gate), "name": "b"}).success


def test_the_actor_of_a_provider(tmp_path: Path) -> None:
    """Each backend takes one, which calls may override; transactions and tools of the call have the same."""
    with ServedDatabase(tmp_path / "served.db") as served:
        for url in ("memory:", str(tmp_path / "file.db"), served.url):
            with dspex_persist.connect(url, actor="service:shop") as state:
                state.initialize_session("s")
                state.register_variable("s", "x", "integer", 0)
                state.set_variable("s", "x", 1, actor="user:ada", reason="asked for it")
                state.set_variable("s", "x", 2)
                history = [(each.actor, each.reason) for each in state.get_variable_history("s", "x")]
            assert history == [("service:shop", None), ("user:ada", "asked for it"), ("service:shop", None)], url
    for url in ("memory:", str(tmp_path / "other.db")):
        with pytest.raises(errors.InvalidArgumentError, match="actor"):
            dspex_persist.connect(url, actor=5)
    assert not (tmp_path / "other.db").exists()


def program(ctx: dspex_persist.Context) -> Iterator[Any]:
    """Use every verb of a context, and yield what there is to see of it; no line depends on the backend."""
    yield ctx.resumed, list(ctx), bool(ctx)
    ctx.define("temperature", 0.7, constraints={"min": 0, "max": 2}, description="how hot", metadata={"unit": "K"})
    ctx.define_many({"stock": 3, "words": ["a"], "note": dspex_persist.Definition("x", description="y")})
    ctx["new"] = {"k": [1, 2.5, True]}
    yield dict(ctx), ctx.get("nothing", 5), ctx.get_many("stock", "nothing"), len(ctx), "stock" in ctx
    yield ctx.set("temperature", 1, reason="colder", actor="user:bob"), ctx.info("temperature").value
    yield ctx.update("stock", lambda stock: stock - 1, reason="sold"), ctx.rollback("stock", 0)
    yield [(each.version, each.value, str(each.kind), each.actor, each.reason) for each in ctx.history("stock")]
    yield [each.version for each in ctx.history("stock", 1, before=2)]
    outcome = ctx.update_many({"stock": 9, "temperature": 5}, atomic=False)
    yield dict(outcome.versions), dict(outcome.errors)
    for wrong in (
        lambda: ctx.update_many({"stock": 8, "temperature": 5}),
        lambda: ctx["nothing"],
        lambda: ctx.set("stok", 1),
        lambda: ctx.set("stock", 1, expected_version=0),
        lambda: ctx.define("stock", 1.0),
        lambda: ctx.delete("nothing"),
        lambda: ctx.depends_on("stock", "stock"),
        lambda: ctx.call("nothing"),
    ):
        error = raised(wrong)  # type: ignore[arg-type]
        yield type(error).__name__, str(error), error.error_code, error.retryable
    ctx.depends_on("words", "stock", "temperature", kind="uses")
    ctx.depends_on("note", "words")
    yield ctx.dependencies("words"), ctx.dependents("stock", transitive=True), ctx.remove_dependency("note", "words")
    with ctx.optimize("temperature", {"target": 1}, optimizer_id="grid") as run:
        yield run.report(0, 0.5, {"score": 0.1}), raised(lambda: ctx.set("temperature", 1)).error_code
    yield (
        [(trial.iteration, trial.value, dict(trial.metrics)) for trial in run.history()],
        ctx.optimization("temperature"),
    )
    with ctx.transaction() as tx:
        tx["stock"] += 1
        tx["note"] = "in a transaction"
    yield ctx["stock"], ctx["note"], len({ctx.history(name)[0].commit for name in ("stock", "note")})
    handle = ctx.handle("temperature", float)
    handle.value = 1.5
    yield handle.update(lambda value: value / 2), ctx.v.temperature
    yield (
        ctx.variables.pop("new"),
        ctx.variables.setdefault("more", 1),
        ctx.variables | {"z": 1},
        ctx.variables.popitem(),
    )
    with ctx.watch("stock", include_initial=True) as changes:
        ctx["stock"] = 20
        first, second = next(changes), next(changes)
    yield first.value, second.value, second.old
    ctx.define("a", 1)
    ctx.define("b", 1)
    yield [each.name for each in ctx.list("*o*")]
    yield str(ctx.describe()).splitlines()[1:]

    async def awaited() -> list[Any]:
        await ctx.set.aio("stock", 30, reason="awaited")
        await asyncio.gather(*(ctx.update.aio("stock", lambda stock: stock + 1) for _ in range(5)))
        return [
            await ctx.get.aio("stock"),
            (await ctx.history.aio("stock", 6))[-1].reason,
            await ctx.call.aio("add", amount=4),
        ]

    yield asyncio.run(awaited())
    ctx.end()
    yield raised(lambda: ctx["stock"]).error_code


def test_one_program_prints_the_same_on_each_backend(tmp_path: Path) -> None:
    tools = {"tools": "dspex_persist.testing.contract_tools"}
    with ServedDatabase(tmp_path / "served.db", tools) as served:
        printed = []
        for url, options in (
            ("local", {"tools": CONTRACT_TOOLS}),
            (str(tmp_path / "file.db"), {"tools": CONTRACT_TOOLS}),
            (served.url, {}),
        ):
            with dspex_persist.Context("program", url, actor="user:ann", **options) as ctx:
                printed.append(list(map(repr, program(ctx))))
        with dspex_persist.Context("moved", actor="user:ann", tools=CONTRACT_TOOLS) as ctx:
            running, lines = program(ctx), []
            for number, line in enumerate(running):
                lines.append(repr(line).replace("'moved'", "'program'"))
                if number == 8:
                    ctx.ensure_persistent(tmp_path / "moved.db")
                    assert ctx.backend.kind == "embedded"
            printed.append(lines)
    for other in printed[1:]:
        assert other == printed[0]
