"""The base of all parts of the contract: the fixtures, and the limits of the provider under test."""

import uuid
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeAlias

import pytest

from dspex_persist.state.limits import Limits
from dspex_persist.state.provider import StateProvider

Reopen: TypeAlias = Callable[[], StateProvider]
"""Kills and restarts whatever holds the provider's state, and returns a provider to continue with."""
SMALL_LIMITS = Limits(
    value_size_bytes=1024 * 1024,
    binary_size_bytes=1024 * 1024,
    session_size_bytes=4 * 1024 * 1024,
    variables_per_session=100,
    metadata_entries=16,
    metadata_size_bytes=2 * 1024,
    constraints_size_bytes=4 * 1024,
    batch_entries=120,
    history_entries=200,
    history_size_bytes=1024 * 1024,
    watchers=30,
)
"""Limits that a test can reach quickly."""


class Contract:
    """The base of all parts of the contract."""

    limits: ClassVar[Limits] = SMALL_LIMITS
    """The limits of the provider under test. Create it with these, or override them with the ones it has."""

    @pytest.fixture
    def provider(self) -> Iterator[StateProvider]:
        """The provider under test."""
        raise NotImplementedError(f"{type(self).__name__} has no fixture `provider`")

    @pytest.fixture
    def session(self, provider: StateProvider) -> str:
        """The id of a new session."""
        session_id = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(session_id)
        return session_id
