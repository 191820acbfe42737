"""The cognitive layer over a provider double: no file, no wire."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from dspex_persist.cognitive import Context
from dspex_persist.state import commands
from dspex_persist.state.errors import StateError, VariableNotFoundError
from dspex_persist.state.model import Origin, SessionView, Value, VariableVersion
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.watch import Watch


class ScriptedProvider(StateProvider):
    """Answers each kind of command as a test says, and remembers what it was asked."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {"InitializeSession": SessionView(False, ())} | answers
        self.asked: list[commands.Command[Any]] = []

    def submit(self, command: commands.Command[Any], origin: Origin | None = None) -> Future[Any]:
        self.asked.append(command)
        future: Future[Any] = Future()
        answer = self.answers[command.cause]
        if isinstance(answer, StateError):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future

    def watch(self, session_id: str, identifiers: Sequence[str] = (), *, after_sequence: int | None = None) -> Watch:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def default_origin(self, cause: str, idempotency_key: str | None = None) -> Origin:
        return Origin("test", cause, idempotency_key=idempotency_key)


def test_a_context_begins_its_session_and_says_whether_it_resumed() -> None:
    provider = ScriptedProvider(InitializeSession=SessionView(True, ()))
    assert Context(provider, "s", {"who": "me"}).resumed
    assert provider.asked == [commands.InitializeSession("s", {"who": "me"})]


def test_writing_sends_one_command() -> None:
    provider = ScriptedProvider(SetVariable=4)
    Context(provider, "s")["t"] = 0.5
    assert provider.asked[-1] == commands.SetVariable("s", "t", Value("0.5"))


def test_defining_infers_the_type() -> None:
    provider = ScriptedProvider(RegisterVariable="var_n_1")
    assert Context(provider, "s").variables.define("n", 3, constraints={"min": 0}) == "var_n_1"
    assert provider.asked[-1] == commands.RegisterVariable("s", "n", "integer", Value("3"), '{"min":0}')


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
    assert provider.asked[-2:] == [
        commands.GetVariableHistory("s", "t", 5),
        commands.SetVariables("s", {"a": Value("1"), "b": Value('"x"')}, {}, True),
    ]
