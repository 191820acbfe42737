"""The contract of every provider that is `Restorable`, as tests. A backend subclasses `RestoreContract`."""

import asyncio
import math
from datetime import UTC, timedelta
from typing import Any, cast

import pytest

from dspex_persist.cognitive.context import Context
from dspex_persist.cognitive.errors import ContextClosedError
from dspex_persist.state import commands, errors
from dspex_persist.state.abilities import Restorable
from dspex_persist.state.model import ChangeKind, Origin, RestoredSession, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import check_invalid, names_of, take, take_until
from dspex_persist.testing.provider_contract.arguments import WRONG_TEXTS
from dspex_persist.testing.provider_contract.base import Contract
from dspex_persist.testing.provider_contract.values import BINARY_VALUES, EXACT_VALUES


def restore(provider: StateProvider, session: str, at: str | int, origin: Origin | None = None) -> RestoredSession:
    """Restore a session."""
    return Restorable.of(provider).restore_session(session, str(at), origin=origin)


def head_of(provider: StateProvider, session: str) -> int:
    """Return the number of a new commit of the session."""
    provider.register_variable(session, "head", "integer", 0)
    provider.delete_variable(session, "head")
    return provider.get_variable_history(session, "head")[0].sequence


def state_of(provider: StateProvider, session: str) -> dict[str, tuple[str, Value, str]]:
    """Return the type, the value and the constraints of each variable."""
    return {each.name: (each.type, each.value, each.constraints) for each in provider.list_variables(session)}


