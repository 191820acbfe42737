"""Rules between variables: they hold after every commit, whoever writes."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from dspex_persist.state import errors
from dspex_persist.state.model import Rule
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import check_refused, names_of
from dspex_persist.testing.provider_contract.base import Contract

FITS = "max_tokens <= context_window - 500"


class RuleContract(Contract):
    """Rules between variables."""

    @pytest.fixture
    def ruled(self, provider: StateProvider) -> str:
        """A new session with two variables and a rule between them."""
        session_id = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(session_id)
        provider.register_variable(session_id, "max_tokens", "integer", 1000)
        provider.register_variable(session_id, "context_window", "integer", 8000)
        provider.add_rule(session_id, "fits", FITS, "the prompt needs 500 tokens")
        return session_id

    def numbers(self, provider: StateProvider, session_id: str) -> list[object]:
        return [provider.get_value(session_id, name) for name in ("max_tokens", "context_window")]

    def test_a_violation_changes_nothing_and_says_what_is_violated(self, provider: StateProvider, ruled: str) -> None:
        provider.set_variable(ruled, "max_tokens", 7500)
        with pytest.raises(errors.RuleViolatedError) as error:
            provider.set_variable(ruled, "context_window", 7999)
        assert (error.value.rule, error.value.expression, error.value.reason) == ("fits", FITS, "it is false")
        assert error.value.values == "context_window = 7999, max_tokens = 7500"
        assert "the prompt needs 500 tokens" in str(error.value)
        assert self.numbers(provider, ruled) == [7500, 8000]
        assert len(provider.get_variable_history(ruled, "context_window")) == 1

    def test_an_atomic_batch_is_checked_as_a_whole(self, provider: StateProvider, ruled: str) -> None:
        outcome = provider.set_variables(ruled, {"max_tokens": 9000, "context_window": 9500}, atomic=True)
        assert outcome.success
        provider.register_variable(ruled, "other", "integer", 0)
        outcome = provider.set_variables(ruled, {"other": 1, "max_tokens": 9001}, atomic=True)
        assert (outcome.success, outcome.versions) == (False, {})
        assert list(outcome.errors) == ["max_tokens"]
        assert FITS in outcome.errors["max_tokens"]
        assert provider.get_value(ruled, "other") == 0

    def test_another_batch_applies_what_fits(self, provider: StateProvider, ruled: str) -> None:
        provider.register_variable(ruled, "other", "integer", 0)
        assert provider.set_variables(ruled, {"max_tokens": 9000, "context_window": 9500}).success
        outcome = provider.set_variables(ruled, {"max_tokens": 9400, "other": 1, "context_window": 9600})
        assert outcome.versions == {"other": 1}
        assert set(outcome.errors) == {"max_tokens", "context_window"}
        assert self.numbers(provider, ruled) == [9000, 9500]

    def test_every_way_of_writing_is_checked(self, provider: StateProvider, ruled: str) -> None:
        provider.set_variables(ruled, {"max_tokens": 100, "context_window": 700}, atomic=True)
        with check_refused(errors.RuleViolatedError, "max_tokens = 1000"):
            provider.rollback_variable(ruled, "max_tokens", 0)
        with check_refused(errors.RuleViolatedError, "max_tokens = 201"):
            provider.constrain_variable(ruled, "max_tokens", {"min": 0}, 201)
        provider.delete_variable(ruled, "max_tokens")
        with check_refused(errors.RuleViolatedError, "max_tokens = 1000"):
            provider.register_variable(ruled, "max_tokens", "integer", 1000)
        provider.register_variable(ruled, "max_tokens", "integer", 200)
        assert self.numbers(provider, ruled) == [200, 700]

    def test_without_all_of_its_variables_a_rule_says_nothing(self, provider: StateProvider, ruled: str) -> None:
        provider.delete_variable(ruled, "context_window")
        provider.set_variable(ruled, "max_tokens", 10**6)
        with check_refused(errors.RuleViolatedError, "context_window = 1"):
            provider.register_variable(ruled, "context_window", "integer", 1)
        assert names_of(provider.list_variables(ruled)) == ["max_tokens"]

    def test_what_cannot_be_evaluated_is_refused(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "part", "float", 1.0)
        provider.register_variable(session, "options", "map", {"limit": 5})
        provider.add_rule(session, "limited", "options.limit >= 1 / int(part)")
        with check_refused(errors.RuleViolatedError, "division by zero"):
            provider.set_variable(session, "part", 0.0)
        with check_refused(errors.RuleViolatedError, 'no key "limit"'):
            provider.set_variable(session, "options", {})
        with check_refused(errors.RuleViolatedError, "it cannot be evaluated"):
            provider.set_variable(session, "options", {"limit": "x"})

    def test_names_that_are_no_identifiers(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "model.temperature", "float", 0.5)
        provider.register_variable(session, "in", "float", 1.0)
        provider.add_rule(session, "cool", "`model.temperature` <= `in`")
        with check_refused(errors.RuleViolatedError, "model.temperature = 1.5"):
            provider.set_variable(session, "model.temperature", 1.5)

    def test_rules_are_added_listed_replaced_and_removed(self, provider: StateProvider, ruled: str) -> None:
        provider.add_rule(ruled, "fits", FITS, "the prompt needs 500 tokens")
        with check_refused(errors.RuleExistsError, FITS):
            provider.add_rule(ruled, "fits", "max_tokens < context_window")
        provider.add_rule(ruled, "fits", "max_tokens < context_window", replace=True)
        provider.add_rule(ruled, "any", "max_tokens > 0", "why")
        assert provider.list_rules(ruled) == (
            Rule("any", "max_tokens > 0", "why"),
            Rule("fits", "max_tokens < context_window"),
        )
        provider.set_variable(ruled, "max_tokens", 7999)
        provider.remove_rule(ruled, "fits")
        with check_refused(errors.RuleNotFoundError, "'any'?"):
            provider.remove_rule(ruled, "ani")
        provider.set_variable(ruled, "max_tokens", 8001)
        assert [rule.name for rule in provider.list_rules(ruled)] == ["any"]

    @pytest.mark.parametrize(
        ("expression", "reason"),
        [
            ("max_tokens <=", "is not CEL"),
            ("max_tokens > 1000", "it does not hold now: it is false"),
            ("max_tokens", "neither true nor false"),
            ("max_tokens > now()", "calls now, which does not exist here"),
            ("1 < 2", "reads no variable"),
            ("max_tokens.matches(name)", "a pattern in quotes"),
            ("x" * 1001, "has 1001 characters"),
            ("(" * 300 + "max_tokens" + ")" * 300, "is not CEL"),
        ],
    )
    def test_rules_that_are_refused(self, provider: StateProvider, ruled: str, expression: str, reason: str) -> None:
        with check_refused(errors.InvalidRuleError, reason):
            provider.add_rule(ruled, "bad", expression)
        assert [rule.name for rule in provider.list_rules(ruled)] == ["fits"]

    def test_the_session_must_exist(self, provider: StateProvider) -> None:
        for call in (
            lambda: provider.add_rule("contract-nowhere", "r", "x > 1"),
            lambda: provider.remove_rule("contract-nowhere", "r"),
            lambda: provider.list_rules("contract-nowhere"),
        ):
            with pytest.raises(errors.SessionNotFoundError):
                call()

    def test_a_key_adds_a_rule_once(self, provider: StateProvider, ruled: str) -> None:
        provider.add_rule(ruled, "r", "max_tokens > 0", idempotency_key="k")
        provider.remove_rule(ruled, "r")
        provider.add_rule(ruled, "r", "max_tokens > 0", idempotency_key="k")
        assert [rule.name for rule in provider.list_rules(ruled)] == ["fits"]

    def test_concurrent_writers_never_break_a_rule(self, provider: StateProvider, session: str) -> None:
        for name in ("a", "b"):
            provider.register_variable(session, name, "integer", 0)
        provider.add_rule(session, "close", "a - b <= 3 && b - a <= 3")

        def write(name: str) -> None:
            for number in range(1, 16):
                with suppress(errors.RuleViolatedError):
                    provider.set_variable(session, name, number)

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(write, ("a", "b")))
        changes = [
            (version.sequence, name, int(version.value.json))
            for name in ("a", "b")
            for version in provider.get_variable_history(session, name)
            if version.value is not None
        ]
        now = {"a": 0, "b": 0}
        for _, name, number in sorted(changes):
            now[name] = number
            assert abs(now["a"] - now["b"]) <= 3
