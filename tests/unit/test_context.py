"""The cognitive layer over a fake provider, without files and network."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Definition, LocalState, aconnect, connect
from dspex_persist.cognitive import Context
from dspex_persist.cognitive.backends import Gate
from dspex_persist.cognitive.errors import ContextClosedError
from dspex_persist.cognitive.variables import Variables, decode
from dspex_persist.state import commands
from dspex_persist.state.errors import (
    DatabaseInUseError,
    InvalidArgumentError,
    InvalidConstraintsError,
    RuleViolatedError,
    SessionNotFoundError,
    StateError,
    VariableNotFoundError,
)
from dspex_persist.state.model import BatchOutcome, Origin, SessionView, Value, VariableVersion
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.watch import Watch
from tests.deadline import within
from tests.memory import MemoryGroups


class ScriptedProvider(StateProvider):
    """Answers each kind of command as the test says, and records the commands."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {"InitializeSession": SessionView(False, ())} | answers
        self.submitted: list[commands.Command[Any]] = []

    closed = 0

    def submit(self, command: commands.Command[Any], origin: Origin | None = None) -> Future[Any]:
        self.submitted.append(command)
        future: Future[Any] = Future()
        answer = self.answers[command.cause]
        if isinstance(answer, StateError):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future

    def watch(self, session_id: str, identifiers: Sequence[str] = (), *, after_sequence: int | None = None) -> Watch:
        raise NotImplementedError

    def check_open(self) -> None:
        pass

    def close(self) -> None:
        self.closed += 1

    def default_origin(self, cause: str, idempotency_key: str | None = None) -> Origin:
        return Origin("test", cause, idempotency_key=idempotency_key)


class MemoryProvider(ScriptedProvider):
    """Session state in memory."""

    def __init__(self) -> None:
        self.memory = MemoryGroups()

    def submit(self, command: commands.Command[Any], origin: Origin | None = None) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(self.memory.run(command, origin))
        except StateError as error:
            future.set_exception(error)
        return future


def test_a_context_begins_its_session_and_says_whether_it_resumed() -> None:
    provider = ScriptedProvider(InitializeSession=SessionView(True, ()))
    assert Context("s", provider, metadata={"who": "me"}).resumed
    assert provider.submitted == [commands.InitializeSession("s", {"who": "me"})]


@pytest.mark.parametrize(
    ("place", "meant"),
    [
        *((word, '"local"') for word in ("locl", "memory", "LOCAL", "local ", "memroy", ":memory", "in-memory")),
        ("embedded", '"sessions.db"'),
        *((word, '"grpc://HOST:PORT"') for word in ("bridged", "grpc", "localhost")),
    ],
)
def test_a_word_that_is_no_place_makes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for create in (True, False):
        with pytest.raises(InvalidArgumentError) as refused:
            Context("s", place, create=create)
        assert refused.value.field == "backend"
        assert f"did you mean {meant}" in str(refused.value).replace("a path, such as ", "")
        assert f"For the file, write './{place}'" in str(refused.value)
    with pytest.raises(InvalidArgumentError, match=r"invalid url: .* would be the name of a file; did you mean"):
        connect(place)
    assert list(tmp_path.iterdir()) == []
    Context("s", f"./{place}").close()
    assert (tmp_path / place).exists()


@pytest.mark.parametrize("place", ["memory:", ":memory:", "sessions", "locations", "memories", Path("memory")])
def test_other_words_are_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str | Path) -> None:
    monkeypatch.chdir(tmp_path)
    Context("s", place).close()


@pytest.mark.parametrize("place", [5, None, b"x.db", [], "", "grcp://h:1"])
def test_what_is_no_place_is_refused_as_the_backend(place: Any) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        Context("s", place)
    assert refused.value.field == "backend"


