"""Who made a change, and why."""

from collections.abc import Callable

import pytest

from dspex_persist.state import arguments, commands, errors
from dspex_persist.state.model import REASON, ChangeKind, Origin, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import refused, take
from dspex_persist.testing.provider_contract.base import Contract

WHY = "ticket 1201: Grüße,\nthe cache was cold"


class WhoContract(Contract):
    """Actor and reason of each change."""

    def test_every_kind_of_change_says_who_and_why(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0, actor="ada", reason="begin")
        provider.set_variable(session, "x", 1, actor="bob", reason=WHY)
        provider.set_variables(session, {"x": 2}, actor="cleo", reason="two")
        provider.rollback_variable(session, "x", 1, actor="dan", reason="back")
        provider.start_optimization(session, "x", "mipro", actor="eve")
        provider.stop_optimization(session, "x", force=True, actor="fay", reason="mine now")
        provider.delete_variable(session, "x", actor="gus", reason="done")
        history = provider.get_variable_history(session, "x")
        assert [(each.kind, each.actor, each.reason) for each in reversed(history)] == [
            (ChangeKind.REGISTERED, "ada", "begin"),
            (ChangeKind.SET, "bob", WHY),
            (ChangeKind.SET, "cleo", "two"),
            (ChangeKind.ROLLED_BACK, "dan", "back"),
            (ChangeKind.LOCK_BROKEN, "fay", "mine now"),
            (ChangeKind.DELETED, "gus", "done"),
        ]

    def test_a_reason_belongs_to_its_change_alone(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0, metadata={"unit": "ms"}, reason="begin")
        assert provider.get_variable(session, "x").metadata == {"unit": "ms"}
        provider.set_variable(session, "x", 1, metadata={"step": "1"}, reason=WHY)
        provider.set_variable(session, "x", 2)
        variable = provider.get_variable(session, "x")
        assert variable.metadata == {"unit": "ms", "step": "1"}
        stored = provider.submit(commands.GetVariable(session, "x", bypass_cache=True)).result()
        assert stored.metadata == variable.metadata
        newest, middle, first = provider.get_variable_history(session, "x")
        assert newest.reason is None
        assert (middle.reason, middle.metadata) == (WHY, {"step": "1", REASON: WHY})
        assert (first.reason, first.metadata) == ("begin", {"unit": "ms", REASON: "begin"})

    def test_without_them_the_provider_is_the_actor(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0, actor=None, reason=None)
        (only,) = provider.get_variable_history(session, "x")
        assert only.actor == provider.default_origin("RegisterVariable").actor
        assert only.reason is None

    def test_watchers_see_both(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        with provider.watch(session) as watch:
            provider.set_variable(session, "x", 1, actor="ada", reason=WHY)
            update = take(watch, 1)[0]
        assert update.version is not None
        assert (update.version.actor, update.version.reason) == ("ada", WHY)
        assert update.variable.metadata == {}

    def test_another_reason_is_still_the_same_request(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        assert provider.set_variable(session, "x", 1, idempotency_key="k", reason="first") == 1
        assert provider.set_variable(session, "x", 1, idempotency_key="k", reason="second") == 1
        assert [each.reason for each in provider.get_variable_history(session, "x")] == ["first", None]

    def test_clients_cannot_pass_a_reason_as_metadata(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        with pytest.raises(errors.InvalidArgumentError, match="is set by the server"):
            provider.set_variable(session, "x", 1, metadata={REASON: "because"})

    def test_a_long_reason_is_refused(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        most = arguments.REASON_LENGTH
        with pytest.raises(errors.LimitExceededError, match=f"reason in characters is {most + 1}, above"):
            provider.set_variable(session, "x", 1, reason="é" * (most + 1))
        assert provider.set_variable(session, "x", 1, reason="\N{GRINNING FACE}" * most) == 1
        assert provider.get_variable_history(session, "x")[0].reason == "\N{GRINNING FACE}" * most

    @pytest.mark.parametrize("wrong", [3, b"because", "a\0b", "\ud800"])
    def test_only_text_is_a_reason(self, provider: StateProvider, session: str, wrong: object) -> None:
        provider.register_variable(session, "x", "integer", 0)
        write = commands.SetVariable(session, "x", Value("1"))
        calls: list[Callable[[], object]] = [
            lambda: provider.set_variable(session, "x", 1, reason=wrong),  # type: ignore[arg-type]
            lambda: _raise(refused(provider.submit(write, Origin("ada", "test", reason=wrong)))),  # type: ignore[arg-type]
        ]
        for call in calls:
            with pytest.raises(errors.InvalidArgumentError, match="invalid reason: "):
                call()
        assert provider.get_variable(session, "x").version == 0


def _raise(error: BaseException) -> None:
    raise error
