"""Records: what verbs say about variables and their versions, with values as Python objects."""

import json
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final

from dspex_persist.state import values
from dspex_persist.state.model import (
    REASON,
    RESTORED_METADATA,
    ChangeKind,
    Optimization,
    ToolOutcome,
    Variable,
    VariableVersion,
)

DESCRIPTION: Final = "description"
"""The metadata key under which a variable has its description."""


def result_of(outcome: ToolOutcome) -> Any:
    """Return the result of a tool's execution as a Python object, None if it has none; or raise its error."""
    if outcome.error is not None:
        raise outcome.error
    return values.decode_loosely(outcome.result, outcome.result_type) if outcome.result is not None else None


def decode(record: Variable | VariableVersion) -> Any:
    """Return the value of a variable or of an entry of its history as a Python object; None for a deletion."""
    return None if record.value is None else values.decode(record.type, record.value)


class VariableInfo:
    """A variable at one moment. Its value is decoded when it is asked for."""

    __slots__ = ("record",)

    def __init__(self, record: Variable) -> None:
        self.record = record

    @property
    def id(self) -> str:
        """Its id, which no other variable of the session ever has."""
        return self.record.id

    @property
    def name(self) -> str:
        """Its name."""
        return self.record.name

    @property
    def type(self) -> str:
        """The name of its value type."""
        return self.record.type

    @property
    def value(self) -> Any:
        """Its value, as a new Python object."""
        return decode(self.record)

    @property
    def version(self) -> int:
        """The number of its newest version; counts from 0."""
        return self.record.version

    @property
    def constraints(self) -> Mapping[str, Any]:
        """Its constraints, by keyword."""
        constraints: dict[str, Any] = json.loads(self.record.constraints or "{}")
        return constraints

    @property
    def metadata(self) -> Mapping[str, str]:
        """Its metadata."""
        return MappingProxyType(dict(self.record.metadata))

    @property
    def description(self) -> str:
        """What it is for; "" if it was defined without a description."""
        return self.record.metadata.get(DESCRIPTION, "")

    @property
    def updated_at(self) -> datetime:
        """When its newest version was written (UTC)."""
        return self.record.updated_at

    @property
    def lock(self) -> Optimization | None:
        """The optimization that has locked it, if there is one."""
        return self.record.optimization

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VariableInfo) and self.record == other.record

    def __hash__(self) -> int:
        return hash((self.record.id, self.record.version))

    def __repr__(self) -> str:
        return f"<variable {self.name!r}: {self.type}, version {self.version}>"


class HistoryEntry:
    """A version of a variable. Its value is decoded when it is asked for."""

    __slots__ = ("record",)

    def __init__(self, record: VariableVersion) -> None:
        self.record = record

    @property
    def value(self) -> Any:
        """The value, as a new Python object; None for a deletion."""
        return decode(self.record)

    @property
    def version(self) -> int:
        """The number of the version; counts from 0."""
        return self.record.version

    @property
    def kind(self) -> ChangeKind:
        """What kind of change it was."""
        return self.record.kind

    @property
    def type(self) -> str:
        """The name of the value's type."""
        return self.record.type

    @property
    def at(self) -> datetime:
        """When it was written (UTC)."""
        return self.record.created_at

    @property
    def actor(self) -> str:
        """Who wrote it, such as `user:alice`."""
        return self.record.actor

    @property
    def reason(self) -> str | None:
        """Why, if the writer gave a reason."""
        return self.record.reason

    @property
    def cause(self) -> str:
        """The operation, or the id of the execution, that wrote it."""
        return self.record.cause

    @property
    def execution_id(self) -> str | None:
        """The id of the execution that wrote it; None if it was written outside of tools."""
        return self.record.execution_id

    @property
    def commit(self) -> int:
        """The number of its commit."""
        return self.record.sequence

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the change."""
        own = (REASON, RESTORED_METADATA)
        return MappingProxyType({key: text for key, text in self.record.metadata.items() if key not in own})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HistoryEntry) and self.record == other.record

    def __hash__(self) -> int:
        return hash((self.record.variable_id, self.record.version))

    def __repr__(self) -> str:
        return f"<version {self.version}: {self.kind} by {self.actor}, {self.at:%Y-%m-%d %H:%M:%S}>"
