"""What clients of the audit service were built against stays: fields may be added, none is changed or taken away."""

import json
from pathlib import Path
from typing import Any

from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2
from tests.architecture.test_protocol_descriptor import describe

PUBLISHED = Path(__file__).parents[1] / "assets" / "audit_protocol.json"


def missing(published: Any, compiled: Any, where: str = "") -> list[str]:
    """What is not as it was published."""
    if isinstance(published, dict):
        return [
            each
            for name, part in published.items()
            for each in missing(part, compiled.get(name) if isinstance(compiled, dict) else None, f"{where}/{name}")
        ]
    if isinstance(published, list):
        known = {entry["name"]: entry for entry in compiled or () if isinstance(entry, dict)}
        if all(isinstance(entry, dict) for entry in published):
            return missing({entry["name"]: entry for entry in published}, known, where)
    return [] if published == compiled else [where]


def test_everything_that_was_published_is_still_there() -> None:
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    assert missing(published, describe(dspex_persist_audit_pb2.DESCRIPTOR)) == []


def test_missing_fields_are_reported() -> None:
    published = {"messages": {"M": {"fields": [{"name": "x", "number": 1}, {"name": "y", "number": 2}]}}}
    compiled = {"messages": {"M": {"fields": [{"name": "x", "number": 3}, {"name": "z", "number": 4}]}}}
    assert missing(published, compiled) == [
        "/messages/M/fields/x/number",
        "/messages/M/fields/y/name",
        "/messages/M/fields/y/number",
    ]
