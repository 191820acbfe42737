"""JSON Schemas as constraints: whoever writes a value, and however, it fits."""

import json

import pytest

from dspex_persist.state import errors
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import check_refused
from dspex_persist.testing.provider_contract.base import Contract

_PROFILE = {
    "schema": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name"],
    },
    "schema_version": 1,
}


class SchemaContract(Contract):
    """JSON Schemas as constraints."""

    @pytest.fixture
    def profile(self, provider: StateProvider, session: str) -> str:
        """The session, with a variable that has a schema."""
        provider.register_variable(session, "profile", "map", {"name": "Ada", "age": 36}, constraints=_PROFILE)
        return session

    def test_values_fit_their_schema(self, provider: StateProvider, profile: str) -> None:
        provider.set_variable(profile, "profile", {"name": "Grace", "age": 37.0})
        with check_refused(errors.InvalidValueError, "at age: -1 is less than the minimum of 0"):
            provider.set_variable(profile, "profile", {"name": "Ada", "age": -1})
        with check_refused(errors.InvalidValueError, '"name" is a required property'):
            provider.set_variable(profile, "profile", {})
        with check_refused(errors.InvalidValueError, '"name" is a required property'):
            provider.register_variable(profile, "other", "map", {}, constraints=_PROFILE)
        assert provider.get_value(profile, "profile") == {"name": "Grace", "age": 37}
        assert provider.get_variable(profile, "profile").version == 1

    def test_the_schema_is_kept_with_the_variable(self, provider: StateProvider, profile: str) -> None:
        assert json.loads(provider.get_variable(profile, "profile").constraints) == _PROFILE
        known = provider.get_variable(profile, "profile").id
        assert provider.register_variable(profile, "profile", "map", {"name": "x"}, constraints=_PROFILE) == known
        with check_refused(errors.VariableExistsError, "its constraints are"):
            provider.register_variable(
                profile, "profile", "map", {"name": "x"}, constraints={**_PROFILE, "schema_version": 2}
            )

    def test_batches_name_the_place(self, provider: StateProvider, profile: str) -> None:
        provider.register_variable(profile, "x", "integer", 0)
        outcome = provider.set_variables(profile, {"x": 1, "profile": {"name": 5}})
        assert outcome.versions == {"x": 1}
        assert "at name: 5 is not of type" in outcome.errors["profile"]

    @pytest.mark.parametrize("reference", ["http://127.0.0.1:9/a", "file:///etc/hostname", "a.json"])
    def test_nothing_is_fetched(self, provider: StateProvider, session: str, reference: str) -> None:
        with check_refused(errors.InvalidConstraintsError, "leaves the schema"):
            provider.register_variable(session, "x", "map", {}, constraints={"schema": {"$ref": reference}})