@pytest.mark.parametrize("ttl_s", [-1, float("nan"), float("inf"), 1e30, 10**400, "5", True])
def test_a_wrong_ttl_is_named(ttl_s: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^invalid ttl_s: it "):
        Context("s", ttl_s=ttl_s)


def test_a_closed_context_is_not_entered_again() -> None:
    context = Context("s")
    context.close()
    with pytest.raises(ContextClosedError, match="'s' is closed"), context:
        pytest.fail("it was entered")

    async def enter() -> None:
        async with context:
            pytest.fail("it was entered")

    with pytest.raises(ContextClosedError, match="'s' is closed"):
        asyncio.run(enter())


def test_a_transaction_ends_with_its_context() -> None:
    """The backend is the context's own here, and is closed with it."""
    for error in (ContextClosedError, KeyError):
        with pytest.raises(error), Context() as context, context.transaction() as tx:  # noqa: PT012
            tx["x"] = 1
            context.close()
            if error is KeyError:
                raise KeyError("the block's own error")


def test_writing_sends_one_command() -> None:
    provider = ScriptedProvider(SetVariable=4)
    Context("s", provider)["t"] = 0.5
    assert provider.submitted[-1] == commands.SetVariable("s", "t", Value("0.5"))


def test_defining_infers_the_type() -> None:
    provider = ScriptedProvider(RegisterVariable="var_n_1")
    assert Context("s", provider).define("n", 3, constraints={"min": 0}) == "var_n_1"
    assert provider.submitted[-1] == commands.RegisterVariable("s", "n", "integer", Value("3"), '{"min":0}')


@pytest.mark.parametrize("use", ["read", "write", "delete"])
def test_an_unknown_name_is_a_key_error(use: str) -> None:
    missing = VariableNotFoundError("s", "t")
    provider = ScriptedProvider(GetVariable=missing, SetVariable=missing, DeleteVariable=missing)
    context = Context("s", provider)
    uses: dict[str, Callable[[], object]] = {
        "read": lambda: context["t"],
        "write": lambda: context.set("t", 1),
        "delete": lambda: context.variables.__delitem__("t"),
    }
    with pytest.raises(KeyError, match="t"):
        uses[use]()


def test_history_and_batches_go_through() -> None:
    versions: list[VariableVersion] = []
    outcome = BatchOutcome(True, {"a": 1, "b": 1}, {})
    provider = ScriptedProvider(GetVariableHistory=versions, SetVariables=outcome)
    context = Context("s", provider)
    assert context.history("t", 5) == versions
    assert context.update_many({"a": 1, "b": "x"}) is outcome
    assert provider.submitted[-2:] == [
        commands.GetVariableHistory("s", "t", 5),
        commands.SetVariables("s", {"a": Value("1"), "b": Value('"x"')}, {}, True, raises=True),
    ]


class TestMapping:
    """A context is a mapping of its variables, and so is the context of a tool."""

    @pytest.fixture
    def context(self) -> Context:
        return Context("s", MemoryProvider())

    def test_a_new_one_is_empty_and_true(self, context: Context) -> None:
        assert (list(context), len(context), dict(context), "x" in context) == ([], 0, {}, False)
        assert context, "it stands for a session, which is there"
        assert context == context
        assert context != Context("s", MemoryProvider())
        assert len({context, context}) == 1
        assert repr(context) == "<Context of session 's' on local>"

    def test_it_has_what_a_dict_has(self, context: Context) -> None:
        context.define("x", 1)
        context.define("y", [1.5])
        assert "x" in context
        assert "z" not in context
        assert 5 not in context  # type: ignore[comparison-overlap]
        assert list(context) == list(context.keys()) == ["x", "y"]
        assert len(context) == 2
        assert (context.get("x"), context.get("z"), context.get("z", 3)) == (1, None, 3)
        assert list(context.values()) == [1, [1.5]]
        assert dict(context.items()) == dict(context) == {**context} == {"x": 1, "y": [1.5]}
        context.variables.update({"x": 2}, y=[2.5])
        context.variables.update([("x", 3)])
        assert dict(context) == context.variables == {"x": 3, "y": [2.5]}
        assert context.variables.pop("y") == [2.5]
        assert context.variables.setdefault("x", 5) == 3
        del context["x"]
        assert not list(context)

    def test_updates_are_atomic(self, context: Context) -> None:
        context.define("x", 1)
        with pytest.raises(VariableNotFoundError, match="'missing'"):
            context.update_many({"x": 2, "missing": 3})
        assert context["x"] == 1

    def test_a_batch_raises_what_a_single_write_raises(self, context: Context) -> None:
        context.define_many({"temperature": 1, "top": 2, "mood": "calm"})
        context.rule("order", "temperature <= top")
        for name, value in (("temprature", 1), ("temperature", 3), ("mood", 5), ("temperature", 0.5)):
            with pytest.raises(StateError) as single:
                context.set(name, value)
            with pytest.raises(StateError) as batch:
                context.update_many({name: value})
            assert (type(batch.value), str(batch.value)) == (type(single.value), str(single.value))
        with pytest.raises(VariableNotFoundError, match="did you mean 'temperature'"):
            context.update_many({"top": 5, "temprature": 1})
        assert context["top"] == 2

    @pytest.mark.parametrize(
        ("value", "type_name", "constraints", "reason"),
        [
            (1, None, {"mn": 1}, "type integer has no constraint 'mn'; did you mean min? It can have max, min"),
            (1.0, None, {"MAX": 1}, "no constraint 'MAX'; did you mean max? It can have max, min"),
            ("x", None, {"min": 1}, "no constraint 'min'; it can have enum, max_length, min_length, pattern"),
            ("x", None, {"minLength": 1}, "did you mean min_length?"),
            ("x", "choice", {"enum": ["x"]}, "type choice has no constraint 'enum'; it can have choices"),
            (True, None, {"min": 0}, "type boolean has no constraint 'min'; it has no constraints"),
            (1, None, '{"min": 0, "step": 1}', "no constraint 'step'"),
        ],
    )
    def test_a_misspelt_constraint_is_refused(
        self, context: Context, value: object, type_name: str | None, constraints: Any, reason: str
    ) -> None:
        definition = Definition(value, type_name=type_name, constraints=constraints)
        for define in (
            lambda: context.define("x", value, type_name=type_name, constraints=constraints),
            lambda: context.define_many({"x": definition}),
        ):
            with pytest.raises(InvalidConstraintsError) as refused:
                define()
            assert reason in str(refused.value)
        assert "x" not in context

    def test_other_clients_may_keep_unknown_keys_with_constraints(self, context: Context) -> None:
        """The protocol wants it so."""
        context.backend.provider.register_variable("s", "x", "float", 0.5, constraints={"min": 0, "step": 0.1})
        assert context.info("x").constraints == {"min": 0, "step": 0.1}

    def test_a_refusal_for_several_variables_is_said_once(self, context: Context) -> None:
        context.define_many({"low": 1, "high": 2})
        context.rule("order", "low <= high")
        with pytest.raises(RuleViolatedError) as refused:
            context.update_many({"low": 5, "high": 4})
        assert str(refused.value).count("low <= high") == 1

    @pytest.mark.parametrize("wrong", [5, [1, 2], "ab", None])
    def test_an_argument_that_is_not_a_mapping_is_refused(self, context: Context, wrong: Any) -> None:
        reason = "invalid changes: it must be a mapping, such as a dict, not"
        for write in (context.variables.update, context.update_many):
            with pytest.raises(InvalidArgumentError, match=reason):
                write(wrong)

    @pytest.mark.parametrize(
        ("define", "field"),
        [
            (lambda v: v.define(3, 1), "name"),
            (lambda v: v.define("x", 1, type_name=5), "type"),
            (lambda v: v.define("x", 1, metadata={"sensitive": True}), 'write "true"'),
            (lambda v: v.define("x", 1, constraints=5), "constraints"),
            (lambda v: v.define("x", None), "None has no type"),
            (lambda v: v.define("x", object()), "no JSON form"),
            (lambda v: v.set("there", 1, metadata={"n": 1}), 'write "1"'),
            (lambda v: v.set("there", 1, expected_version="1"), "expected_version"),
            (lambda v: v.rollback("there", "0"), "invalid version"),
            (lambda v: v.history("there", "0"), "limit"),
            (lambda v: v.list(5), "pattern"),
            (lambda v: v.get_many(5), "invalid names"),
        ],
    )
    def test_wrong_arguments_are_named(
        self, context: Context, define: Callable[[Variables], object], field: str
    ) -> None:
        context.define("there", 1)
        with pytest.raises(StateError, match=field):
            define(context)
        assert dict(context) == {"there": 1}

    def test_an_ordinary_dict_is_not_a_tensor(self, context: Context) -> None:
        boxes: list[dict[str, Any]] = [
            {"shape": "round", "data": "lid"},
            {"shape": [2], "data": [1]},
            {"shape": [1], "data": ["no number"]},
            {"shape": None, "data": None},
            {"shape": [[1]], "data": [1]},
        ]
        for number, box in enumerate(boxes):
            context.define(f"box{number}", box)
            assert context.info(f"box{number}").type == "map"
            context[f"box{number}"] = context[f"box{number}"]
        context.define("tensor", {"shape": [2, 1], "data": [[1], [2]]})
        assert context.info("tensor").type == "tensor"
        context.define("plain", {}, type_name="map")
        context["plain"] = {"shape": [1], "data": [1]}
        assert context["plain"] == {"shape": [1], "data": [1]}

    def test_a_missing_name_shows_one_error_and_a_similar_name(self, context: Context) -> None:
        context.define("temperature", 1.0)
        uses: list[Callable[[], object]] = [
            lambda: context["temprature"],
            lambda: context.set("temprature", 1.0),
            lambda: context.__delitem__("temprature"),
        ]
        for use in uses:
            with pytest.raises(KeyError, match="did you mean 'temperature'") as error:
                use()
            assert error.value.__suppress_context__ or error.value.__context__ is None
            assert "?;" not in str(error.value)

    def test_assigning_defines_unless_strict(self, context: Context) -> None:
        context["x"] = 1
        context["x"] = 2
        context.variables["text"] = "a"
        assert context.variables == {"x": 2, "text": "a"}
        assert [entry.version for entry in context.history("x")] == [1, 0]
        strict = Context("t", MemoryProvider(), strict=True)
        with pytest.raises(KeyError, match="define it first"):
            strict["x"] = 1
        assert not strict.variables

    def test_a_history_is_decoded(self, context: Context) -> None:
        context.define("x", {"a": [1]})
        context["x"] = {"a": []}
        context.delete("x")
        history = context.history("x")
        assert [entry.value for entry in history] == [None, {"a": []}, {"a": [1]}]
        assert [decode(entry.record) for entry in history] == [None, {"a": []}, {"a": [1]}]


def test_a_context_closes_what_it_opened_and_nothing_else() -> None:
    provider = ScriptedProvider()
    with Context("s", provider) as context:
        assert not context.closed
    context.close()
    assert (context.closed, provider.closed) == (True, 0)
    with Context("s") as own:
        own["x"] = 1
        assert (own.backend.kind, own.backend.url, own.backend.switches) == ("local", "", ())
    with pytest.raises(ContextClosedError, match="the context of session 's' is closed"):
        own["x"]
    own.close()
    own.backend.provider.close()
    with pytest.raises(StateError):
        own.backend.provider.check_open()


def test_a_provider_given_first_is_told_the_order() -> None:
    wrong: Any = ScriptedProvider()
    with pytest.raises(InvalidArgumentError, match=r"Context\(session_id, provider\)"):
        Context(wrong, "s")


def test_only_what_exists_is_opened_on_request() -> None:
    provider = MemoryProvider()
    with pytest.raises(SessionNotFoundError):
        Context("s", provider, create=False)
    with pytest.raises(InvalidArgumentError, match="ttl_s"):
        Context("s", provider, ttl_s="60")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="metadata"):
        Context("s", provider, metadata=5)  # type: ignore[arg-type]
    Context("s", provider, ttl_s=60)
    assert Context("s", provider, create=False).resumed
    assert provider.get_session("s").metadata == {"ttl_seconds": "60"}
    assert Context().session_id != Context().session_id