class RestoreContract(Contract):
    """A session that goes back to what it was."""

    def test_it_claims_to_restore(self, provider: StateProvider) -> None:
        assert isinstance(provider, Restorable)

    def test_everything_is_as_it_was_in_one_commit(self, provider: StateProvider, session: str) -> None:
        for name in ("same", "changed", "gone", "again"):
            provider.register_variable(session, name, "integer", 1, constraints={"max": 10}, metadata={"of": name})
        before, at = state_of(provider, session), head_of(provider, session)
        provider.set_variable(session, "changed", 2)
        provider.set_variable(session, "again", 2)
        provider.set_variable(session, "again", 1)
        provider.delete_variable(session, "gone")
        provider.register_variable(session, "born", "string", "x")
        changed = provider.get_variable(session, "changed")
        last = provider.get_variable_history(session, "born")[0].sequence
        with provider.watch(session, after_sequence=last) as watch:
            restored = restore(provider, session, at)
            updates = take(watch, 3)
        assert restored == RestoredSession(restored.sequence, at, ("changed",), ("born",), ("gone",))
        assert restored.sequence > last
        assert {update.sequence for update in updates} == {restored.sequence}
        assert state_of(provider, session) == before
        newest = {name: provider.get_variable_history(session, name)[0] for name in ("changed", "gone", "born")}
        assert {each.sequence for each in newest.values()} == {restored.sequence}
        assert {each.cause for each in newest.values()} == {"RestoreSession"}
        assert {each.actor for each in newest.values()} == {provider.default_origin("RestoreSession").actor}
        back = newest["changed"]
        assert (back.variable_id, back.version, back.kind) == (changed.id, 2, ChangeKind.ROLLED_BACK)
        assert back.metadata == {"rolled_back_to": "0"}
        assert (newest["gone"].version, newest["gone"].kind) == (0, ChangeKind.REGISTERED)
        assert newest["born"].kind is ChangeKind.DELETED
        assert provider.get_variable(session, "gone").metadata == {"of": "gone"}
        assert provider.get_variable(session, "again").version == 2
        with pytest.raises(errors.InvalidValueError):
            provider.set_variable(session, "gone", 11)

    def test_metadata_is_as_it_was(self, provider: StateProvider, session: str) -> None:
        given = {"of": "ann", "unit": "m"}
        provider.register_variable(session, "x", "string", "a", metadata=given)
        provider.register_variable(session, "y", "integer", 0)
        at = head_of(provider, session)
        provider.set_variable(session, "x", "b", metadata={"unit": "km", "new": "\u00e9\n"})
        provider.set_variable(session, "y", 0, metadata={"note": "only this"})
        restored = restore(provider, session, at)
        assert restored.changed == ("x", "y")
        x, y = (provider.get_variable(session, name) for name in ("x", "y"))
        assert (x.value, x.metadata, y.value, y.metadata) == (Value('"a"'), given, Value("0"), {})
        provider.set_variable(session, "x", "c", metadata={"new": "again"})
        assert provider.get_variable(session, "x").metadata == {**given, "new": "again"}
        assert restore(provider, session, restored.sequence).changed == ("x",)
        assert provider.get_variable(session, "x").metadata == given
        restore(provider, session, f"{restored.sequence}^")
        assert provider.get_variable(session, "x").metadata == {"of": "ann", "unit": "km", "new": "\u00e9\n"}
        assert provider.get_variable(session, "y").metadata == {"note": "only this"}

    def test_what_is_sensitive_now_stays_so(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "string", "a", metadata={"of": "ann"})
        at = head_of(provider, session)
        provider.set_variable(session, "x", "b", metadata={"sensitive": "true", "of": "bob"})
        restore(provider, session, at)
        variable = provider.get_variable(session, "x")
        assert (variable.value, variable.metadata) == (Value('"a"'), {"of": "ann", "sensitive": "true"})

    def test_each_kind_of_point(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        sequences = []
        for number in range(1, 4):
            provider.set_variable(session, "x", number)
            sequences.append(provider.get_variable_history(session, "x")[0].sequence)
        history = provider.get_variable_history(session, "x")
        for at, value in ((sequences[0], 1), (f"{sequences[1]}^", 1), (sequences[2], 3), (f"{sequences[0]}^", 0)):
            restore(provider, session, at)
            assert provider.get_value(session, "x") == value, at
        restore(provider, session, history[0].created_at.astimezone(UTC).isoformat())
        assert provider.get_value(session, "x") == 3
        now = provider.get_variable(session, "x")
        for at in ("now", "0s"):
            assert restore(provider, session, at).changed == ()
        assert provider.get_variable(session, "x") == now

    def test_a_commit_of_another_session_means_the_last_one_before(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        own = provider.get_variable_history(session, "x")[0].sequence
        other = f"{session}-other"
        provider.initialize_session(other)
        at = head_of(provider, other)
        provider.set_variable(session, "x", 1)
        assert restore(provider, session, at).restored_to == own
        assert provider.get_value(session, "x") == 0

    def test_it_can_be_taken_back(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        first = head_of(provider, session)
        provider.set_variable(session, "x", 1)
        provider.register_variable(session, "y", "integer", 1)
        second, then = head_of(provider, session), state_of(provider, session)
        restored = restore(provider, session, first)
        assert list(state_of(provider, session)) == ["x"]
        back = restore(provider, session, second)
        assert (back.changed, back.deleted, back.returned) == (("x",), (), ("y",))
        assert state_of(provider, session) == then
        restore(provider, session, restored.sequence)
        assert list(state_of(provider, session)) == ["x"]
        assert provider.get_value(session, "x") == 0

    def test_a_name_that_means_another_variable_now(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 5)
        at = head_of(provider, session)
        provider.delete_variable(session, "x")
        provider.register_variable(session, "x", "string", "text", constraints={"max_length": 9})
        restored = restore(provider, session, at)
        assert (restored.changed, restored.deleted, restored.returned) == ((), ("x",), ("x",))
        assert state_of(provider, session) == {"x": ("integer", Value("5"), "")} | {
            name: facts for name, facts in state_of(provider, session).items() if name != "x"
        }
        assert provider.set_variable(session, "x", 6) == 1

    def test_values_of_all_types_come_back_exactly(self, provider: StateProvider, session: str) -> None:
        for number, (type_name, value) in enumerate(EXACT_VALUES):
            provider.register_variable(session, f"v{number}", type_name, value)
        for number, (type_name, binary) in enumerate(BINARY_VALUES):
            provider.run(commands.RegisterVariable(session, f"b{number}", type_name, binary))
        before, at = state_of(provider, session), head_of(provider, session)
        for name in before:
            provider.delete_variable(session, name)
        assert len(restore(provider, session, at).returned) == len(before)
        assert state_of(provider, session) == before
        provider.register_variable(session, "nan", "float", math.nan)
        at = head_of(provider, session)
        assert restore(provider, session, at).changed == ()

    def test_dependencies_are_as_they_were(self, provider: StateProvider, session: str) -> None:
        for name in ("x", "y", "z"):
            provider.register_variable(session, name, "integer", 0)
        provider.add_dependency(session, "y", "x", "uses")
        provider.add_dependency(session, "z", "y")
        at = head_of(provider, session)
        provider.delete_variable(session, "x")
        provider.run(commands.RemoveDependency(session, "z", "y"))
        provider.register_variable(session, "w", "integer", 0)
        provider.add_dependency(session, "y", "w")
        provider.add_dependency(session, "w", "z")
        restore(provider, session, at)
        assert provider.run(commands.GetDependencies(session, "z", transitive=True)) == ("x", "y")
        assert provider.run(commands.GetDependencies(session, "y")) == ("x",)
        with pytest.raises(errors.DependencyCycleError):
            provider.add_dependency(session, "x", "z")
        with provider.watch(session, ["y"]) as watch:
            provider.set_variable(session, "x", 1)
            assert names_of(take(watch, 1)) == ["y"]

    def test_locks_stay_and_protect_their_variable(self, provider: StateProvider, session: str) -> None:
        for name in ("x", "y"):
            provider.register_variable(session, name, "integer", 0)
        at = head_of(provider, session)
        provider.set_variable(session, "x", 1)
        provider.start_optimization(session, "y", "mipro")
        restore(provider, session, at)
        assert provider.get_variable(session, "y").optimization is not None
        provider.set_variable(session, "x", 1)
        provider.start_optimization(session, "x", "mipro")
        for lost in (at, f"{at}^"):
            with pytest.raises(errors.VariableLockedError):
                restore(provider, session, lost)
        assert provider.get_value(session, "x") == 1
        mine = Origin("mipro", "RestoreSession", optimizer_id="mipro")
        assert restore(provider, session, at, mine).changed == ("x",)
        assert provider.get_variable(session, "x").optimization is not None

    def test_nothing_to_restore_is_a_commit_that_says_so(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        at = head_of(provider, session)
        restored = restore(provider, session, at)
        assert restored == RestoredSession(restored.sequence, at)
        assert restored.sequence == head_of(provider, session) - 2

    def test_who_asked_and_why(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        at = head_of(provider, session)
        provider.set_variable(session, "x", 1)
        restore(provider, session, at, provider.origin("RestoreSession", actor="ada", reason="a mistake"))
        version = provider.get_variable_history(session, "x")[0]
        assert (version.actor, version.cause, version.reason) == ("ada", "RestoreSession", "a mistake")

    def test_a_key_does_not_repeat_it(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        at = head_of(provider, session)
        for number in (1, 2):
            provider.set_variable(session, "x", number)
            restore(provider, session, at, Origin("ada", "RestoreSession", idempotency_key="key"))
            assert provider.get_value(session, "x") == 0

    def test_watchers_of_a_name_see_what_comes_back(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 7)
        at = head_of(provider, session)
        provider.delete_variable(session, "x")
        with provider.watch(session) as watch:
            restore(provider, session, at)
            provider.register_variable(session, "end", "integer", 0)
            (update,) = take_until(watch, "end")
        assert (update.variable.name, update.variable.value) == ("x", Value("7"))

    def test_a_context_goes_back(self, provider: StateProvider, session: str) -> None:
        context = Context(session, provider, actor="ada")
        context["x"] = 1
        before = context.history("x")[0].commit
        moment = context.history("x")[0].at
        context["x"] = 2
        context["y"] = 1
        restored = context.rollback_to(before, reason="a mistake")
        assert (restored.restored_to, restored.changed, restored.deleted) == (before, ("x",), ("y",))
        assert (context.get_many(), context.history("x")[0].reason) == ({"x": 1}, "a mistake")
        assert (context.history("x")[0].actor, context.history("x")[0].commit) == ("ada", restored.sequence)
        assert asyncio.run(context.rollback_to.aio(f"{restored.sequence}^")).returned == ("y",)
        assert context.get_many() == {"x": 2, "y": 1}
        for point in (moment, timedelta(0), str(before), f"{before}"):
            assert context.rollback_to(point).restored_to >= before
        for wrong in ("", " ", "soon", -1, None, True):
            with pytest.raises(errors.InvalidArgumentError):
                context.rollback_to(cast(Any, wrong))
        context.close()
        with pytest.raises(ContextClosedError):
            context.rollback_to(before)

    # What is refused

    def test_a_session_that_is_not_live(self, provider: StateProvider, session: str) -> None:
        at = head_of(provider, session)
        provider.cleanup_session(session)
        for gone in (session, "unknown"):
            with pytest.raises(errors.SessionNotFoundError):
                restore(provider, gone, at)

    def test_going_back_to_before_it_began(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        with pytest.raises((errors.InvalidArgumentError, errors.NotInHistoryError)):
            restore(provider, session, "0")
        at = head_of(provider, session)
        provider.cleanup_session(session)
        provider.initialize_session(session)
        provider.register_variable(session, "y", "integer", 0)
        with pytest.raises(errors.InvalidArgumentError, match="had not begun by then"):
            restore(provider, session, at)
        assert list(state_of(provider, session)) == ["y"]

    @pytest.mark.parametrize("point", ["soon", "-1", "x^", "exec_1_none", str(2**62)])
    def test_going_back_to_no_point_in_its_history(self, provider: StateProvider, session: str, point: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        with pytest.raises((errors.InvalidArgumentError, errors.NotInHistoryError)):
            restore(provider, session, point)
        assert provider.get_variable(session, "x").version == 0

    def test_wrong_arguments_of_going_back(self, provider: StateProvider, session: str) -> None:
        state: Any = Restorable.of(provider)
        for wrong, reason in WRONG_TEXTS:
            check_invalid(lambda wrong=wrong: state.restore_session(wrong, "now"), "session_id", reason)  # type: ignore[misc]
            check_invalid(lambda wrong=wrong: state.restore_session(session, wrong), "at", reason)  # type: ignore[misc]
