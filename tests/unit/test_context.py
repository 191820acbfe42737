"""The cognitive layer over a fake provider, without files and network."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from dspex_persist.cognitive import Context
from dspex_persist.cognitive.variables import VariableMapping, decode
from dspex_persist.state import commands
from dspex_persist.state.errors import InvalidArgumentError, StateError, VariableNotFoundError
from dspex_persist.state.model import Origin, SessionView, Value, VariableVersion
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.watch import Watch
from tests.memory import MemoryGroups


class ScriptedProvider(StateProvider):
    """Answers each kind of command as the test says, and records the commands."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {"InitializeSession": SessionView(False, ())} | answers
        self.submitted: list[commands.Command[Any]] = []

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
        pass

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
    assert Context(provider, "s", {"who": "me"}).resumed
    assert provider.submitted == [commands.InitializeSession("s", {"who": "me"})]


def test_writing_sends_one_command() -> None:
    provider = ScriptedProvider(SetVariable=4)
    Context(provider, "s")["t"] = 0.5
    assert provider.submitted[-1] == commands.SetVariable("s", "t", Value("0.5"))


def test_defining_infers_the_type() -> None:
    provider = ScriptedProvider(RegisterVariable="var_n_1")
    assert Context(provider, "s").variables.define("n", 3, constraints={"min": 0}) == "var_n_1"
    assert provider.submitted[-1] == commands.RegisterVariable("s", "n", "integer", Value("3"), '{"min":0}')


@pytest.mark.parametrize("use", ["read", "write", "delete"])
def test_an_unknown_name_is_a_key_error(use: str) -> None:
    missing = VariableNotFoundError("s", "t")
    provider = ScriptedProvider(GetVariable=missing, SetVariable=missing, DeleteVariable=missing)
    context = Context(provider, "s")
    uses: dict[str, Callable[[], object]] = {
        "read": lambda: context["t"],
        "write": lambda: context.variables.__setitem__("t", 1),
        "delete": lambda: context.variables.__delitem__("t"),
    }
    with pytest.raises(KeyError, match="t"):
        uses[use]()


def test_history_and_batches_go_through() -> None:
    versions: list[VariableVersion] = []
    provider = ScriptedProvider(GetVariableHistory=versions, SetVariables="outcome")
    context = Context(provider, "s")
    assert context.variables.history("t", 5) is versions
    context.variables.update_all({"a": 1, "b": "x"})
    assert provider.submitted[-2:] == [
        commands.GetVariableHistory("s", "t", 5),
        commands.SetVariables("s", {"a": Value("1"), "b": Value('"x"')}, {}, True),
    ]


class TestMapping:
    """A context is a mapping of its variables, and so is the context of a tool."""

    @pytest.fixture
    def context(self) -> Context:
        return Context(MemoryProvider(), "s")

    def test_a_new_one_is_empty_and_true(self, context: Context) -> None:
        assert (list(context), len(context), dict(context), "x" in context) == ([], 0, {}, False)
        assert context, "it stands for a session, which is there"
        assert context == context
        assert context != Context(MemoryProvider(), "s")
        assert len({context, context}) == 1
        assert repr(context) == "<Context of session 's'>"

    def test_it_has_what_a_dict_has(self, context: Context) -> None:
        context.variables.define("x", 1)
        context.variables.define("y", [1.5])
        assert "x" in context
        assert "z" not in context
        assert 5 not in context  # type: ignore[comparison-overlap]
        assert list(context) == list(context.keys()) == ["x", "y"]
        assert len(context) == 2
        assert (context.get("x"), context.get("z"), context.get("z", 3)) == (1, None, 3)
        assert list(context.values()) == [1, [1.5]]
        assert dict(context.items()) == dict(context) == {**context} == {"x": 1, "y": [1.5]}
        context.update({"x": 2}, y=[2.5])
        context.update([("x", 3)])
        assert dict(context) == {"x": 3, "y": [2.5]}
        assert context.pop("y") == [2.5]
        assert context.setdefault("x", 5) == 3
        del context["x"]
        assert not list(context)

    def test_updates_are_atomic(self, context: Context) -> None:
        context.variables.define("x", 1)
        with pytest.raises(InvalidArgumentError, match="'missing'"):
            context.update({"x": 2, "missing": 3})
        assert context["x"] == 1

    @pytest.mark.parametrize("wrong", [5, [1, 2], "ab", None])
    def test_an_argument_that_is_not_a_mapping_is_refused(self, context: Context, wrong: Any) -> None:
        reason = "invalid updates: it must be a mapping, such as a dict, not"
        for write in (context.update, context.variables.set_all, context.variables.update_all):
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
            (lambda v: v.rollback("there", "0"), "target_version"),
            (lambda v: v.history("there", "0"), "limit"),
            (lambda v: v.list(5), "pattern"),
            (lambda v: v.get_all(5), "identifiers"),
        ],
    )
    def test_wrong_arguments_are_named(
        self, context: Context, define: Callable[[VariableMapping], object], field: str
    ) -> None:
        context.variables.define("there", 1)
        with pytest.raises(StateError, match=field):
            define(context.variables)
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
            context.variables.define(f"box{number}", box)
            assert context.variables.describe(f"box{number}").type == "map"
            context[f"box{number}"] = context[f"box{number}"]
        context.variables.define("tensor", {"shape": [2, 1], "data": [[1], [2]]})
        assert context.variables.describe("tensor").type == "tensor"
        context.variables.define("plain", {}, type_name="map")
        context["plain"] = {"shape": [1], "data": [1]}
        assert context["plain"] == {"shape": [1], "data": [1]}

    def test_a_missing_name_shows_one_error_and_a_similar_name(self, context: Context) -> None:
        context.variables.define("temperature", 1.0)
        uses: list[Callable[[], object]] = [
            lambda: context["temprature"],
            lambda: context.__setitem__("temprature", 1.0),
            lambda: context.__delitem__("temprature"),
        ]
        for use in uses:
            with pytest.raises(KeyError, match="did you mean 'temperature'") as error:
                use()
            assert error.value.__suppress_context__
            assert "?;" not in str(error.value)

    def test_a_history_is_decoded(self, context: Context) -> None:
        context.variables.define("x", {"a": [1]})
        context["x"] = {"a": []}
        context.variables.delete("x")
        history = context.variables.history("x")
        assert [decode(entry) for entry in history] == [None, {"a": []}, {"a": [1]}]