def test_opening_only_what_exists_creates_no_file(tmp_path: Path) -> None:
    async def open_it() -> None:
        await Context.aopen("s", path, create=False)

    path = tmp_path / "state.db"
    for place in (path, str(path), f"sqlite:///{path}"):
        with pytest.raises(SessionNotFoundError, match="'s'"):
            Context("s", place, create=False)
    with pytest.raises(SessionNotFoundError, match="'s'"):
        asyncio.run(open_it())
    assert not list(tmp_path.iterdir())
    Context("s", path).close()
    with Context("s", path, create=False) as context:
        assert context.resumed


def test_every_verb_can_be_awaited() -> None:
    async def use() -> list[Any]:
        async with Context.aopen("s") as context:
            await context.define.aio("x", 1)
            await context.set.aio("x", 2)
            await asyncio.gather(*(context.update.aio("x", lambda x: x + 1) for _ in range(10)))

            async def double(x: int) -> int:
                await asyncio.sleep(0)
                return 2 * x

            seen = [await context.update.aio("x", double), await context.get.aio("x"), context.closed]
            with pytest.raises(TypeError, match=r"ctx\.update\.aio"):
                context.update("x", double)
        return [*seen, context.closed]

    assert asyncio.run(use()) == [24, 24, False, True]


def test_threads_that_update_lose_nothing() -> None:
    with Context() as context:
        context["n"] = 0
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: context.update("n", lambda n: n + 1), range(100)))
        assert context["n"] == 100


