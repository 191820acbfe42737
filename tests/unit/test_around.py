"""Wrappers have exactly the abilities of what they wrap, and no provider that lacks one has its method."""

from collections.abc import Mapping
from concurrent.futures import Future
from itertools import combinations
from types import new_class
from typing import Any, ClassVar

import pytest

from dspex_persist import Context, EmbeddedState, LocalState
from dspex_persist.state.abilities import (
    Ability,
    Auditable,
    Derives,
    Durable,
    ExecutesTools,
    Forkable,
    KeepsOrder,
    Prunable,
    Recordable,
    Restorable,
    StreamsTools,
    Transacts,
)
from dspex_persist.state.around import Around
from dspex_persist.state.commands import Command, RegisterVariable
from dspex_persist.state.errors import UnsupportedError
from dspex_persist.state.model import Origin, PrunePolicy, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.tools.with_tools import WithTools
from tests.unit.replays import Memory

TOOLS = (ExecutesTools, StreamsTools)
OTHERS = (Durable, Derives, KeepsOrder, Auditable, Recordable, Forkable, Restorable, Prunable)
METHODS: Mapping[type[Ability], str] = {
    Derives: "add_derivation",
    Auditable: "audit",
    Recordable: "record",
    Forkable: "fork_session",
    Restorable: "restore_session",
    Prunable: "prune",
    ExecutesTools: "list_tools",
    StreamsTools: "stream_tool",
}


def able(*abilities: type[Ability]) -> StateProvider:
    """A provider with these abilities, whose methods return their arguments."""

    def answer(self: object, *arguments: Any, **options: Any) -> Any:
        return arguments, options

    methods = {METHODS[each]: answer for base in abilities for each in METHODS if issubclass(base, each)}
    made: StateProvider = new_class("Able", (Memory, *abilities), exec_body=lambda body: body.update(methods))()
    return made


def abilities_of(provider: object) -> set[type[Ability]]:
    return {each for each in (*OTHERS, *TOOLS) if isinstance(provider, each)}


@pytest.mark.parametrize("wrapped", [(), *combinations(OTHERS, 1), *combinations(OTHERS, 2), OTHERS])
def test_a_wrapper_has_the_abilities_of_its_provider(wrapped: tuple[type[Ability], ...]) -> None:
    inner = able(*wrapped)
    assert abilities_of(inner) == set(wrapped)
    assert abilities_of(Around(inner)) == abilities_of(Around(Around(inner))) == set(wrapped)
    for state in (WithTools(inner), WithTools(provider=inner)):
        assert abilities_of(state) == {*wrapped, *TOOLS}
        assert type(state).__name__ == "WithTools"
        assert [hasattr(state, method) for method in METHODS.values()] == [isinstance(state, each) for each in METHODS]
        state.close()


@pytest.mark.parametrize("ability", TOOLS)
def test_tools_are_passed_on_too(ability: type[Ability]) -> None:
    wrapper: Any = Around(able(ability))
    assert abilities_of(wrapper) == {each for each in TOOLS if issubclass(ability, each)}
    assert wrapper.list_tools("s") == (("s",), {})
    if ability is StreamsTools:
        assert wrapper.stream_tool("s", "t", metadata={}) == (("s", "t", None), {"metadata": {}})


def test_calls_are_passed_on_to_the_provider() -> None:
    wrapper: Any = Around(able(*OTHERS))
    policy = PrunePolicy(keep_versions=1)
    assert wrapper.audit(reveal=True) == ((), {"reveal": True})
    assert wrapper.record("s", started=3) == (("s",), {"started": 3, "reveal": False, "after": 0})
    assert wrapper.fork_session("s", "t", "now") == (("s", "t", "now"), {"origin": None})
    assert wrapper.restore_session("s", "now") == (("s", "now"), {"origin": None})
    arguments, options = wrapper.prune(policy, confirm=True)
    assert (arguments, options["confirm"]) == ((policy,), True)


def test_transactions_are_passed_on() -> None:
    with Around(LocalState()) as wrapper:
        assert isinstance(wrapper, Transacts)
        wrapper.initialize_session("s")
        with wrapper.begin_transaction("s", isolation="snapshot") as transaction:
            transaction.run(RegisterVariable("s", "x", "integer", Value("1")))
        assert (transaction.status, wrapper.get_value("s", "x")) == ("committed", 1)
        with wrapper.begin_recording("s", "mine") as recording:
            recording.record("lm", {})
        assert recording.status == "committed"


def test_a_custom_wrapper_takes_a_few_lines() -> None:
    class Counting(Around):
        calls = 0

        def submit(self, command: Command[Any], origin: Origin | None = None) -> Future[Any]:
            self.calls += 1
            return self.provider.submit(command, origin)

    with Counting(able(Recordable)) as state:
        state.initialize_session("s")
        assert (state.calls, abilities_of(state)) == (1, {Recordable})
        assert isinstance(state, Counting)
        assert type(state) is type(Counting(able(Recordable)))


@pytest.mark.parametrize("ability", [*OTHERS, *TOOLS])
def test_a_missing_ability_says_what_to_do_instead(ability: type[Ability]) -> None:
    having = able(ability)
    assert ability.of(having) is having
    with pytest.raises(UnsupportedError) as caught:
        ability.of(Memory())
    assert str(caught.value) == f"not supported here: {ability.lacking}; {ability.instead}"


def test_a_context_of_a_provider_without_tools_says_so() -> None:
    context = Context("s", Memory())
    with pytest.raises(UnsupportedError, match="WithTools"):
        context.call("add")


def test_the_engine_on_a_file_can_do_everything() -> None:
    assert issubclass(EmbeddedState, WithTools)
    assert {each for each in (*OTHERS, *TOOLS) if issubclass(EmbeddedState, each)} == {*OTHERS, *TOOLS}


def test_a_wrapper_is_open_as_long_as_its_provider() -> None:
    class Ended(Memory):
        def check_open(self) -> None:
            raise UnsupportedError("this")

    with pytest.raises(UnsupportedError):
        Around(Ended()).check_open()


@pytest.mark.parametrize("wrapped", [(), *combinations(OTHERS, 1), OTHERS])
def test_capabilities_are_those_of_the_abilities(wrapped: tuple[type[Ability], ...]) -> None:
    always = {"atomic_batches", "watch", "history"}
    given = {name for ability in wrapped for name in ability.gives}
    assert able(*wrapped).capabilities == Around(able(*wrapped)).capabilities == {*always, *given}
    with WithTools(able(*wrapped)) as state:
        assert state.capabilities == {*always, *given, "transactions"}, "it has no tools"


def test_where_a_backend_is_passes_through_wrappers() -> None:
    class Elsewhere(Memory):
        gives: ClassVar[tuple[str, ...]] = ("remote",)
        url = "grpc://there:1"

    assert "remote" in Around(Elsewhere()).capabilities
    assert Around(Around(Elsewhere())).url == "grpc://there:1"
