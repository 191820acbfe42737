"""The contract of every provider that is `Forkable`, as tests. A backend subclasses `ForkContract`.

The tests fork sensitive variables as well, so a server under test needs `audit_reveal`.
"""

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from dspex_persist.cognitive.context import Context
from dspex_persist.cognitive.errors import ContextClosedError
from dspex_persist.state import commands, errors
from dspex_persist.state.abilities import Forkable
from dspex_persist.state.model import Origin, Rule, Source, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import check_invalid, names_of, shown, take
from dspex_persist.testing.provider_contract.arguments import WRONG_TEXTS
from dspex_persist.testing.provider_contract.base import Contract
from dspex_persist.testing.provider_contract.values import BINARY_VALUES, EXACT_VALUES


class ForkContract(Contract):
    """A session that starts with the state of another one."""

    @pytest.fixture
    def new(self) -> str:
        """The id of a session that does not exist."""
        return f"contract-{uuid.uuid4().hex}"

    def test_it_claims_to_fork(self, provider: StateProvider) -> None:
        assert isinstance(provider, Forkable)

    def test_it_has_the_variables_as_they_are(self, provider: StateProvider, session: str, new: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        provider.register_variable(session, "y", "float", 0.5, constraints={"min": 0}, metadata={"why": "so"})
        provider.set_variable(session, "y", 1.5, metadata={"sensitive": "true"})
        provider.start_optimization(session, "y", "optimizer")
        view = Forkable.of(provider).fork_session(session, new)
        assert not view.resumed
        assert view.variables == provider.list_variables(new)
        x, y = view.variables
        assert (x.name, x.type, x.version, x.value) == ("x", "integer", 0, Value("0"))
        assert (y.name, y.type, y.version, y.value) == ("y", "float", 0, Value("1.5"))
        assert (y.constraints, y.metadata) == ('{"min":0}', {"why": "so", "sensitive": "true"})
        assert y.optimization is None
        assert y.id != provider.get_variable(session, "y").id
        with pytest.raises(errors.InvalidValueError):
            provider.set_variable(new, "y", -1)

    def test_it_says_where_it_is_from_and_takes_no_more_over(
        self, provider: StateProvider, session: str, new: str
    ) -> None:
        provider.initialize_session(session, {"user": "ada"})
        provider.register_variable(session, "x", "integer", 0)
        at = provider.get_variable_history(session, "x")[0].sequence
        Forkable.of(provider).fork_session(session, new, str(at))
        assert provider.get_session(new).metadata == {"forked_from": session, "forked_at": str(at)}

    def test_neither_changes_the_other(self, provider: StateProvider, session: str, new: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        Forkable.of(provider).fork_session(session, new)
        provider.set_variable(new, "x", 2)
        provider.set_variable(session, "x", 3)
        assert (provider.get_value(session, "x"), provider.get_value(new, "x")) == (3, 2)
        provider.cleanup_session(session)
        assert provider.get_value(new, "x") == 2

    def test_rules_and_constraints_are_those_of_the_point(
        self, provider: StateProvider, session: str, new: str
    ) -> None:
        provider.register_variable(session, "x", "integer", 1, constraints={"max": 9})
        provider.add_rule(session, "small", "x < 5", "why")
        provider.add_rule(session, "passing", "x > 0")
        at = provider.get_variable_history(session, "x")[0].sequence + 2
        provider.remove_rule(session, "passing")
        provider.add_rule(session, "small", "x < 7", replace=True)
        provider.constrain_variable(session, "x", {"max": 20}, 6)
        Forkable.of(provider).fork_session(session, new, str(at))
        assert provider.list_rules(new) == (Rule("passing", "x > 0"), Rule("small", "x < 5", "why"))
        assert (provider.get_variable(new, "x").constraints, provider.get_value(new, "x")) == ('{"max":9}', 1)
        with pytest.raises(errors.RuleViolatedError):
            provider.set_variable(new, "x", 6)
        Forkable.of(provider).fork_session(session, f"{new}-now")
        assert provider.list_rules(f"{new}-now") == (Rule("small", "x < 7"),)
        assert provider.get_variable(f"{new}-now", "x").constraints == '{"max":20}'
        assert provider.get_variable(session, "x").constraints == '{"max":20}'

    def test_as_of_each_kind_of_point(self, provider: StateProvider, session: str, new: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        provider.set_variable(session, "x", 1)
        written = provider.get_variable_history(session, "x")[0]
        provider.register_variable(session, "y", "integer", 0)
        provider.delete_variable(session, "x")
        deleted = provider.get_variable_history(session, "x")[0].sequence
        points: list[tuple[str, dict[str, int]]] = [
            ("", {"y": 0}),
            ("now", {"y": 0}),
            (f"{deleted}^", {"x": 1, "y": 0}),
            (str(written.sequence), {"x": 1}),
            (f"{written.sequence}^", {"x": 0}),
            ("0s", {"y": 0}),
        ]
        for number, (at, expected) in enumerate(points):
            Forkable.of(provider).fork_session(session, f"{new}-{number}", at)
            forked = {name: provider.get_value(f"{new}-{number}", name) for name in expected}
            assert forked == expected, at
            assert len(provider.list_variables(f"{new}-{number}")) == len(expected), at

    def test_dependencies_as_of_the_point(self, provider: StateProvider, session: str, new: str) -> None:
        for name in ("x", "y", "z"):
            provider.register_variable(session, name, "integer", 0)
        provider.add_dependency(session, "y", "x", "uses")
        at = provider.get_variable_history(session, "z")[0].sequence
        fork = Forkable.of(provider).fork_session
        fork(session, new)
        with provider.watch(new) as watch:
            provider.set_variable(new, "x", 1)
            assert names_of(take(watch, 2)) == ["x", "y"]
        with pytest.raises(errors.DependencyCycleError):
            provider.add_dependency(new, "x", "y")
        fork(session, f"{new}-before", str(at))
        provider.add_dependency(f"{new}-before", "x", "y")
        provider.delete_variable(session, "x")
        fork(session, f"{new}-after")
        assert names_of(provider.list_variables(f"{new}-after")) == ["y", "z"]

    def test_forked_values_of_all_types_are_exact(self, provider: StateProvider, session: str, new: str) -> None:
        for number, (type_name, value) in enumerate(EXACT_VALUES):
            provider.register_variable(session, f"v{number}", type_name, value)
        for number, (type_name, binary) in enumerate(BINARY_VALUES):
            provider.run(commands.RegisterVariable(session, f"b{number}", type_name, binary))
        view = Forkable.of(provider).fork_session(session, new)
        expected = [(each.name, each.type, each.value) for each in provider.list_variables(session)]
        assert [(each.name, each.type, each.value) for each in view.variables] == expected
        assert view.variables == provider.list_variables(new)

    def test_who_asked_and_which_side_each_value_is_from(self, provider: StateProvider, session: str, new: str) -> None:
        ada = Origin("ada", "RegisterVariable", Source.ELIXIR)
        provider.submit(commands.RegisterVariable(session, "x", "integer", Value("1")), ada).result()
        provider.register_variable(session, "y", "integer", 1)
        Forkable.of(provider).fork_session(session, new, origin=Origin("bob", "ForkSession", Source.PYTHON))
        for name, source in (("x", Source.ELIXIR), ("y", Source.PYTHON)):
            (first,) = provider.get_variable_history(new, name)
            assert (first.actor, first.cause, first.source) == ("bob", "ForkSession", source)
        Forkable.of(provider).fork_session(session, f"{new}-2")
        (first,) = provider.get_variable_history(f"{new}-2", "x")
        assert first.actor == provider.default_origin("ForkSession").actor

    def test_a_fork_can_be_forked(self, provider: StateProvider, session: str, new: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        Forkable.of(provider).fork_session(session, new)
        provider.set_variable(new, "x", 2)
        Forkable.of(provider).fork_session(new, f"{new}-2")
        assert provider.get_value(f"{new}-2", "x") == 2

    def test_through_a_context(self, provider: StateProvider, session: str, new: str) -> None:
        context = Context(session, provider, actor="ada")
        context["x"] = 1
        before = context.history("x")[0].commit
        context["x"] = 2
        with context.fork(new, at=before, reason="to try it") as copy, asyncio.run(context.fork.aio()) as other:
            assert (copy.session_id, copy["x"], other["x"], context["x"]) == (new, 1, 2, 2)
            first = copy.history("x")[0]
            assert (first.actor, first.reason) == ("ada", "to try it")
            copy["x"] = 5
            assert (copy.history("x")[0].actor, context["x"], other["x"]) == ("ada", 2, 2)
        assert provider.get_value(new, "x") == 5
        with pytest.raises(errors.SessionExistsError):
            context.fork(new)
        context.close()
        with pytest.raises(ContextClosedError):
            context.fork()

    def test_an_id_that_is_taken(self, provider: StateProvider, session: str, new: str) -> None:
        provider.initialize_session(new)
        for existing in (new, session):
            with pytest.raises(errors.SessionExistsError):
                Forkable.of(provider).fork_session(session, existing)

    def test_a_session_that_never_was_cannot_be_forked(self, provider: StateProvider, new: str) -> None:
        with pytest.raises(errors.NotInHistoryError):
            Forkable.of(provider).fork_session("unknown", new)
        assert not provider.heartbeat(new)

    @pytest.mark.parametrize("point", ["soon", "-1", "x^", "exec_1_none", str(2**62)])
    def test_what_is_no_point_in_its_history(self, provider: StateProvider, session: str, new: str, point: str) -> None:
        with pytest.raises((errors.InvalidArgumentError, errors.NotInHistoryError)):
            Forkable.of(provider).fork_session(session, new, point)
        assert not provider.heartbeat(new)

    def test_a_point_before_it_began(self, provider: StateProvider, session: str, new: str) -> None:
        with pytest.raises(errors.InvalidArgumentError, match="had not begun by then"):
            Forkable.of(provider).fork_session(session, new, "0")

    @pytest.mark.parametrize(("wrong", "reason"), WRONG_TEXTS, ids=shown)
    def test_arguments_of_a_wrong_type(
        self, provider: StateProvider, session: str, new: str, wrong: Any, reason: str
    ) -> None:
        fork = Forkable.of(provider).fork_session
        asks: list[tuple[str, Callable[[], object]]] = [
            ("session_id", lambda: fork(wrong, new)),
            ("new_session_id", lambda: fork(session, wrong)),
            ("at", lambda: fork(session, new, wrong)),
        ]
        for field, ask in asks:
            check_invalid(ask, field, reason)
        assert not provider.heartbeat(new)