class TestGate:
    def test_a_holder_waits_for_calls_and_calls_wait_for_it(self) -> None:
        gate, order = Gate(), list[str]()
        inside, leave = threading.Event(), threading.Event()

        def call() -> None:
            inside.set()
            leave.wait(within(30))
            order.append("call")

        first = threading.Thread(target=gate.pass_through, args=(call,))
        first.start()
        assert inside.wait(within(30))

        def hold() -> None:
            with gate.hold():
                order.append("held")
                second.start()
                assert gate.held
                order.append("let go")

        second = threading.Thread(target=gate.pass_through, args=(lambda: order.append("second"),))
        holder = threading.Thread(target=hold)
        holder.start()
        leave.set()
        for thread in (first, holder, second):
            thread.join(within(30))
        assert order == ["call", "held", "let go", "second"]
        assert (gate.calls, gate.held) == ([], False)

    def test_a_holder_lets_other_calls_pass_while_it_waits_for_a_tool(self) -> None:
        gate = Gate()
        assert gate.enter_tool()
        with pytest.raises(TimeoutError), gate.hold(timeout_s=0):
            pass
        holding = threading.Event()

        def hold() -> None:
            with gate.hold():
                holding.set()

        holder = threading.Thread(target=hold)
        holder.start()
        deadline = time.monotonic() + within(30)
        while gate.enter_tool(wait=False):
            gate.leave_tool()
            assert time.monotonic() < deadline
        assert gate.pass_through(lambda: 5) == 5
        gate.leave_tool()
        assert holding.wait(within(30))
        holder.join(within(30))


