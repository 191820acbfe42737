"""SessionContext and what adapters import beside it: over a stub, a channel, a provider, and inside a tool."""

import asyncio
import queue
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge

import dspex_persist
from dspex_persist import Context, connect
from dspex_persist.cognitive.errors import ToolLoadError
from dspex_persist.compat import (
    BaseAdapter,
    BridgeServiceStub,
    SessionContext,
    ThreadSafeAdapter,
    VariableType,
    tool,
    toolbox,
)
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.errors import (
    InvalidArgumentError,
    InvalidValueError,
    RuleViolatedError,
    SessionNotFoundError,
    ToolFailedError,
    UnsupportedError,
    VariableNotFoundError,
)
from tests.deadline import within
from tests.end_to_end.gates import DEADLINE_S
from tests.end_to_end.old_style import ROOT, STUBS, environment, serve, target_of

POOL = f"""
[pools.context]
command = ["{sys.executable}", "-m", "tests.workers.stand_in", "--generation", "old", "--port", "{{port}}",
  "--elixir-address", "{{address}}", "--session-context"]
size = 1
tools = ["increase", "fail", "below", "write_together"]
env = {{ PYTHONPATH = "{ROOT}:{STUBS}" }}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """It has the tools of an adapter, and a pool of workers whose tools use a SessionContext."""
    folder = tmp_path_factory.mktemp("compat")
    (folder / "pool.toml").write_text(POOL)
    options = ("--tools", "tests.workers.shop_tools:tools", "--config", str(folder / "pool.toml"))
    with serve(folder / "sessions.db", *options) as process:
        yield process


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


@pytest.fixture(params=["stub", "channel", "provider"])
def ctx(request: pytest.FixtureRequest, name: str) -> Iterator[SessionContext]:
    """The same session over each of the ways to it."""
    if request.param == "provider":
        with connect("memory:") as state:
            yield SessionContext(state, name)
        return
    server = request.getfixturevalue("server")
    with grpc.insecure_channel(target_of(server)) as channel:
        stub = bridge.BridgeServiceStub(channel)
        stub.InitializeSession(pb.InitializeSessionRequest(session_id=name))
        yield SessionContext(stub if request.param == "stub" else channel, name)


def test_variables_in_every_way(ctx: SessionContext) -> None:
    id_ = ctx.register_variable("temperature", VariableType.FLOAT, 0.7, constraints={"max": 2}, metadata={"for": "all"})
    assert id_.startswith("var_temperature")
    assert ctx.register_variable("temperature", "float", 0.1, {"max": 2}) == id_
    assert (ctx["temperature"], ctx.get_variable(id_), ctx.v.temperature) == (0.7, 0.7, 0.7)
    ctx.update_variable(id_, 0.8, metadata={"why": "test"})
    ctx.v.temperature += 0.1
    proxy = ctx.variable("temperature")
    assert proxy is ctx.variable("temperature")
    proxy.value += 0.1
    assert proxy.value == pytest.approx(1.0)
    ctx["made"] = 42
    ctx.v.also_made = [1, 2]
    assert ("made" in ctx, "other" in ctx) == (True, False)
    assert ctx.get_variables(["made", "also_made"]) == {"made": 42, "also_made": [1, 2]}
    assert ctx.get_variables([]) == {}
    (listed,) = ctx.list_variables("temp*")
    assert {name: listed[name] for name in ("id", "name", "type", "version", "constraints", "optimizing")} == {
        "id": id_,
        "name": "temperature",
        "type": "float",
        "version": 3,
        "constraints": {"max": 2},
        "optimizing": False,
    }
    assert listed["metadata"]["for"] == "all"
    assert [each["name"] for each in ctx.list_variables()] == ["temperature", "made", "also_made"]
    ctx.delete_variable("made")
    assert "made" not in ctx
    with pytest.raises(TypeError):
        iter(ctx)  # type: ignore[call-overload]


def test_errors_are_what_existing_programs_catch(ctx: SessionContext) -> None:
    ctx.register_variable("count", "integer", 1, {"max": 10})
    with pytest.raises(KeyError, match="not found") as missing:
        ctx["other"]
    with pytest.raises(ValueError, match="above maximum") as wrong:
        ctx["count"] = 11
    with pytest.raises(grpc.RpcError) as again:
        ctx.register_variable("count", "string", "x")
    found = [missing.value, wrong.value, again.value]
    assert [error.code() for error in found] == [  # type: ignore[attr-defined]
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ALREADY_EXISTS,
    ]
    assert isinstance(missing.value, VariableNotFoundError)
    assert isinstance(wrong.value, InvalidValueError)
    assert isinstance(again.value, RuntimeError)
    with pytest.raises(VariableNotFoundError):
        ctx.get_variables(["count", "other"])
    with pytest.raises(ValueError, match="no_type"):
        ctx.register_variable("x", "no_type", 1)


def test_a_batch_is_one_commit_or_none(ctx: SessionContext) -> None:
    ctx.register_variable("a", "integer", 1)
    ctx.register_variable("b", "integer", 2, {"max": 10})
    with ctx.batch_updates() as batch:
        batch["a"], batch["b"] = 3, 4
        assert ctx["a"] == 1
    assert ctx.get_variables(["a", "b"]) == {"a": 3, "b": 4}
    with pytest.raises(ValueError, match="above maximum"), ctx.batch_updates() as batch:
        batch["a"], batch["b"] = 5, 11
    with pytest.raises(VariableNotFoundError), ctx.batch_updates() as batch:
        batch["a"], batch["c"] = 5, 1
    with pytest.raises(ZeroDivisionError), ctx.batch_updates() as batch:
        batch["a"] = 1 / 0
    assert ctx.get_variables(["a", "b"]) == {"a": 3, "b": 4}
    assert ctx.update_variables({"a": 6, "b": 11})["a"] is True
    refused = ctx.update_variables({"a": 7, "b": 11}, atomic=True)
    assert "above maximum" in str(refused["b"])
    assert ctx.update_variables({}) == {}
    assert ctx.get_variables(["a", "b"]) == {"a": 6, "b": 4}
    with ctx.batch_updates() as batch:
        batch["a"] = 8
        assert batch.commit() == {"a": True}
        ctx["a"] = 9
    assert ctx["a"] == 9


def test_reads_are_fresh_unless_they_need_not_be(ctx: SessionContext) -> None:
    other = SessionContext(ctx.stub, ctx.session_id)
    ctx["a"] = [1]
    assert ctx["a"] == [1]
    other["a"] = [2]
    assert ctx["a"] == [2]
    ctx.set_cache_ttl(timedelta(hours=1))
    ctx["a"].append(3)
    assert ctx["a"] == [2]
    other["a"] = [4]
    assert ctx["a"] == [2]
    ctx.clear_cache()
    assert ctx["a"] == [4]
    with ctx.batch_updates() as batch:
        batch["a"] = [5]
    assert ctx["a"] == [5]
    ctx.set_cache_ttl(timedelta(0))
    other["a"] = [6]
    assert ctx["a"] == [6]


def test_changes_are_told(ctx: SessionContext) -> None:
    told: queue.Queue[Any] = queue.Queue()
    ctx["a"] = 1
    watch = ctx.watch_variable("a", lambda *change: told.put(change))
    ctx.update_variable("a", 2, metadata={"why": "test"})
    name, old, new, metadata = told.get(timeout=DEADLINE_S)
    assert (name, old, new, metadata["why"]) == ("a", 1, 2, "test")
    watch.close()


def test_the_end_of_the_block_ends_the_session(ctx: SessionContext) -> None:
    with ctx as inside:
        inside["a"] = 1
    ctx.cleanup()
    is_provider = isinstance(ctx.stub, dspex_persist.StateProvider)
    with pytest.raises(SessionNotFoundError, match="not found"):
        _ = ctx.stub.get_session(ctx.session_id) if is_provider else ctx["a"]


def test_closing_leaves_the_session(ctx: SessionContext) -> None:
    ctx["a"] = 1
    ctx.close()
    assert SessionContext(ctx.stub, ctx.session_id)["a"] == 1


def test_strict_mode_registers_nothing(name: str) -> None:
    with Context(name) as context:
        ctx = SessionContext(context, strict_mode=True)
        with pytest.raises(VariableNotFoundError, match="define it first"):
            ctx["a"] = 1
        assert (ctx.session_id, "a" in ctx) == (name, False)
        with pytest.raises(ValueError, match="is not that of"):
            SessionContext(context, "other")


@pytest.mark.parametrize("wrong", [None, 3, object()])
def test_what_is_no_way_to_a_session_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="stub, a channel, an address or a provider"):
        SessionContext(wrong, "s")


def test_stubs_that_cannot_be_used_say_why(server: ServerProcess) -> None:
    without = SimpleNamespace(ExecuteTool=print)
    with pytest.raises(ValueError, match="no GetVariable, SetVariable: make it with BridgeServiceStub"):
        SessionContext(without, "s")["a"]

    async def make() -> None:
        async with grpc.aio.insecure_channel(target_of(server)) as channel:
            for each in (channel, BridgeServiceStub(channel)):
                with pytest.raises(ValueError, match="asynchronous"):
                    SessionContext(each, "s")["a"]

    asyncio.run(make())
    with grpc.insecure_channel(target_of(server)) as channel:
        stub = BridgeServiceStub(channel)
        stub.InitializeSession(pb.InitializeSessionRequest(session_id="s"))
        context = SessionContext(stub, "s")._variables
        with pytest.raises(UnsupportedError, match="channel instead of a stub"):
            context.define_many({"a": 1, "b": 2})


# Inside workers and tools


def test_a_worker_in_a_pool(provider: BridgedState, name: str) -> None:
    """What its tools do with a SessionContext is part of their transactions."""
    context = Context(name, provider)
    context.define_many({"a": 0, "b": 0})
    done = provider.execute_tool(name, "write_together", {"fails": False})
    assert done.error is None
    assert context.get_many("a", "b") == {"a": 7, "b": 8}
    assert {entry.cause for each in "ab" for entry in context.history(each, 1)} == {done.execution_id}
    refused = provider.execute_tool(name, "write_together", {"fails": True})
    assert isinstance(refused.error, ToolFailedError)
    assert "invalid value for 'b'" in str(refused.error)
    assert context.call("below", amount=3) == [10, 10]
    with pytest.raises(ToolFailedError, match="it went wrong"):
        context.call("fail")
    assert context["a"] == 10


def test_an_adapter_that_knows_nothing_of_this_package(provider: BridgedState, name: str) -> None:
    shop = Context(name, provider)
    with pytest.raises(dspex_persist.StateError, match="stock"):
        shop.call("sell")
    assert shop.call("open_shop", stock=5).startswith("var_stock")
    assert shop.call("sell", amount=2) == {"left": 3, "sold": 2, "ready": True}
    with pytest.raises(ToolFailedError, match=r"InvalidValueError: .*below minimum"):
        shop.call("sell", amount=9)
    assert shop["stock"] == 3
    assert shop.call("sell_twice") == [2, 1]
    assert shop.call("price") == [["price_of"], 3]
    assert shop.call("peek") == 1
    assert list(provider.stream_tool(name, "count", {"to": 3})) == [0, 1, 2]
    assert shop["stock"] == 2
    spec = next(spec for spec in provider.list_tools(name) if spec.name == "sell")
    assert (spec.description, spec.required_variables) == ("Sell some", ("stock",))
    assert [(each.name, each.type, each.required) for each in spec.parameters] == [("amount", "integer", False)]


def test_exposed_tools_are_called_by_name_or_like_functions(provider: BridgedState, name: str) -> None:
    ctx = SessionContext(provider, name)
    price_of = ctx.elixir_tools["price_of"]
    assert (price_of(what="abc"), ctx.call_elixir_tool("price_of", what="ab")) == (9, 6)
    assert (price_of["description"], price_of["parameters"]) == ("Return a price.", {"what": "string"})
    with pytest.raises(ValueError, match="not found; available: \\['price_of'\\]"):
        ctx.call_elixir_tool("sell")
    with pytest.raises(RuntimeError):
        ctx.call_tool("open_shop", stock=-1)
    assert ctx.call_tool("open_shop", stock=1)


class Own(BaseAdapter):
    """One without `execute_tool`, and with asynchronous tools."""

    @tool(supports_streaming=True)
    async def tick(self, to: int = 2) -> Any:
        """Count slowly."""
        for number in range(to):
            await asyncio.sleep(0)
            yield SimpleNamespace(data={"number": number}, is_final=number == to - 1)

    @tool()
    def fail(self) -> None:
        raise LookupError("it is not there")


def test_tools_of_an_adapter_in_memory() -> None:
    with Context(tools=toolbox(Own)) as context:
        assert context.call("tick", to=3) == [{"number": 0}, {"number": 1}, {"number": 2}]
        with pytest.raises(ToolFailedError, match="LookupError: it is not there"):
            context.call("fail")
    with pytest.raises(ToolLoadError, match="no method has @tool"):
        toolbox(ThreadSafeAdapter)
    with pytest.raises(ToolLoadError, match="the class of the adapter"):
        toolbox(Own())  # type: ignore[arg-type]
    assert Own().call_tool.__name__ == "call_tool"
    with pytest.raises(AttributeError, match="not found in Own"):
        Own().call_tool("get_tools")


def test_an_adapter_registers_its_tools(server: ServerProcess, provider: BridgedState, name: str) -> None:
    provider.initialize_session(name)

    async def register() -> list[str]:
        async with grpc.aio.insecure_channel(target_of(server)) as channel:
            return await Own().register_with_session_async(name, BridgeServiceStub(channel))

    with grpc.insecure_channel(target_of(server)) as channel:
        assert Own().register_with_session(name, BridgeServiceStub(channel)) == ["tick", "fail"]
        assert Own().register_with_session("nobody", BridgeServiceStub(channel)) == []
    assert asyncio.run(register()) == ["tick", "fail"]
    assert {"tick", "fail"} <= {spec.name for spec in provider.list_tools(name)}


def test_threads_of_an_adapter() -> None:
    adapter = ThreadSafeAdapter()
    with adapter.acquire_lock(), adapter.acquire_lock():
        adapter.set_thread_local("a", 1)
    assert (adapter.get_thread_local("a"), adapter.get_thread_local("b", 2)) == (1, 2)
    adapter.clear_thread_local("a")
    adapter.clear_thread_local()
    assert adapter.get_thread_local("a") is None


NAMES = """
import sys
import dspex_persist.compat as compat
compat.install()
compat.install()
import snakepit_bridge, snakepit_bridge_pb2, snakepit_bridge_pb2_grpc
from snakepit_bridge import SessionContext, VariableNotFoundError, VariableProxy, VariableType
from snakepit_bridge.base_adapter import BaseAdapter, ToolMetadata, tool
from snakepit_bridge.base_adapter_threaded import ThreadSafeAdapter, thread_safe_method
from snakepit_bridge.grpc import snakepit_bridge_pb2 as nested
from snakepit_bridge.grpc.snakepit_bridge_pb2_grpc import BridgeServiceStub
from snakepit_bridge.logging_config import configure_logging, get_logger
from snakepit_bridge.session_context import SessionContext as same
from snakepit_bridge.types import VariableType
assert same is SessionContext is compat.SessionContext and nested is snakepit_bridge_pb2
configure_logging(level="INFO")
for name in ("snakepit_bridge.telemetry", "snakepit_bridge.heartbeat"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        print(error)
try:
    from snakepit_bridge import TypeValidator
except ImportError as error:
    print(error)
del sys.modules["snakepit_bridge"]
sys.modules["snakepit_bridge"] = type(sys)("snakepit_bridge")
try:
    compat.install()
except ImportError as error:
    print(error)
"""


def test_the_names_that_adapters_import() -> None:
    argv = [sys.executable, "-W", "error", "-c", NAMES]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=within(60), check=False)
    assert done.returncode == 0, done.stderr
    telemetry, _, validator, twice = done.stdout.splitlines()
    assert telemetry.startswith("dspex_persist.compat has no snakepit_bridge.telemetry; it has snakepit_bridge.base_")
    assert validator.startswith("snakepit_bridge has no TypeValidator here; dspex_persist.compat has BaseAdapter, ")
    assert "imported already" in twice


def test_a_rule_refuses_a_batch(name: str) -> None:
    with Context(name) as context:
        context.define_many({"a": 1, "b": 2})
        context.rule("ordered", "a <= b")
        ctx = SessionContext(context)
        with pytest.raises(RuleViolatedError) as refused, ctx.batch_updates() as batch:
            batch["a"] = 3
        assert isinstance(refused.value, RuntimeError)
        assert "ordered" in str(ctx.update_variables({"a": 3}, atomic=True)["a"])


def test_a_path_is_an_address(tmp_path: Path) -> None:
    ctx = SessionContext(tmp_path / "sessions.db", "s")
    ctx["a"] = 1
    ctx.close()
    with Context("s", tmp_path / "sessions.db") as context:
        assert context["a"] == 1