def test_a_state_can_be_opened_and_closed_from_asyncio() -> None:
    async def use() -> list[Any]:
        async with aconnect(":memory:") as state:
            seen: list[Any] = []
            async with Context.aopen("s", state, strict=True) as context:
                await context.define.aio("x", 1)
                seen += [context.strict, context.resumed]
            state.check_open()
            other = await Context.aopen("s", state)
            seen += [await other.get.aio("x"), other.resumed]
            with pytest.raises(SessionNotFoundError):
                await Context.aopen("t", state, create=False)
        with pytest.raises(StateError):
            state.check_open()
        async with LocalState() as owned:
            owned.check_open()
        with pytest.raises(StateError):
            owned.check_open()
        return seen

    assert asyncio.run(use()) == [True, False, 1, True]


def test_what_a_backend_says(tmp_path: Path) -> None:
    with Context("s", tmp_path / "x.db") as context:
        assert (context.backend.kind, context.backend.url) == ("embedded", str(tmp_path / "x.db"))
        assert {"durable", "audit"} <= context.backend.capabilities
        assert repr(context.backend) == f"<Backend embedded {tmp_path / 'x.db'}>"
        with pytest.raises(DatabaseInUseError, match="use that one, or close"):
            Context("t", str(tmp_path / "x.db"))
    with pytest.raises(ContextClosedError):
        context.get("x")
    with connect(tmp_path / "x.db") as state, Context("s", state) as context:
        assert (context.resumed, context.backend.url) == (True, state.url)
    capabilities = Context().backend.capabilities
    assert "audit" in capabilities
    assert not capabilities & {"durable", "pruning", "remote", "distributed"}


def test_the_backend_of_another_context_is_shared_by_its_provider() -> None:
    with Context("s") as one:
        view: Any = one.backend
        with pytest.raises(InvalidArgumentError, match=r"BackendView.*pass its ctx\.backend\.provider"):
            Context("s", view)
        with Context("s", one.backend.provider) as other:
            other["x"] = 1
        assert one["x"] == 1
